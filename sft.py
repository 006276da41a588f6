"""Supervised Fine-Tuning: the second stage of LLaVA-KD (§3.3.2, Eq. 1, arXiv 2410.16236v1).

Trained: projector and LLM. Frozen: vision tower. The teacher is made with this very script too (§3.2).

    torchrun --nproc_per_node 8 sft.py --student out/dpt \\
        --data llava_v1_5_mix665k.json --images IMAGES --out out/sft
"""

import argparse

import torch

from common import Run, set_lr
from data import Encoder, LlavaData, micro_batches, schedule
from flags import add_flags, add_training_flags, cli, new_parser
from fused import Head, token_losses
from losses import autoregressive_loss
from model import Llava


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    # fmt: off
    add_flags(parser, "models", [
        ("--student", str, ..., "LLaVA checkpoint to train, hub name or folder"),
    ])
    # fmt: on
    add_training_flags(parser, lr=2e-5, batch=128, source="KD §4.1, 16 a GPU x 8")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with Run(args, "sft") as run:
        if run.finished:
            return

        # ---- models, and what is trained
        student = Llava.from_checkpoint(args.student).to(run.device)
        student.requires_grad_(True).vision_tower.requires_grad_(False)
        trained = [p for p in student.parameters() if p.requires_grad]
        if args.gradient_checkpointing:
            student.language_model.activation_checkpointing_enable({"use_reentrant": False})
        ddp = run.parallel(student.train())

        # ---- data
        n_patches = student.n_visual_tokens
        encoder = Encoder(student.processor, n_patches, args.max_len)
        data = LlavaData(args.data, args.images, encoder, [student.processor], args.skip_bad)
        steps = schedule(data, args)

        # ---- the loop
        optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        first = run.start(student, optimizer, len(steps), data)
        batches = micro_batches(data, steps[first:], run)
        for step in range(first, len(steps)):
            lr = set_lr(optimizer, step, len(steps), args.lr, args.warmup)
            micros = [next(batches) for _ in range(run.accumulation)]
            n = run.count(micros, n_patches)
            losses = []
            for k, batch in enumerate(micros):
                with run.sync(ddp, last=k == run.accumulation - 1):
                    batch = batch.to(run.device)
                    with run.autocast():
                        z = student.encode_images(batch.pixel_values)  # (n, Np, C)
                        h = ddp(batch.input_ids, batch.attention_mask, z)  # (B, T, D)

                    # ---- Eq. (1), on the rows that predict an answer; by 1 / n the loss is a global mean
                    read = batch.response  # (B, T)
                    s = Head(h[read].to(run.dtype), student.lm_head.weight)  # N rows
                    w_res = read[read] / n.response  # (N,)
                    (loss,) = token_losses(s, [(autoregressive_loss, batch.targets[read], w_res, 1.0)])
                    loss.backward()
                losses.append({"loss": loss})
            norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            if run.sound(step, losses, norm, micros):
                optimizer.step()
            optimizer.zero_grad()
            run.log(step, lr, losses, n.tokens, norm)
        run.finish(student)


if __name__ == "__main__":
    cli(main)
