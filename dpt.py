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

from common import Run, set_lr
from data import Encoder, LlavaData, micro_batches, schedule
from flags import add_flags, add_training_flags, cli, new_parser
from fused import Head, gram, token_losses, visual_relation
from losses import autoregressive_loss, dpt_objective, prompt_kl, response_kl, visual_kl
from model import Llava


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    # fmt: off
    add_flags(parser, "models", [
        ("--vision", str, None, "vision tower of a new student, hub name or folder; KD: SigLIP-so400m-384"),
        ("--llm", str, None, "language model of a new student, hub name or folder; KD: Qwen1.5-0.5B or 1.8B"),
        ("--student", str, None, "LLaVA checkpoint to train, instead of --vision and --llm"),
        ("--teacher", str, None, "LLaVA checkpoint to learn from; None is plain pre-training"),
        ("--teacher_dtype", ("auto", "bf16", "fp32"), "auto", "of the teacher's weights; auto: as --dtype"),
        ("--caption_only", bool, True, "train on image and answer, without the question; as LLaVA-1.5"),
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
    add_training_flags(parser, lr=1e-3, batch=256, source="KD §4.1, 32 a GPU x 8")
    args = parser.parse_args(argv)
    if bool(args.student) == bool(args.vision and args.llm) or bool(args.vision) != bool(args.llm):
        parser.error("give either --vision and --llm, for a new student, or --student")
    if args.teacher and "prompt" in args.targets and args.caption_only:
        parser.error("with --caption_only there are no prompt tokens to distil: add --no-caption_only")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    weights = {"response": args.alpha, "visual": args.beta, "prompt": args.delta}
    targets = args.targets if args.teacher else []
    alpha, beta, delta = (w * (target in targets) for target, w in weights.items())
    columns = args.relation == "columns"
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
                Llava.from_checkpoint(args.teacher, run.dtype_of(args.teacher_dtype))
                .to(run.device)
                .eval()
                .requires_grad_(False)
            )
            student.check_teacher(teacher)
            shared = student.share_encoder(teacher)
        student.requires_grad_(False).multi_modal_projector.requires_grad_(True)
        gram_s = gram_t = None
        if teacher and args.gamma:  # both heads are frozen
            n_common = min(
                len(student.lm_head.weight), len(teacher.lm_head.weight)
            )  # ids that both heads have
            gram_s, gram_t = (gram(m.lm_head.weight[:n_common]) for m in (student, teacher))
        trained = [p for p in student.parameters() if p.requires_grad]
        if args.gradient_checkpointing:
            student.language_model.activation_checkpointing_enable({"use_reentrant": False})
        ddp = run.parallel(student.train())

        # ---- data
        n_patches = student.n_visual_tokens
        encoder = Encoder(student.processor, n_patches, args.max_len, args.caption_only)
        processors = [student.processor] if shared else [student.processor, teacher.processor]
        data = LlavaData(args.data, args.images, encoder, processors, args.skip_bad)
        steps = schedule(data, args)

        # ---- the loop
        optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        first = run.start(
            student,
            optimizer,
            len(steps),
            data,
            f"teacher {args.teacher}" + ", encoder shared" * shared if teacher else "",
        )
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
                        h_s = ddp(batch.input_ids, batch.attention_mask, z)  # (B, T, D_s)
                        if teacher:
                            with torch.inference_mode():
                                z_t = z if shared else teacher.encode_images(batch.teacher_pixel_values)
                                h_t = teacher(batch.input_ids, batch.attention_mask, z_t)  # (B, T, D_t)

                    # ---- Eq. (6), on the rows that some loss reads; by 1 / n the losses are global means
                    read = batch.response | batch.visual * bool(beta) | batch.prompt * bool(delta)  # (B, T)
                    s = Head(h_s[read].to(run.dtype), student.lm_head.weight)  # N rows
                    w_res = batch.response[read] / n.response  # (N,)
                    w_vis = bool(beta) * batch.visual[read] / n.visual
                    w_prompt = batch.prompt[read] / n.prompt
                    ar = (autoregressive_loss, batch.targets[read], w_res, 1.0)
                    if not teacher:  # Eq. (1) alone
                        (loss,) = token_losses(s, [ar])
                        terms = {"l_pt": loss}
                    else:
                        t = Head(h_t[read].to(teacher.lm_head.weight.dtype), teacher.lm_head.weight)
                        l_pt, l_res, l_vis, l_prompt, *g_s = token_losses(s, [
                            ar,
                            (response_kl, t, w_res, alpha),
                            (visual_kl, t, w_vis, beta),
                            (prompt_kl, t, w_prompt, delta),
                        ], gram_s)  # fmt: skip
                        l_rel = h_s.new_zeros(())
                        if args.gamma:
                            per_image = (len(z), n_patches)  # (n, Np)
                            y_s, y_t = (h[batch.visual].unflatten(0, per_image) for h in (h_s, h_t))
                            l_rel = visual_relation(
                                y_s, *g_s, y_t, gram_t, weights=1 / n.images, columns=columns
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
                    loss.backward()
                losses.append({"loss": loss} | terms)
            norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            if run.sound(step, losses, norm, micros):
                optimizer.step()
            optimizer.zero_grad()
            run.log(step, lr, losses, n.tokens, norm)
        run.finish(student)


if __name__ == "__main__":
    cli(main)
