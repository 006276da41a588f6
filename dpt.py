"""Distilled Pre-Training: the first stage of LLaVA-KD (§3.3.2, Eq. 6, arXiv 2410.16236v1).

Trained: the projector of the student. Frozen: everything else, and the whole teacher.
Without --teacher it is plain Pre-Training by Eq. 1: how the teacher itself starts (§3.2), and LLaVA-MoD's
initialisation (MoD Eq. 5).
Departures: the sums over tokens in Eqs. 2-3 are means over the rows of the global batch.

    torchrun --nproc_per_node 8 dpt.py --vision google/siglip-so400m-patch14-384 --llm Qwen/Qwen1.5-0.5B \
        --teacher TEACHER --data blip_laion_cc_sbu_558k.json --images IMAGES --out out/dpt
"""

import argparse

import torch
from torch.nn.parallel import DistributedDataParallel

from common import Run, add_flags, add_training_flags, cli, new_parser, set_lr
from data import Encoder, LlavaData, micro_batches, schedule
from losses import (
    Head,
    autoregressive_loss,
    dpt_objective,
    prompt_kl,
    response_kl,
    token_losses,
    visual_kl,
    visual_relation,
)
from model import Llava


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    # fmt: off
    add_flags(parser, "models", [
        ("--vision", str, None, "vision tower of a new student, hub name or folder; KD: SigLIP-so400m-384"),
        ("--llm", str, None, "language model of a new student, hub name or folder; KD: Qwen1.5-0.5B or 1.8B"),
        ("--student", str, None, "LLaVA checkpoint to train, instead of --vision and --llm"),
        ("--teacher", str, None, "LLaVA checkpoint to learn from; None is plain pre-training"),
        ("--caption_only", bool, True, "train on image and answer, without the question; as LLaVA-1.5"),
    ])
    add_flags(parser, "objective", [
        ("--targets", ["response", "visual", "prompt"], ["response", "visual"],
         "rows whose distribution is distilled, MDist; KD Table 4"),
        ("--alpha", float, 1.0, "weight of L_res; KD §4.1"),
        ("--beta", float, 1.0, "weight of L_vis; KD §4.1"),
        ("--gamma", float, 0.5, "weight of L_rel, RDist, 0: off; KD §4.1"),
        ("--delta", float, 1.0, "weight of the prompt's KL, if it is a target"),
    ])
    # fmt: on
    add_training_flags(parser, lr=1e-3, batch=256, source="KD §4.1")
    args = parser.parse_args(argv)
    if bool(args.student) == bool(args.vision and args.llm) or bool(args.vision) != bool(args.llm):
        parser.error("give either --vision and --llm, for a new student, or --student")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    weights = {"response": args.alpha, "visual": args.beta, "prompt": args.delta}
    targets = args.targets if args.teacher else []
    alpha, beta, delta = (w * (target in targets) for target, w in weights.items())
    with Run(args, "dpt") as run:
        if run.finished:
            return

        # ---- models, and what is trained
        if args.student:
            student = Llava.from_checkpoint(args.student).to(run.device)
        else:
            student = Llava.from_parts(args.vision, args.llm).to(run.device)
        teacher, shared = None, True
        if args.teacher:
            teacher = (
                Llava.from_checkpoint(args.teacher, run.dtype).to(run.device).eval().requires_grad_(False)
            )
            student.check_teacher(teacher)
            shared = student.share_encoder(teacher)
        student.requires_grad_(False).multi_modal_projector.requires_grad_(True)
        trained = [p for p in student.parameters() if p.requires_grad]
        if args.gradient_checkpointing:
            student.language_model.activation_checkpointing_enable({"use_reentrant": False})
        ddp = DistributedDataParallel(
            student.train(), forward_sync_buffers=False, gradient_as_bucket_view=True
        )

        # ---- data
        encoder = Encoder(student.processor, student.n_visual_tokens, args.max_len, args.caption_only)
        processors = [student.processor] if shared else [student.processor, teacher.processor]
        data = LlavaData(args.data, args.images, encoder, processors, args.skip_bad)
        steps = schedule(data, args)
        batches = micro_batches(data, steps, run)

        # ---- the loop
        optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
        run.start(
            student,
            len(steps),
            data,
            f"teacher {args.teacher}" + ", encoder shared" * bool(teacher and shared),
        )
        for step in range(len(steps)):
            lr = set_lr(optimizer, step, len(steps), args.lr, args.warmup)
            micros = [next(batches) for _ in range(run.accumulation)]
            n = run.count(micros, student.n_visual_tokens)  # rows in the global batch
            losses = []
            for k, batch in enumerate(micros):
                with run.sync(ddp, last=k == run.accumulation - 1):
                    batch = batch.to(run.device)
                    with run.autocast():
                        z = student.encode_images(batch.pixel_values)  # (n, Np, C)
                        h_s = ddp(batch.input_ids, batch.attention_mask, z)  # (B, T, D_s)
                        if teacher:
                            with torch.no_grad():
                                z_t = z if shared else teacher.encode_images(batch.teacher_pixel_values)
                                h_t = teacher(batch.input_ids, batch.attention_mask, z_t)  # (B, T, D_t)

                    # ---- Eq. (6), on the rows that some loss reads; without a teacher Eq. (1)
                    read = batch.response | batch.visual * bool(beta) | batch.prompt * bool(delta)  # (B, T)
                    s = Head(h_s[read].to(run.dtype), student.lm_head.weight)
                    w_res = batch.response[read] / max(n.response, 1)  # (N,) means over the global batch
                    ar = (autoregressive_loss, batch.targets[read], w_res)
                    if not teacher:
                        (loss,) = token_losses(s, [ar])
                        terms = {"l_pt": loss}
                    else:
                        t = Head(h_t[read].to(run.dtype), teacher.lm_head.weight)
                        l_pt, l_res, l_vis, l_prompt = token_losses(s, [
                            ar,
                            (response_kl, t, w_res),
                            (visual_kl, t, batch.visual[read] / max(n.visual, 1)),
                            (prompt_kl, t, batch.prompt[read] / max(n.prompt, 1)),
                        ])  # fmt: skip
                        l_rel = h_s.new_zeros(())
                        if args.gamma:
                            per_image = (len(z), student.n_visual_tokens)  # (n, Np)
                            l_rel = visual_relation(
                                Head(h_s[batch.visual].unflatten(0, per_image), student.lm_head.weight),
                                Head(h_t[batch.visual].unflatten(0, per_image), teacher.lm_head.weight),
                                weights=1 / max(n.images, 1),
                            )
                        loss = (
                            dpt_objective(l_pt, l_res, l_vis, l_rel, alpha, beta, args.gamma)
                            + delta * l_prompt
                        )
                        terms = {
                            "l_pt": l_pt,
                            "l_res": l_res,
                            "l_vis": l_vis,
                            "l_rel": l_rel,
                            "l_prompt": l_prompt,
                        }
                    (run.world * loss).backward()  # DDP averages over ranks; the weights above already did
                losses.append({"loss": loss} | terms)
            norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.log(step, lr, losses, n.tokens, norm)
        run.finish(student)


if __name__ == "__main__":
    cli(main)
