"""LLaVA-MoD: mimic and preference distillation (§3.2, arXiv 2408.15881), one step a run.

    d2d  L_D2D = KL                the dense student; projector and LLM are trained                 Eq. (6)
    d2s  L_D2S = L_ar + KL         FFNs become experts; they, routers and projector are trained     Eq. (7)
    pd   L_PD  = DPO or KTO        the better of two answers, more than the teacher does; the same  Eq. (8)

The initialisation before them (Eq. 5) is dpt.py without --teacher.
Departures: Eqs. 6 and 7 print a minus before the KL, which would drive the student away from the teacher;
here it is minimised. Expectations over tokens are means over the rows of the global batch, of answers as the
data have them. d2s and pd add 0.01 x a balance loss, as the released code; the paper prints none.

    torchrun --nproc_per_node 8 mod_distill.py --step d2s --student out/d2d --teacher TEACHER \\
        --data multitask.json --images IMAGES --out out/d2s
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from data import Batch, Counts, LlavaData, count_rows, micro_batches, schedule
from losses import autoregressive_loss, dpo_loss, kl_baseline, kto_loss, log_probability, prompt_kl
from losses import response_kl
from model import Llava, load_teacher
from moe import Experts, Router, expert_load, is_sparse, mean_balance_loss, modules, prepare, sparsify
from moe import unwatch, watch
from support.chunks import Head, over_rows
from support.flags import REQUIRED, add_flags, add_training_flags, cli, new_parser, positive, require, weight
from support.ranks import process_group
from support.run import check_samples, may_update, open_run, save_student, seed_step, start_run, write_log
from support.state import load_state, make_optimizer, save_state_if_due, set_lr, stop_if_asked

STEPS = "d2d", "d2s", "pd"
MIMIC, SPARSE = STEPS[:2], STEPS[1:]
# Flags that are for some steps only.
FLAGS = [
    (MIMIC, [
        ("--distill", ("response", "response+instruction"), "response", "rows of the KL; MoD Table 7"),
        ("--kl", weight, 1.0, "weight of the KL, 0: none, and no teacher; MoD Eqs. 6, 7"),
        ("--ar", weight, None, "weight of L_ar (default: 0 in d2d, 1 in d2s); MoD Eqs. 6, 7"),
    ]),
    (("d2s",), [
        ("--experts", positive, 4, "copies of each FFN; MoD §4.1"),
        ("--top_k", positive, 2, "experts that each token gets; MoD §4.1"),
        ("--moe_layers", str, "every_other", "every_other, all, first_half or a list as 0,2; released code"),
        ("--renormalise", bool, True, "kept routing values sum to 1 (with --top_k 1 the router then "
         "learns from the balance loss alone); without: as MoD Eq. (3)"),
    ]),
    (SPARSE, [
        ("--router", ("topk", "rsample", "jitter"), "topk", "how experts are picked; MoD Table 14"),
        ("--balance", weight, 0.01, "weight of the balance loss; released code"),
    ]),
    (("pd",), [
        ("--po", ("kto", "dpo"), "kto", "preference loss; MoD Tables 15, 16"),
        ("--beta", weight, 0.1, "beta of Eq. (8), the strength of the reference; TRL"),
    ]),
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "models", [
        ("--step", STEPS, REQUIRED, "d2d and d2s: mimic distillation; pd: preference distillation"),
        ("--student", str, REQUIRED, "LLaVA checkpoint that is trained, name or folder; dense for d2d, d2s"),
        ("--teacher", str, None, "LLaVA checkpoint to learn from, hub name or folder; not with --kl 0"),
        ("--teacher_dtype", ("auto", "bf16", "fp32"), "auto", "of the teacher's weights; auto: as --dtype"),
    ])
    for steps, rows in FLAGS:
        add_flags(parser, f"--step {' and '.join(steps)}", rows)
    source = "2e-5, in pd 2e-6; MoD A.1, Table 10, released code"
    add_training_flags(parser, lr=None, batch=128, epochs=1, warmup=0.03, source=source)
    args = parser.parse_args(argv)
    for steps, rows in FLAGS:
        for name, *_ in rows:
            if args.step not in steps and getattr(args, name[2:]) != parser.get_default(name[2:]):
                parser.error(f"{name} is for --step {' and '.join(steps)}, not for {args.step}")
    if args.lr is None:
        args.lr = 2e-6 if args.step == "pd" else 2e-5
    if args.ar is None:
        args.ar = 1.0 if args.step == "d2s" else 0.0
    if args.step == "pd" and not args.teacher:
        parser.error("--step pd needs --teacher")
    if args.step in MIMIC and args.kl and not args.teacher:
        parser.error(f"--step {args.step} needs --teacher, or --kl 0")
    taught = args.teacher or args.teacher_dtype != "auto" or args.distill != "response"
    if args.step in MIMIC and not args.kl and (taught or not args.ar):
        parser.error("--kl 0 needs --ar above 0, which is then all that is learned, and no --teacher, "
                     "--teacher_dtype or --distill")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sparse, preference = args.step in SPARSE, args.step == "pd"
    with process_group() as ranks:
        run = open_run(args, args.step, ranks, __file__)
        if run.finished:
            return
        torch.manual_seed(args.seed)

        # ---- models, and what is trained
        student = Llava.from_checkpoint(args.student)
        wrong = f"is sparse already: --step {args.step} begins with a dense student"
        if preference:
            wrong = "is dense: --step pd goes on from --step d2s, run that first"
        require(is_sparse(student) == preference, f"{args.student} {wrong}")
        if args.step == "d2s":
            sparsify(student, args.experts, args.top_k, args.moe_layers, args.renormalise)
        student.to(ranks.device).requires_grad_(not sparse).vision_tower.requires_grad_(False)
        student.multi_modal_projector.requires_grad_(True)
        if sparse:
            prepare(student, args.router)
            for part in modules(student, Router) + modules(student, Experts):
                part.requires_grad_(True)
        teacher = load_teacher(args.teacher, student, run.teacher_dtype) if args.teacher else None
        trained = [p for p in student.parameters() if p.requires_grad]
        if args.gradient_checkpointing:
            student.language_model.activation_checkpointing_enable({"use_reentrant": False})
        forward = ranks.data_parallel(student.train())

        # ---- data, optimizer, and where an interrupted run was
        data = LlavaData(args, student, teacher, pairs=preference)
        steps = schedule(data, args)
        optimizer = make_optimizer(run, trained, betas=(0.9, 0.98))  # MoD Table 10
        first = load_state(run, student, optimizer)
        start_run(run, student, data, len(steps), first)

        # ---- the loop
        ranks.catch_signals()
        devices = [ranks.device] if ranks.device.type == "cuda" else []  # whose random numbers are forked
        w_s, w_t = student.lm_head.weight, teacher.lm_head.weight if teacher else None  # (V, D)

        def passes(batch: Batch, forward: Callable[..., Tensor], teacher: Llava | None) -> tuple:
            """Hidden states (B, T, D) of student and teacher; with both, log-ratios (2, B) of pairs."""
            n_answers = 2 if preference else 1  # that see one image
            with run.autocast():
                z = student.encode_images(batch.pixel_values).repeat(n_answers, 1, 1)  # (n, Np, C)
                watch(student, batch.attention_mask)
                h_s, h_t = forward(batch.input_ids, z).to(run.dtype), None
                if teacher:
                    with torch.no_grad():
                        if teacher.vision_tower:
                            z = teacher.encode_images(batch.teacher_pixels).repeat(n_answers, 1, 1)
                        h_t = teacher(batch.input_ids, z)
            if not (preference and teacher):
                return h_s, h_t, None
            with torch.no_grad():
                reference = log_p(batch, (h_t.to(w_t.dtype), w_t))
            return h_s, h_t, (log_p(batch, (h_s, w_s)) - reference).view(2, -1)

        def sums(ratios: Tensor | None) -> Tensor:
            """Of the batch just passed: its summed log-ratios (2,), then the tokens that each expert got."""
            of_pairs = torch.zeros(2, device=ranks.device) if ratios is None else ratios.detach().sum(1)
            return torch.cat([of_pairs.double(), expert_load(student).flatten().double()])

        for step, micros in micro_batches(data, steps, first, run):
            seed_step(run, step)
            lr = set_lr(optimizer, step, len(steps), args.lr, args.warmup)
            total = count_rows(micros, ranks)  # rows, images, tokens of the global batch
            check_samples(run, micros, total.bad)
            logged, whole = [], None  # whole: `sums` over the global batch; balance loss and KTO need them
            if sparse and len(micros) > 1:  # a pass ahead, without gradients
                whole, teaches = 0, teacher if preference and args.po == "kto" else None
                with torch.no_grad(), torch.random.fork_rng(devices):  # the same noise comes again below
                    for batch in micros:
                        _, _, ratios = passes(batch.to(ranks.device), student, teaches)
                        whole = whole + sums(ratios)
                whole = ranks.sum(whole)
            for k, batch in enumerate(micros, 1):
                batch = batch.to(ranks.device)
                with ranks.exchange_gradients(now=k == len(micros)):
                    h_s, h_t, ratios = passes(batch, forward, teacher)
                if sparse and whole is None:
                    whole = ranks.sum(sums(ratios))
                if preference:
                    loss, terms = preference_loss(args, ratios, whole[:2], batch, total)
                else:
                    loss, terms = mimic_loss(args, batch, (h_s, w_s), (h_t, w_t) if teacher else None, total)
                if sparse:
                    load = whole[2:].view(-1, student.config.text_config.num_experts)  # (sparse layers, E)
                    load = load / load.sum(1, keepdim=True)
                    l_bal = mean_balance_loss(student, load, total.tokens)
                    unwatch(student)
                    loss, terms = loss + args.balance * l_bal, terms | {"l_bal": l_bal}
                    shares = load.mean(0) / (ranks.world_size * len(micros))
                    terms |= {f"expert_{e}": share for e, share in enumerate(shares)}
                (ranks.world_size * loss).backward()  # DDP divides by the number of ranks
                logged.append({"loss": loss} | terms)
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm or torch.inf)
            if may_update(run, step, logged, grad_norm, micros):
                optimizer.step()
            optimizer.zero_grad(set_to_none=ranks.world_size == 1)  # DDP keeps them in its buckets
            write_log(run, step, lr, logged, grad_norm, total.tokens)
            save_state_if_due(run, step, student, optimizer)
            stop_if_asked(run, step, student, optimizer)
        save_student(run, student)


def mimic_loss(
    args: argparse.Namespace, batch: Batch, student: Head, teacher: Head | None, total: Counts
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_D2D = KL and L_D2S = L_ar + KL                  Eqs. (6) and (7), arXiv 2408.15881"""
    instruction = teacher is not None and args.distill == "response+instruction"
    n_kl = total.response + (total.prompt if instruction else 0)  # rows of the KL

    def objective(response, prompt):
        l_ar = autoregressive_loss(response.log_s, response.y, 1 / total.response)
        if teacher is None:
            return args.ar * l_ar, {"l_ar": l_ar}
        l_kl = response_kl(response.log_s, response.log_t, 1 / n_kl)
        l_kl = l_kl + prompt_kl(prompt.log_s, prompt.log_t, 1 / n_kl)
        return args.ar * l_ar + args.kl * l_kl, {"l_ar": l_ar, "l_kl": l_kl}

    kinds = {"response": batch.response, "prompt": batch.prompt if instruction else None}
    return over_rows(objective, kinds, batch.y, student, teacher)


