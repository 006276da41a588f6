"""Distilled Fine-Tuning: the third stage of LLaVA-KD (§3.3.2, arXiv 2410.16236v1).

    L_DFT = L_reg + alpha L_res + beta L_vis + gamma L_rel                                          Eq. (7)

Trained: projector and LLM of the student. Frozen: vision tower, and the whole teacher.
Departures: the sums over tokens in Eqs. 1 to 3 are means over the rows of the global batch. With --targets a
fifth term, delta L_prompt, can be added (the paper's Table 4).

    torchrun --nproc_per_node 8 dft.py --student out/sft --teacher TEACHER \\
        --data llava_v1_5_mix665k.json --images IMAGES --out out/dft
"""

import argparse

import torch

from data import LlavaData, count_rows, micro_batches, schedule
from losses import autoregressive_loss, prompt_kl, relation_loss, response_kl, self_correlation, visual_kl
from model import Llava, load_teacher
from support.chunks import gram, over_rows
from support.flags import REQUIRED, add_flags, add_kd_flags, add_training_flags, cli, kd_weights, new_parser
from support.ranks import process_group
from support.run import check_samples, may_update, open_run, save_student, seed_step, start_run, write_log
from support.state import load_state, make_optimizer, save_state_if_due, set_lr, stop_if_asked


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "models", [
        ("--student", str, REQUIRED, "LLaVA checkpoint that is trained, hub name or folder"),
        ("--teacher", str, REQUIRED, "LLaVA checkpoint to learn from, hub name or folder"),
    ])
    add_kd_flags(parser, alpha=1.0, beta=1.0, gamma=0.5, relation="matrix", source="KD §4.1")
    add_training_flags(parser, lr=2e-5, batch=128, epochs=1, warmup=0.03, source="KD §4.1, 16 a GPU x 8")
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
        teacher = load_teacher(args.teacher, student, run.teacher_dtype)
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
        start_run(run, student, data, len(steps), first)

        # ---- the loop
        ranks.catch_signals()
        alpha, beta, delta = kd_weights(args)
        w_s, w_t = student.lm_head.weight, teacher.lm_head.weight  # (V_s, D_s), (V_t, D_t)
        n_ids = min(len(w_s), len(w_t))  # that both heads have
        gram_t = gram(w_t, n_ids) if args.gamma else None  # W^T W (D_t, D_t), for Eq. (4) without logits
        for step, micros in micro_batches(data, steps, first, run):
            seed_step(run, step)
            lr = set_lr(optimizer, step, len(steps), args.lr, args.warmup)
            total = count_rows(micros, ranks)  # rows, images, tokens of the global batch
            check_samples(run, micros, total.bad)
            gram_s = gram(w_s, n_ids) if args.gamma else None  # (D_s, D_s), for all micro-batches
            logged = []
            for k, batch in enumerate(micros, 1):
                batch = batch.to(ranks.device)
                with ranks.exchange_gradients(now=k == len(micros)), run.autocast():
                    z = student.encode_images(batch.pixel_values)  # (n, Np, C)
                    h_s = forward(batch.input_ids, z)  # (B, T, D_s)
                    with torch.no_grad():  # without a tower it sees as the student does
                        z_t = teacher.encode_images(batch.teacher_pixels) if teacher.vision_tower else z
                        h_t = teacher(batch.input_ids, z_t)  # (B, T, D_t)

                # ---- Eq. (7), its sums over rows: `over_rows` forms the logits of a few rows of one kind
                # and calls this with log phi_s, log phi_l (N, V) and y (N,), the next token if it is learned
                def objective(response, visual, prompt):
                    l_reg = autoregressive_loss(response.log_s, response.y, 1 / total.response)
                    l_res = response_kl(response.log_s, response.log_t, 1 / total.response)
                    l_vis = visual_kl(visual.log_s, visual.log_t, 1 / total.visual)
                    l_prompt = prompt_kl(prompt.log_s, prompt.log_t, 1 / total.prompt)
                    loss = l_reg + alpha * l_res + beta * l_vis + delta * l_prompt
                    return loss, {"l_reg": l_reg, "l_res": l_res, "l_vis": l_vis, "l_prompt": l_prompt}

                kinds = {"response": batch.response, "visual": batch.visual if beta else None,
                         "prompt": batch.prompt if delta else None}
                loss, terms = over_rows(objective, kinds, batch.y, (h_s.to(run.dtype), w_s), (h_t, w_t))
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
