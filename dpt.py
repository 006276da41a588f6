"""Distilled Pre-Training: the first stage of LLaVA-KD (§3.3.2, arXiv 2410.16236v1).

    L_DPT = L_PT + alpha L_res + beta L_vis + gamma L_rel                                           Eq. (6)

Trained: the projector of the student. Frozen: everything else, and the whole teacher.
Without --teacher it is plain Pre-Training by L_PT, Eq. 1: also the teacher's first stage (§3.2), and
LLaVA-MoD's initialisation (MoD Eq. 5).
Departures: the sums over tokens in Eqs. 1 to 3 are means over the rows of the global batch. With --targets a
fifth term, delta L_prompt, can be added (the paper's Table 4).

    torchrun --nproc_per_node 8 dpt.py --vision google/siglip-so400m-patch14-384 --llm Qwen/Qwen1.5-0.5B \\
        --teacher TEACHER --data blip_laion_cc_sbu_558k.json --images IMAGES --out out/dpt
"""

import argparse

import torch

from data import LlavaData, count_rows, micro_batches, schedule
from losses import autoregressive_loss, prompt_kl, relation_loss, response_kl, self_correlation, visual_kl
from model import Llava, load_teacher
from support.chunks import gram, over_rows
from support.flags import add_flags, add_kd_flags, add_training_flags, cli, drop_kd, kd_weights, new_parser
from support.parts import add_student_flags, new_llava
from support.ranks import process_group
from support.run import check_samples, may_update, open_run, save_student, seed_step, start_run, write_log
from support.state import load_state, make_optimizer, save_state_if_due, set_lr, stop_if_asked


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_student_flags(parser, llm="Qwen1.5-0.5B or 1.8B")
    add_flags(parser, "training", [
        ("--teacher", str, None, "LLaVA checkpoint to learn from; without it, plain pre-training"),
        ("--caption_only", bool, True, "train on image and answer, without the question; as LLaVA-1.5"),
    ])
    add_kd_flags(parser, alpha=1.0, beta=1.0, gamma=0.5, relation="matrix", source="KD §4.1")
    add_training_flags(parser, lr=1e-3, batch=256, epochs=1, warmup=0.03, source="KD §4.1, 32 a GPU x 8")
    args = parser.parse_args(argv)
    parts, whole = (args.vision, args.llm), args.student
    if not (all(parts) and not whole or whole and not any(parts) and args.template == "teacher"):
        parser.error("give either --vision and --llm, or --student; --template is for a new student alone")
    if args.teacher and "prompt" in args.targets and args.caption_only:
        parser.error("with --caption_only there are no prompt tokens to distil: add --no-caption_only")
    if not args.teacher:
        drop_kd(parser, args)  # plain Pre-Training
    return args


def new_student(args: argparse.Namespace) -> Llava:
    """The checkpoint --student, or a new model with its teacher's tokenizer and template."""
    if args.student:
        return Llava.from_checkpoint(args.student)
    return Llava(*new_llava(args.vision, args.llm, args.teacher if args.template == "teacher" else None))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with process_group() as ranks:
        run = open_run(args, "dpt", ranks, __file__)
        if run.finished:
            return
        torch.manual_seed(args.seed)

        # ---- models, and what is trained
        student, teacher = new_student(args).to(ranks.device), None
        if args.teacher:
            teacher = load_teacher(args.teacher, student, run.teacher_dtype)
        student.requires_grad_(False).multi_modal_projector.requires_grad_(True)
        trained = [p for p in student.parameters() if p.requires_grad]
        if args.gradient_checkpointing:
            student.language_model.activation_checkpointing_enable({"use_reentrant": False})
        forward = ranks.data_parallel(student.train())

        # ---- data, optimizer, and where an interrupted run was
        data = LlavaData(args, student, teacher, needs_images=True)  # text does not reach the projector
        steps = schedule(data, args)
        optimizer = make_optimizer(run, trained)
        first = load_state(run, student, optimizer)
        start_run(run, student, data, len(steps), first)

        # ---- the loop
        ranks.catch_signals()
        alpha, beta, delta = kd_weights(args)
        w_s, w_t = student.lm_head.weight, teacher.lm_head.weight if teacher else None  # (V, D)
        if args.gamma:  # W^T W (D, D), for Eq. (4) without logits, over the ids that both heads have
            gram_s, gram_t = (gram(w, min(len(w_s), len(w_t))) for w in (w_s, w_t))
        for step, micros in micro_batches(data, steps, first, run):
            seed_step(run, step)
            lr = set_lr(optimizer, step, len(steps), args.lr, args.warmup)
            total = count_rows(micros, ranks)  # rows, images, tokens of the global batch
            check_samples(run, micros, total.bad)
            logged = []
            for k, batch in enumerate(micros, 1):
                batch = batch.to(ranks.device)
                with ranks.exchange_gradients(now=k == len(micros)), run.autocast():
                    z = student.encode_images(batch.pixel_values)  # (n, Np, C)
                    h_s = forward(batch.input_ids, z)  # (B, T, D_s)
                    if teacher:
                        with torch.no_grad():  # without a tower it sees as the student does
                            z_t = teacher.encode_images(batch.teacher_pixels) if teacher.vision_tower else z
                            h_t = teacher(batch.input_ids, z_t)  # (B, T, D_t)

                # ---- Eq. (6), its sums over rows: `over_rows` forms the logits of a few rows of one kind
                # and calls this with log phi_s, log phi_l (N, V) and y (N,), the next token if it is learned
                def objective(response, visual, prompt):
                    l_pt = autoregressive_loss(response.log_s, response.y, 1 / total.response)
                    if not teacher:
                        return l_pt, {"l_pt": l_pt}
                    l_res = response_kl(response.log_s, response.log_t, 1 / total.response)
                    l_vis = visual_kl(visual.log_s, visual.log_t, 1 / total.visual)
                    l_prompt = prompt_kl(prompt.log_s, prompt.log_t, 1 / total.prompt)
                    loss = l_pt + alpha * l_res + beta * l_vis + delta * l_prompt
                    return loss, {"l_pt": l_pt, "l_res": l_res, "l_vis": l_vis, "l_prompt": l_prompt}

                kinds = {"response": batch.response, "visual": batch.visual if beta else None,
                         "prompt": batch.prompt if delta else None}
                s, t = (h_s.to(run.dtype), w_s), (h_t, w_t) if teacher else None
                loss, terms = over_rows(objective, kinds, batch.y, s, t)
                if args.gamma:  # no sum over rows: one cosine an image
                    v_s, v_t = (h[batch.visual].unflatten(0, z.shape[:2]) for h in (h_s, h_t))  # (n, Np, D)
                    r_s, r_t = self_correlation(v_s, gram_s), self_correlation(v_t, gram_t)  # Eq. (4)
                    l_rel = relation_loss(r_s, r_t, 1 / total.images, columns=args.relation == "columns")
                    loss, terms = loss + args.gamma * l_rel, terms | {"l_rel": l_rel}
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


if __name__ == "__main__":
    cli(main)
