"""LLaVA-MoD: mimic and preference distillation (§3.2, Eqs. 6-8, arXiv 2408.15881), one step a run.

    d2d  the dense student learns the teacher's distribution of the answers; projector and LLM are trained
    d2s  its FFNs become experts; Eq. (1) joins the KL; experts, routers and projector are trained
    pd   of two answers it learns to prefer the better one more than the teacher does; the same are trained

The initialisation before them (Eq. 5) is dpt.py without --teacher.
Departures: the expectations over tokens in Eqs. 6-7 are means over the rows of the global batch.

    torchrun --nproc_per_node 8 mod_distill.py --step d2s --student out/d2d --teacher TEACHER \\
        --data multitask.json --images IMAGES --out out/d2s
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor

from common import Counts, Run, set_lr
from data import Batch, Encoder, LlavaData, PreferenceData, micro_batches, schedule
from flags import InputError, add_flags, add_training_flags, cli, new_parser, positive
from fused import Head, log_probabilities, token_losses
from losses import autoregressive_loss, d2s_objective, dpo_loss, kl_baseline, kto_loss, response_kl
from model import Llava
from moe import balance, is_sparse, prepare, route, sparsify

STEPS = ("d2d", "d2s", "pd")
MIMIC, SPARSE = ("d2d", "d2s"), ("d2s", "pd")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--step", choices=STEPS)
    step = first.parse_known_args(argv)[0].step
    parser = new_parser(__doc__)
    # fmt: off
    add_flags(parser, "models", [
        ("--step", STEPS, ..., "d2d and d2s: mimic distillation; pd: preference distillation"),
        ("--student", str, ..., "LLaVA checkpoint to train, hub name or folder; dense for d2d and d2s"),
        ("--teacher", str, None, "LLaVA checkpoint to learn from, hub name or folder; needless with --kl 0"),
        ("--teacher_dtype", ("auto", "bf16", "fp32"), "auto", "of the teacher's weights; auto: as --dtype"),
    ])
    only = {MIMIC: [
        ("--distill", ("response", "response+instruction"), "response", "rows of the KL; MoD Table 7"),
        ("--kl", float, 1.0, "weight of the KL, 0: none, with no teacher; MoD Eqs. 6, 7"),
        ("--ar", float, float(step == "d2s"), "weight of Eq. (1); MoD Eqs. 6, 7: 0 in d2d, 1 in d2s"),
    ], ("d2s",): [
        ("--experts", positive, 4, "copies of each FFN; MoD §4.1"),
        ("--top_k", positive, 2, "experts that each token gets; MoD §4.1"),
        ("--moe_layers", str, "every_other", "every_other, all, first_half or a list as 0,2; released code"),
        ("--renormalise", bool, True, "kept routing values sum to 1; without: as MoD Eq. (3)"),
    ], SPARSE: [
        ("--router", ("topk", "rsample", "jitter"), "topk", "how experts are picked; MoD Table 14"),
        ("--balance", float, 0.01, "weight of the balance loss; released code"),
    ], ("pd",): [
        ("--po", ("kto", "dpo"), "kto", "preference loss; MoD Tables 15, 16"),
        ("--beta", float, 0.1, "beta of Eq. (8), the strength of the reference; TRL"),
    ]}
    for steps, rows in only.items():
        add_flags(parser, f"--step {' and '.join(steps)}", rows)
    # fmt: on
    lr = 2e-6 if step == "pd" else 2e-5
    add_training_flags(parser, lr, batch=128, source="MoD A.1, Table 10, released code")
    args = parser.parse_args(argv)
    for steps, rows in only.items():
        for name, *_ in rows:
            if args.step not in steps and getattr(args, name[2:]) != parser.get_default(name[2:]):
                parser.error(f"{name} is for --step {' and '.join(steps)}, not for {args.step}")
    if not args.teacher and (args.step == "pd" or args.kl):
        parser.error(f"--step {args.step} needs --teacher" + ", or --kl 0" * (args.step != "pd"))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sparse, preference = args.step in SPARSE, args.step == "pd"
    with Run(args, args.step) as run:
        if run.finished:
            return

        # ---- models, and what is trained
        student = Llava.from_checkpoint(args.student)
        if is_sparse(student) and not preference:
            raise InputError(
                f"{args.student} is sparse already: --step {args.step} begins with a dense student"
            )
        if preference and not is_sparse(student):
            raise InputError(f"{args.student} is dense: --step pd goes on from --step d2s, run that first")
        if args.step == "d2s":
            sparsify(student, args.experts, args.top_k, args.moe_layers, args.renormalise)
        student.to(run.device).requires_grad_(not sparse).vision_tower.requires_grad_(False)
        student.multi_modal_projector.requires_grad_(True)
        if sparse:
            prepare(student, args.router)
            for layer in student.language_model.layers:
                for part in (getattr(layer.mlp, name, None) for name in ("experts", "gate")):
                    if part is not None:
                        part.requires_grad_(True)
        teacher, shared = None, True
        if args.teacher:
            teacher = Llava.from_checkpoint(args.teacher, run.dtype_of(args.teacher_dtype))
            teacher.to(run.device).eval().requires_grad_(False)
            student.check_teacher(teacher)
            shared = student.share_encoder(teacher)
        trained = [p for p in student.parameters() if p.requires_grad]
        if args.gradient_checkpointing:
            student.language_model.activation_checkpointing_enable({"use_reentrant": False})
        ddp = run.parallel(student.train())
        torch.manual_seed(args.seed + run.rank)  # router noise of its own on every rank

        # ---- data
        n_patches = student.n_visual_tokens
        encoder = Encoder(student.processor, n_patches, args.max_len)
        processors = [student.processor] if shared else [student.processor, teacher.processor]
        dataset = PreferenceData if preference else LlavaData
        data = dataset(args.data, args.images, encoder, processors, args.skip_bad)
        steps = schedule(data, args)

        # ---- the loop
        optimizer = torch.optim.AdamW(
            trained, lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.98), fused=True
        )  # betas: MoD Table 10
        note = f"teacher {args.teacher}" + ", encoder shared" * shared if teacher else ""
        first = run.start(student, optimizer, len(steps), data, note)
        batches = micro_batches(data, steps[first:], run)
        for step in range(first, len(steps)):
            lr = set_lr(optimizer, step, len(steps), args.lr, args.warmup)
            micros = [next(batches) for _ in range(run.accumulation)]
            n = run.count(micros, n_patches)
            losses = []
            for k, batch in enumerate(micros):
                with run.sync(ddp, last=k == run.accumulation - 1):
                    batch = batch.to(run.device)
                    both = (2, 1, 1) if preference else (1, 1, 1)  # a pair's two answers see one image
                    with run.autocast():
                        z = student.encode_images(batch.pixel_values).repeat(both)  # (n, Np, C)
                        route(student, batch.attention_mask)
                        h_s = ddp(batch.input_ids, batch.attention_mask, z)  # (B, T, D_s)
                        h_t = None
                        if teacher:
                            with torch.inference_mode():
                                z_t = (
                                    z
                                    if shared
                                    else teacher.encode_images(batch.teacher_pixel_values).repeat(both)
                                )
                                h_t = teacher(batch.input_ids, batch.attention_mask, z_t)  # (B, T, D_t)
                    of_step = preference_loss if preference else mimic_loss
                    loss, terms = of_step(args, run, student, teacher, batch, h_s, h_t, n)
                    if sparse:
                        l_bal, load = balance(student, n.tokens / run.world)
                        loss = loss + args.balance * l_bal
                        terms |= {"l_bal": l_bal}
                        for e, share in enumerate(load.mean(0) / run.accumulation):  # over the sparse layers
                            terms[f"expert_{e}"] = share
                    loss.backward()
                losses.append({"loss": loss} | terms)
            norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            if run.sound(step, losses, norm, micros):
                optimizer.step()
            optimizer.zero_grad()
            run.log(step, lr, losses, n.tokens, norm)
        run.finish(student)


def mimic_loss(
    args: argparse.Namespace, run: Run, student: Llava, teacher: Llava | None,
    batch: Batch, h_s: Tensor, h_t: Tensor | None, n: Counts,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Eqs. (6) and (7), on the rows that some loss reads; by 1 / n the losses are global means."""
    instruction = args.distill == "response+instruction" and teacher is not None
    read = batch.response | batch.prompt * instruction  # (B, T)
    s = Head(h_s[read].to(run.dtype), student.lm_head.weight)  # N rows
    w_ar = batch.response[read] / n.response  # (N,)
    terms = [(autoregressive_loss, batch.targets[read], w_ar, args.ar)]
    if teacher is not None:
        t = Head(h_t[read].to(teacher.lm_head.weight.dtype), teacher.lm_head.weight)
        w_kl = read[read] / (n.response + n.prompt * instruction)
        terms.append((response_kl, t, w_kl, args.kl))
    l_ar, *l_kl = token_losses(s, terms)
    if not l_kl:
        return args.ar * l_ar, {"l_ar": l_ar}
    return d2s_objective(args.ar * l_ar, args.kl * l_kl[0]), {"l_ar": l_ar, "l_kl": l_kl[0]}


