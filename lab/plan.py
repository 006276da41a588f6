"""What a stage will need: memory of a GPU by part, arithmetic, hours. Nothing is loaded but configs.

    python -m lab.plan dft --student out/sft --teacher out/teacher --gpus 8 --memory 80

First the stage (dpt, sft, dft, d2d, d2s, pd), then its own flags as they will be given to it, and those
below. A model is a hub name or a folder, in which config.json is enough; one that does not exist yet is
written VISION+LLM, as google/siglip-so400m-patch14-384+Qwen/Qwen1.5-4B (for pd: what d2s makes of it).

One step of the stage runs on tensors that have a shape and no numbers (torch's FakeTensorMode), and a ledger
notes what is allocated when. So no formula is written here: the models and the losses are the stage's own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import transformers as hf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

import dft
import dpt
import mod_distill
import moe
import sft
from lab.steps import count_flops
from losses import autoregressive_loss, relation_loss, response_kl, self_correlation, visual_kl
from model import Llava
from support import chunks
from support.checks import loading
from support.flags import add_flags, cli, natural, new_parser, number, positive, require, to_argv
from support.run import precision

STAGES = {"dpt": dpt, "sft": sft, "dft": dft, "d2d": mod_distill, "d2s": mod_distill, "pd": mod_distill}
GIB = 2**30
SET_ASIDE = 2 * GIB  # of a GPU: CUDA's own, nccl's buffers, fragments


def read_config(path: str) -> hf.LlavaConfig:
    """The config of a LLaVA checkpoint, or of a new model VISION+LLM, as `Llava.from_parts` would make it."""
    with loading(f"the config of {path}"):
        configs = [hf.AutoConfig.from_pretrained(part) for part in path.split("+")]
    right = [c.model_type for c in configs] == ["llava"] or len(configs) == 2
    require(right, f"{path} is a '{configs[0].model_type}' model: give a LLaVA checkpoint or VISION+LLM")
    if len(configs) == 1:
        return configs[0]
    vision, text = getattr(configs[0], "vision_config", configs[0]), configs[1]
    vision.vision_use_head = False
    strategy = "default" if vision.model_type == "clip_vision_model" else "full"
    return hf.LlavaConfig(vision_config=vision, text_config=text, vision_feature_select_strategy=strategy,
                          tie_word_embeddings=text.tie_word_embeddings)  # fmt: skip


def without_numbers(config: hf.LlavaConfig, dtype: torch.dtype = torch.float32) -> Llava:
    with no_init_weights():
        model = hf.LlavaForConditionalGeneration._from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()
    parts = model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token=""))
    return Llava(model.config, processor, *parts, model.lm_head)


def student_config(args: argparse.Namespace) -> hf.LlavaConfig:
    """The config of what the stage trains, which d2s makes out of a dense one."""
    path = getattr(args, "student", None) or f"{args.vision}+{args.llm}"
    config = read_config(path)
    dense = config.text_config.model_type != "qwen2_moe"
    require(dense or args.stage == "pd", f"{path} is sparse: {args.stage} begins with a dense student")
    if args.stage in mod_distill.SPARSE and dense:
        with torch.device("meta"):
            student = without_numbers(config)
            moe.sparsify(student, args.experts, args.top_k, args.moe_layers, args.renormalise)
        config = student.config
    return config


class EvenExperts(moe.Experts):
    """Experts that all get equally many tokens: before a run nobody knows how many they will get."""

    def sizes(self, number: Tensor) -> list[int]:
        return [len(piece) for piece in number.tensor_split(self.num_experts)]


class Rows(tuple):
    """Indices of positions (B, T), in the place of a mask whose values nobody knows."""

    def sum(self) -> int:
        return self[0].numel()


class Ledger(TorchDispatchMode):
    """The bytes of all tensors that are alive, those in `known` apart, and the most there were."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = self.peak = self.sure = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.grain = max(1 << 22, sum(storage.nbytes() for storage in self.seen) // 100)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:  # asked for a value: yes, or 1
            return 1
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if storage not in self.seen:
                self.seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
                if self.live > self.sure + self.grain:
                    gc.collect()  # these tensors, unlike real ones, end up in reference cycles
                    self.sure = self.live
                self.peak = max(self.peak, self.live)
        return out

    def free(self, n_bytes: int) -> None:
        self.live -= n_bytes

    def highest(self) -> int:
        """The most there was since this was asked last."""
        peak, self.peak, self.sure = self.peak, self.live, self.live
        return peak


