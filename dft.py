"""Distilled Fine-Tuning: the third stage of LLaVA-KD (§3.3.2, Eq. 7, arXiv 2410.16236v1).

Trained: projector and LLM of the student. Frozen: vision tower, and the whole teacher.
Departures: the sums over tokens in Eqs. 1 to 3 are means over the rows of the global batch.

    torchrun --nproc_per_node 8 dft.py --student out/sft --teacher TEACHER \\
        --data llava_v1_5_mix665k.json --images IMAGES --out out/dft
"""

import argparse

import torch

from data import LlavaData, count_rows, micro_batches, schedule
from losses import autoregressive_loss, prompt_kl, relation_loss, response_kl, self_correlation, visual_kl
from model import Llava, load_teacher
from support.chunks import gram, over_rows
from support.flags import add_flags, add_kd_flags, add_training_flags, cli, new_parser
from support.ranks import process_group
from support.run import all_finite, begin, check_samples, open_run, save_student, set_lr, write_log
from support.state import load_state, make_optimizer, save_state_if_due, stop_if_asked


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "models", [
        ("--student", str, ..., "LLaVA checkpoint to train, hub name or folder"),
        ("--teacher", str, ..., "LLaVA checkpoint to learn from, hub name or folder"),
    ])
    add_kd_flags(parser, gamma=0.5, relation="matrix", source="KD §4.1")
    add_training_flags(parser, lr=2e-5, batch=128, source="KD §4.1, 16 a GPU x 8")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with process_group() as ranks:
        run = open_run(args, "dft", ranks, __file__)
        if run.finished:
            return
        torch.manual_seed(args.seed)

        # ---- models, and what is trained
        student = Llava.from_checkpoint(args.student).to(ranks.device)
        teacher = load_teacher(args, student, run.dtype)
        student.requires_grad_(True).vision_tower.requires_grad_(False)
        trained = [p for p in student.parameters() if p.requires_grad]
        if args.gradient_checkpointing:
            student.language_model.activation_checkpointing_enable({"use_reentrant": False})
        forward = ranks.data_parallel(student.train())

        # ---- data, optimizer, and where an interrupted run was
        data = LlavaData(args, student, teacher)
        steps = schedule(data, args)
        optimizer = make_optimizer(run, trained)
        first = load_state(run, student, optimizer)
        begin(run, student, data, len(steps), first)

        # ---- the loop
        ranks.catch_signals()
        alpha = args.alpha if "response" in args.targets else 0
        beta = args.beta if "visual" in args.targets else 0
        delta = args.delta if "prompt" in args.targets else 0
        w_s, w_t = student.lm_head.weight, teacher.lm_head.weight  # (V_s, D_s), (V_t, D_t)
        gram_t = gram(w_t, w_s) if args.gamma else None  # (D_t, D_t)
        for step, micros in micro_batches(data, steps, first, run):
            torch.manual_seed(hash((args.seed, step, ranks.rank)))  # the same after an interruption
            lr = set_lr(optimizer, step, len(steps), args.lr, args.warmup)
            n = count_rows(micros, ranks)  # rows, images, tokens of the global batch
            check_samples(run, micros, n.bad)
            gram_s = gram(w_s, w_t) if args.gamma else None  # (D_s, D_s)
            losses = []
            for k, batch in enumerate(micros, 1):
                batch = batch.to(ranks.device)
                with ranks.exchange_gradients(now=k == len(micros)), run.autocast():
                    z = student.encode_images(batch.pixel_values)  # (n, Np, C)
                    h_s = forward(batch.input_ids, z)  # (B, T, D_s)
                    with torch.no_grad():
                        z_t = teacher.encode_images(batch.teacher_pixels) if teacher.vision_tower else z
                        h_t = teacher(batch.input_ids, z_t)  # (B, T, D_t)

                # ---- Eq. (7), a sum over rows. `over_rows` forms the logits and calls this on a few rows at
                # a time: log phi_s, log phi_l (N, V) and the next token y (N,)
                def objective(response, visual, prompt):
                    l_reg = autoregressive_loss(response.log_s, response.y, 1 / n.response)
                    l_res = response_kl(response.log_s, response.log_t, 1 / n.response)
                    l_vis = visual_kl(visual.log_s, visual.log_t, 1 / n.visual)
                    l_prompt = prompt_kl(prompt.log_s, prompt.log_t, 1 / n.prompt)
                    loss = l_reg + alpha * l_res + beta * l_vis + delta * l_prompt
                    return loss, {"l_reg": l_reg, "l_res": l_res, "l_vis": l_vis, "l_prompt": l_prompt}

                kinds = [batch.response, batch.visual if beta else None, batch.prompt if delta else None]
                loss, terms = over_rows(objective, kinds, batch.targets, (h_s.to(run.dtype), w_s), (h_t, w_t))
                if args.gamma:
                    v_s, v_t = (h[batch.visual].unflatten(0, z.shape[:2]) for h in (h_s, h_t))  # (n, Np, D)
                    r_s, r_t = self_correlation(v_s, gram_s), self_correlation(v_t, gram_t)  # Eq. (4)
                    l_rel = relation_loss(r_s, r_t, 1 / n.images, args.relation == "columns")  # Eq. (5)
                    loss, terms = loss + args.gamma * l_rel, terms | {"l_rel": l_rel}
                (ranks.world * loss).backward()  # DDP divides by the number of ranks
                losses.append({"loss": loss} | terms)
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm or torch.inf)
            if all_finite(run, step, losses, grad_norm, micros):
                optimizer.step()
            optimizer.zero_grad(set_to_none=ranks.world == 1)  # DDP keeps them in its buckets
            write_log(run, step, lr, losses, grad_norm, n.tokens)
            save_state_if_due(run, step, student, optimizer)
            stop_if_asked(run, step, student, optimizer)
        save_student(run, student)


if __name__ == "__main__":
    cli(main)
