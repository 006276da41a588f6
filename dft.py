"""Distilled Fine-Tuning: the third stage of LLaVA-KD (§3.3.2, Eq. 7, arXiv 2410.16236v1).

Trained: projector and LLM of the student. Frozen: vision tower, and the whole teacher.
Departures: the sums over tokens in Eqs. 2-3 are means over the rows of the global batch.

    torchrun --nproc_per_node 8 dft.py --student out/sft --teacher TEACHER \\
        --data llava_v1_5_mix665k.json --images IMAGES --out out/dft
"""

import argparse

import torch

from common import Run, set_lr
from data import Encoder, LlavaData, micro_batches, schedule
from flags import add_flags, add_training_flags, cli, new_parser
from fused import Head, gram, token_losses, visual_relation
from losses import autoregressive_loss, dft_objective, prompt_kl, response_kl, visual_kl
from model import Llava


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    # fmt: off
    add_flags(parser, "models", [
        ("--student", str, ..., "LLaVA checkpoint to train, hub name or folder"),
        ("--teacher", str, ..., "LLaVA checkpoint to learn from, hub name or folder"),
        ("--teacher_dtype", ("auto", "bf16", "fp32"), "auto", "of the teacher's weights; auto: as --dtype"),
    ])
    add_flags(parser, "objective", [
        ("--targets", ["response", "visual", "prompt"], ["response", "visual"],
         "rows whose distribution is distilled, MDist; KD Table 4"),
        ("--alpha", float, 1.0, "weight of L_res; KD §4.1"),
        ("--beta", float, 1.0, "weight of L_vis; KD §4.1"),
        ("--gamma", float, 0.5, "weight of L_rel, RDist, 0: off; KD §4.1"),
        ("--relation", ("matrix", "columns"), "matrix", "L_rel of R whole, KD Eq. 5; by column, CKD Eq. 6"),
        ("--delta", float, 1.0, "weight of the prompt's KL, if it is a target"),
    ])
    # fmt: on
    add_training_flags(parser, lr=2e-5, batch=128, source="KD §4.1, 16 a GPU x 8")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    weights = {"response": args.alpha, "visual": args.beta, "prompt": args.delta}
    alpha, beta, delta = (w * (target in args.targets) for target, w in weights.items())
    columns = args.relation == "columns"
    with Run(args, "dft") as run:
        if run.finished:
            return

        # ---- models, and what is trained
        student = Llava.from_checkpoint(args.student).to(run.device)
        teacher = Llava.from_checkpoint(args.teacher, run.dtype_of(args.teacher_dtype)).to(run.device).eval()
        student.check_teacher(teacher)
        shared = student.share_encoder(teacher)
        student.requires_grad_(True).vision_tower.requires_grad_(False)
        teacher.requires_grad_(False)
        n_common = min(len(student.lm_head.weight), len(teacher.lm_head.weight))  # ids that both heads have
        gram_s = gram_t = None
        if args.gamma:
            gram_t = gram(teacher.lm_head.weight[:n_common])
        trained = [p for p in student.parameters() if p.requires_grad]
        if args.gradient_checkpointing:
            student.language_model.activation_checkpointing_enable({"use_reentrant": False})
        ddp = run.parallel(student.train())

        # ---- data
        n_patches = student.n_visual_tokens
        encoder = Encoder(student.processor, n_patches, args.max_len)
        processors = [student.processor] if shared else [student.processor, teacher.processor]
        data = LlavaData(args.data, args.images, encoder, processors, args.skip_bad)
        steps = schedule(data, args)

        # ---- the loop
        optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        first = run.start(
            student, optimizer, len(steps), data, f"teacher {args.teacher}" + ", encoder shared" * shared
        )
        batches = micro_batches(data, steps[first:], run)
        for step in range(first, len(steps)):
            lr = set_lr(optimizer, step, len(steps), args.lr, args.warmup)
            micros = [next(batches) for _ in range(run.accumulation)]
            n = run.count(micros, n_patches)
            if args.gamma:
                gram_s = gram(student.lm_head.weight[:n_common])  # of this step's head
            losses = []
            for k, batch in enumerate(micros):
                with run.sync(ddp, last=k == run.accumulation - 1):
                    batch = batch.to(run.device)
                    with run.autocast():
                        z = student.encode_images(batch.pixel_values)  # (n, Np, C)
                        h_s = ddp(batch.input_ids, batch.attention_mask, z)  # (B, T, D_s)
                        with torch.inference_mode():
                            z_t = z if shared else teacher.encode_images(batch.teacher_pixel_values)
                            h_t = teacher(batch.input_ids, batch.attention_mask, z_t)  # (B, T, D_t)

                    # ---- Eq. (7), on the rows that some loss reads; by 1 / n the losses are global means
                    read = batch.response | batch.visual * bool(beta) | batch.prompt * bool(delta)  # (B, T)
                    s = Head(h_s[read].to(run.dtype), student.lm_head.weight)  # N rows
                    t = Head(h_t[read].to(teacher.lm_head.weight.dtype), teacher.lm_head.weight)
                    w_res = batch.response[read] / n.response  # (N,)
                    w_vis = bool(beta) * batch.visual[read] / n.visual
                    w_prompt = batch.prompt[read] / n.prompt
                    l_reg, l_res, l_vis, l_prompt, *g_s = token_losses(s, [
                        (autoregressive_loss, batch.targets[read], w_res, 1.0),
                        (response_kl, t, w_res, alpha),
                        (visual_kl, t, w_vis, beta),
                        (prompt_kl, t, w_prompt, delta),
                    ], gram_s)  # fmt: skip
                    l_rel = h_s.new_zeros(())
                    if args.gamma:
                        per_image = (len(z), n_patches)  # (n, Np)
                        y_s, y_t = (h[batch.visual].unflatten(0, per_image) for h in (h_s, h_t))
                        l_rel = visual_relation(y_s, *g_s, y_t, gram_t, weights=1 / n.images, columns=columns)
                    loss = (
                        dft_objective(l_reg, l_res, l_vis, l_rel, alpha, beta, args.gamma) + delta * l_prompt
                    )
                    loss.backward()
                terms = {"l_reg": l_reg, "l_res": l_res, "l_vis": l_vis, "l_rel": l_rel, "l_prompt": l_prompt}
                losses.append({"loss": loss} | terms)
            norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            if run.sound(step, losses, norm, micros):
                optimizer.step()
            optimizer.zero_grad()
            run.log(step, lr, losses, n.tokens, norm)
        run.finish(student)


if __name__ == "__main__":
    cli(main)
