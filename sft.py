"""Supervised Fine-Tuning: the second stage of LLaVA-KD (§3.3.2, Eq. 1, arXiv 2410.16236v1).

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
from support.flags import add_flags, add_training_flags, cli, new_parser
from support.ranks import process_group
from support.run import all_finite, begin, check_samples, open_run, save_student, set_lr, write_log
from support.state import load_state, make_optimizer, save_state_if_due, stop_if_asked


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "models", [
        ("--student", str, ..., "LLaVA checkpoint to train, hub name or folder"),
    ])
    add_training_flags(parser, lr=2e-5, batch=128, source="KD §4.1, 16 a GPU x 8")
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
        begin(run, student, data, len(steps), first)

        # ---- the loop
        ranks.catch_signals()
        w_s = student.lm_head.weight  # (V, D_s)
        for step, micros in micro_batches(data, steps, first, run):
            torch.manual_seed(hash((args.seed, step, ranks.rank)))  # the same after an interruption
            lr = set_lr(optimizer, step, len(steps), args.lr, args.warmup)
            n = count_rows(micros, ranks)  # rows, images, tokens of the global batch
            check_samples(run, micros, n.bad)
            losses = []
            for k, batch in enumerate(micros, 1):
                batch = batch.to(ranks.device)
                with ranks.exchange_gradients(now=k == len(micros)), run.autocast():
                    z = student.encode_images(batch.pixel_values)  # (n, Np, C)
                    h_s = forward(batch.input_ids, z)  # (B, T, D_s)

                # ---- Eq. (1), a sum over rows. `over_rows` forms the logits and calls this on a few rows at
                # a time: log phi_s (N, V) and the next token y (N,)
                def objective(response):
                    l_reg = autoregressive_loss(response.log_s, response.y, 1 / n.response)
                    return l_reg, {"l_reg": l_reg}

                kinds = [batch.response]
                loss, terms = over_rows(objective, kinds, batch.targets, (h_s.to(run.dtype), w_s))
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
