"""Supervised Fine-Tuning: the second stage of LLaVA-KD (§3.3.2, arXiv 2410.16236v1).

    L_SFT = L_reg                                                                                   Eq. (1)

Trained: projector and LLM. Frozen: vision tower. The teacher is made by this script too (§3.2).
Departure: the sum over tokens in Eq. 1 is a mean over the rows of the global batch.

    torchrun --nproc_per_node 8 sft.py --student out/dpt \\
        --data llava_v1_5_mix665k.json --images IMAGES --out out/sft
"""

import argparse

import torch

from data import LlavaData, count_rows, micro_batches, schedule
from losses import autoregressive_loss
from model import Llava
from support.chunks import over_rows
from support.flags import REQUIRED, add_flags, add_training_flags, cli, new_parser
from support.ranks import process_group
from support.run import check_samples, may_update, open_run, save_student, seed_step, start_run, write_log
from support.state import load_state, make_optimizer, save_state_if_due, set_lr, stop_if_asked


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "models", [
        ("--student", str, REQUIRED, "LLaVA checkpoint that is trained, hub name or folder"),
    ])
    add_training_flags(parser, lr=2e-5, batch=128, epochs=1, warmup=0.03, source="KD §4.1, 16 a GPU x 8")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with process_group() as ranks:
        run = open_run(args, "sft", ranks, __file__)
        if run.finished:
            return
        torch.manual_seed(args.seed)

        # ---- models, and what is trained
        student = Llava.from_checkpoint(args.student).to(ranks.device)
        student.requires_grad_(True).vision_tower.requires_grad_(False)
        trained = [p for p in student.parameters() if p.requires_grad]
        if args.gradient_checkpointing:
            student.language_model.activation_checkpointing_enable({"use_reentrant": False})
        forward = ranks.data_parallel(student.train())

        # ---- data, optimizer, and where an interrupted run was
        data = LlavaData(args, student)
        steps = schedule(data, args)
        optimizer = make_optimizer(run, trained)
        first = load_state(run, student, optimizer)
        start_run(run, student, data, len(steps), first)

        # ---- the loop
        ranks.catch_signals()
        w_s = student.lm_head.weight  # (V_s, D_s)
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

                # ---- Eq. (1), a sum over rows: `over_rows` forms the logits of a few rows of one kind
                # and calls this with log phi_s (N, V_s) and the next tokens y (N,)
                def objective(response):
                    l_reg = autoregressive_loss(response.log_s, response.y, 1 / total.response)
                    return l_reg, {"l_reg": l_reg}

                kinds = {"response": batch.response}
                loss, terms = over_rows(objective, kinds, batch.y, (h_s.to(run.dtype), w_s))
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