def log_p(batch: Batch, model: Head) -> Tensor:
    """log pi(y|x) of every answer (2B,), summed over its tokens. Eq. (8) is not linear in the rows, so it is
    not itself an objective of `over_rows`; but it needs no more of them than this.
    """
    of_row = lambda response: (log_probability(response.log_s, response.y), {})
    rows, _ = over_rows(of_row, {"response": batch.response}, batch.y, model)  # (N,)
    return rows.new_zeros(len(batch.y)).index_add(0, batch.response.nonzero()[:, 0], rows)


def preference_loss(
    args: argparse.Namespace, ratios: Tensor, ratio_sums: Tensor, batch: Batch, total: Counts
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (8) or KTO, the teacher being the reference; the mean over the pairs of the global batch.

    ratios      (2, B)  log pi_S(y|x) / pi_T(y|x) of chosen and rejected answers
    ratio_sums  (2,)    their sums over the global batch
    """
    n_pairs = max(args.global_batch - total.bad, 1)  # that can be read; what means are divided by
    weights = batch.response.any(1).chunk(2)[0] / n_pairs  # (B,), 0 for a pair whose image could not be read
    (chosen, rejected), (chosen_kl, rejected_kl) = ratios, kl_baseline(ratio_sums / n_pairs).to(ratios)
    margin = args.beta * (chosen - rejected).detach()  # of rewards beta x log-ratio
    if args.po == "dpo":
        loss, inner = dpo_loss(chosen, rejected, args.beta, weights), margin.unsqueeze(0)
    else:
        loss = kto_loss(chosen, rejected, chosen_kl, rejected_kl, args.beta, weights)
        inner = args.beta * torch.stack([chosen - rejected_kl, chosen_kl - rejected]).detach()
    saturated = ((torch.sigmoid(inner) - 0.5).abs() > 0.49).double().mean(0)  # below 1 % or above 99 %
    return loss, {"l_po": loss, "margin": (margin * weights).sum(), "saturated": (saturated * weights).sum(),
                  "ranked_right": ((margin > 0) * weights).sum()}


if __name__ == "__main__":
    cli(main)