def preference_loss(
    args: argparse.Namespace, run: Run, student: Llava, teacher: Llava,
    batch: Batch, h_s: Tensor, h_t: Tensor, n: Counts,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Eq. (8) or KTO, the teacher being the reference; the global batch's mean over pairs."""
    read, y = batch.response, batch.targets[batch.response]  # (2B, T), (N,)
    answer = read.nonzero()[:, 0]  # (N,), the answer that a row belongs to
    row_log_p = log_probabilities(Head(h_s[read].to(run.dtype), student.lm_head.weight), y)
    with torch.no_grad():
        t = Head(h_t[read].to(teacher.lm_head.weight.dtype), teacher.lm_head.weight)
        row_log_p_t = log_probabilities(t, y)
    ratio = row_log_p.new_zeros(len(read)).index_add(0, answer, row_log_p - row_log_p_t)
    chosen, rejected = ratio.chunk(2)  # (B,) log pi_S(y|x) / pi_T(y|x), summed over the answer

    there = read.any(1).chunk(2)[0]  # (B,), False for a pair whose image could not be read
    weights = there * run.world / (args.global_batch - n.bad)  # of the pairs in the global mean
    sums = torch.stack([chosen.detach().sum(), rejected.detach().sum(), there.sum()])
    dist.all_reduce(sums)  # of the micro-batches of all ranks
    chosen_kl, rejected_kl = (kl_baseline(ratio_sum / sums[2].clamp_min(1)) for ratio_sum in sums[:2])
    if args.po == "kto":
        loss = kto_loss(chosen, rejected, chosen_kl, rejected_kl, args.beta, weights)
        inner = torch.stack([chosen - rejected_kl, chosen_kl - rejected])
    else:
        loss, inner = dpo_loss(chosen, rejected, args.beta, weights), (chosen - rejected).unsqueeze(0)
    sigmoid = torch.sigmoid(args.beta * inner.detach())
    return loss, {
        "l_po": loss,
        "margin": (args.beta * (chosen - rejected).detach() * weights).sum(),  # of rewards beta x log-ratio
        "ranked_right": ((chosen > rejected) * weights).sum(),
        "saturated": (((sigmoid - 0.5).abs() > 0.49).double().mean(0) * weights).sum(),  # < 1 % or > 99 %
    }  # fmt: skip


if __name__ == "__main__":
    cli(main)