def models(
    args: argparse.Namespace, config: hf.LlavaConfig, dtype: torch.dtype
) -> tuple[Llava, Llava | None]:
    """Student and teacher as the stages have them: what is trained, and one tower where both look alike."""
    student, sparse = without_numbers(config).train(), args.stage in mod_distill.SPARSE
    student.requires_grad_(args.stage != "dpt" and not sparse).vision_tower.requires_grad_(False)
    student.multi_modal_projector.requires_grad_(True)
    if sparse:
        moe.prepare(student, args.router)
        for part in moe.parts(student, moe.Router) + moe.parts(student, moe.Experts):
            part.requires_grad_(True)
        for experts in moe.parts(student, moe.Experts):
            experts.__class__ = EvenExperts
    if args.gradient_checkpointing:
        student.language_model.activation_checkpointing_enable({"use_reentrant": False})
    if not getattr(args, "teacher", None):
        return student, None
    teacher = without_numbers(read_config(args.teacher), precision(args.teacher_dtype, dtype))
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
    looks = [[c.vision_feature_layer, *(getattr(c.vision_config, name) for name in names)]
             for c in (config, teacher.config)]  # fmt: skip
    if looks[0] == looks[1]:
        teacher.vision_tower = None
    return student, teacher.eval().requires_grad_(False)


def step(args: argparse.Namespace, tokens: int = 0, only_kept: bool = False) -> dict:
    """Bytes by part, FLOPs of a sample and numbers of parameters, for samples of an image and `tokens` tokens
    in all, 0: of the average length. With `only_kept`, only the bytes kept for the backward pass.

    All text counts as answer, and the preference losses as Eq. (1) of both answers.
    """
    on_gpu, config, b = args.gpus > 0, student_config(args), args.micro_batch
    dtype = precision(args.dtype, torch.bfloat16 if on_gpu else torch.float32)
    as_on_gpu = {"BLOCK": chunks.CHUNK, "_logits": lambda h, w, out: torch.mm(h, w.T, out=out[: len(h)])}
    device = mock.patch.multiple(chunks, **as_on_gpu) if on_gpu else contextlib.nullcontext()
    gc.freeze()  # the ledger's collections need not look at what is there already
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        student, teacher = models(args, config, dtype)
        n_visual, pairs = student.n_visual_tokens, 2 if args.stage == "pd" else 1
        tokens = tokens or n_visual + args.text
        require(tokens > n_visual, f"samples of {tokens} tokens have no room for an image of {n_visual}")
        trained = [p for p in student.parameters() if p.requires_grad]
        stays = args.gpus > 1 or args.global_batch > b  # gradients, from one backward pass to the next
        for p in trained if stays else []:
            p.grad = torch.empty_like(p)
        known = [t for m in (student, teacher) if m for t in (*m.parameters(), *m.buffers())]
        with Ledger(known + [p.grad for p in trained if stays]) as ledger, count_flops() as counter:
            # ---- the forward passes
            pixels = torch.empty(b, 3, *[config.vision_config.image_size] * 2)
            ids, answers = torch.zeros(b * pairs, tokens, dtype=torch.long), (pairs, 1, 1)
            mask = torch.ones_like(ids)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                z = student.encode_images(pixels).repeat(answers)
                moe.route(student, mask)
                h_s, h_t = student(ids, mask, z).to(dtype), None
                with torch.no_grad():
                    if teacher:
                        z_t = teacher.encode_images(pixels).repeat(answers) if teacher.vision_tower else z
                        h_t = teacher(ids, mask, z_t)
            kept, peaks, forward = ledger.live, [ledger.highest()], counter.get_total_flops()
            if only_kept:
                return {"kept": kept}

            # ---- the losses
            def objective(response, visual):
                loss = autoregressive_loss(response.log_s, response.y)
                if teacher:
                    loss = loss + response_kl(response.log_s, response.log_t)
                    loss = loss + visual_kl(visual.log_s, visual.log_t)
                return loss, {}

            def rows(start: int, stop: int) -> Rows:
                return Rows(torch.cartesian_prod(torch.arange(len(ids)), torch.arange(start, stop)).T)

            w_s, w_t = student.lm_head.weight, teacher.lm_head.weight if teacher else None
            visual = rows(0, n_visual if "visual" in getattr(args, "targets", []) else 0)
            kinds, t = [rows(n_visual - 1, tokens - 1), visual], (h_t, w_t) if teacher else None
            loss, _ = chunks.over_rows(objective, kinds, ids, (h_s, w_s), t)
            if getattr(args, "gamma", 0):
                y_s, y_t = (h[rows(0, n_visual)].unflatten(0, z.shape[:2]) for h in (h_s, h_t))
                r_s = self_correlation(y_s, chunks.gram(w_s, w_t))
                loss = loss + relation_loss(r_s, self_correlation(y_t, chunks.gram(w_t, w_s)))
            if routers := moe.parts(student, moe.Router):
                load = torch.ones(len(routers), routers[0].num_experts)
                loss = loss + moe.balance(student, load, ids.numel())
            peaks.append(ledger.highest())
            loss.backward()
            peaks.append(ledger.highest())
    twice = forward if routers and args.global_batch > b else 0  # these losses look at the whole step first
    n_student, n_teacher = (sum(p.numel() for p in m.parameters()) if m else 0 for m in (student, teacher))
    n_trained = sum(p.numel() for p in trained)
    share = args.gpus if getattr(args, "shard", None) == "optimizer" and on_gpu else 1
    held = {"student": 4 * n_student, "gradients": 4 * n_trained * stays, "optimizer": 8 * n_trained / share}
    held["teacher"] = sum(p.nbytes for p in teacher.parameters()) if teacher else 0
    return held | {
        "kept": kept, **{name: peak - kept for name, peak in zip(("forward", "losses", "backward"), peaks)},
        "together": sum(held.values()) + max(peaks) + SET_ASIDE * on_gpu, "tokens": tokens, "dtype": dtype,
        "flops": (counter.get_total_flops() + twice) / b,
        "n_student": n_student, "n_trained": n_trained, "n_teacher": n_teacher,
    }  # fmt: skip


def changes(args: argparse.Namespace) -> Iterator[tuple[str, argparse.Namespace]]:
    """What makes a run smaller, one flag more each time: the flags changed so far, and all arguments."""
    halves = [("micro_batch", args.micro_batch >> k) for k in range(1, args.micro_batch.bit_length())]
    sharding, changed = [("shard", "optimizer")] if args.gpus > 1 else [], {}
    for name, value in [("gradient_checkpointing", True), *sharding, *halves]:
        if getattr(args, name, None) != value:
            changed[name] = value
            yield " ".join(to_argv(**changed)), argparse.Namespace(**vars(args) | changed)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("stage", choices=tuple(STAGES), help="the stage, before its own flags")
    add_flags(parser, "the plan", [
        ("--gpus", natural, 8, "GPUs of the run; 0: on the CPU"),
        ("--memory", number(float, 0), 80.0, "GiB of one GPU"),
        ("--tflops", number(float, 1e-3), 150.0, "TFLOP/s that a GPU reaches; half of an A100's peak is 156"),
        ("--text", positive, 100, "text tokens of an average sample"),
        ("--samples", positive, None, "samples of the data; without it as in the papers, 558k or 665k"),
    ])  # fmt: skip
    args, rest = parser.parse_known_args(argv)
    needless = ["--data", "-", "--out", "-"] + ["--step", args.stage] * (STAGES[args.stage] is mod_distill)
    return argparse.Namespace(**vars(STAGES[args.stage].parse_args([*needless, *rest])) | vars(args))


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    need, longest, limit = step(args), step(args, args.max_len)["together"], args.memory * GIB
    other = argparse.Namespace(**vars(args) | {"gradient_checkpointing": not args.gradient_checkpointing})
    flag = f"with{'out' * args.gradient_checkpointing} --gradient_checkpointing"
    where = f"each of {args.gpus} GPUs" if args.gpus else "the CPU"
    print(f"{args.stage} on {where}: {args.micro_batch} samples of {need['tokens']} tokens at a time")
    billions = (f"{name} {need[f'n_{name}'] / 1e9:.2f}" for name in ("student", "trained", "teacher"))
    print(f"{', '.join(billions)} billion parameters; {str(need['dtype'])[6:]} arithmetic\n")
    for text, n_bytes in {
        "the student's weights": need["student"], "the teacher's weights": need["teacher"],
        "AdamW's state": need["optimizer"], "gradients that stay between passes": need["gradients"],
        "activations kept for the backward pass": need["kept"],
        f"   ({flag})": step(other, only_kept=True)["kept"],
        "CUDA, nccl and fragments (set aside)": SET_ASIDE * (args.gpus > 0),
        "the largest of: forward passes": need["forward"], "   chunks of the losses": need["losses"],
        "   backward pass": need["backward"], "together": need["together"],
        f"together, samples of --max_len {args.max_len}": longest,
    }.items():  # fmt: skip
        print(f"{text:44s} {n_bytes / GIB:8.2f} GiB")
    verdict = "the longest samples do not fit" if need["together"] <= limit else "it does not fit"
    print(f"\n{'it fits' if longest <= limit else verdict} into {args.memory:g} GiB")
    for flags, smaller in changes(args) if longest > limit else ():
        then = step(smaller, args.max_len)["together"]
        print(f"   with {flags} {then / GIB:.2f} GiB" + ": fits" * (then <= limit), flush=True)
        if then <= limit:
            break
    samples = args.samples or (558_000 if args.stage == "dpt" else 665_000)
    hours = samples * args.epochs * need["flops"] / (max(args.gpus, 1) * args.tflops * 1e12) / 3600
    print(f"{need['flops'] / 1e12:.2f} TFLOP a sample: {samples:,} samples, {args.epochs} time(s), take "
          f"{hours:.1f} hours at {args.tflops:g} TFLOP/s a GPU")  # fmt: skip
    return need | {"longest": longest, "hours": hours, "fits": longest <= limit}


if __name__ == "__main__":
    cli(main)
