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
    return Llava(
        model.config, SimpleNamespace(tokenizer=SimpleNamespace(pad_token="")), *parts, model.lm_head
    )


def student_config(stage: str, args: argparse.Namespace) -> hf.LlavaConfig:
    """The config of what the stage trains, which d2s makes out of a dense one."""
    path = getattr(args, "student", None) or f"{args.vision}+{args.llm}"
    config = read_config(path)
    is_sparse = config.text_config.model_type == "qwen2_moe"
    require(stage == "pd" or not is_sparse, f"{path} is sparse already: {stage} begins with a dense student")
    if stage not in mod_distill.SPARSE or is_sparse:
        return config
    with torch.device("meta"):
        student = without_numbers(config)
        moe.sparsify(student, args.experts, args.top_k, args.moe_layers, args.renormalise)
    return student.config


class EvenExperts(moe.Experts):
    """Experts that all get equally many tokens: before a run nobody knows how many they will get."""

    def sizes(self, number: Tensor) -> list[int]:
        return [len(piece) for piece in number.tensor_split(self.num_experts)]


class Rows(tuple):
    """Positions (B, T) as indices in the place of a mask, whose values nobody would know."""

    def sum(self) -> int:
        return self[0].numel()


def rows(n: int, columns: range) -> Rows:
    return Rows(torch.cartesian_prod(torch.arange(n), torch.tensor([*columns], dtype=torch.long)).T)


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


def new_student(stage: str, args: argparse.Namespace, config: hf.LlavaConfig) -> Llava:
    """The student with what the stage trains."""
    student, sparse = without_numbers(config).train(), stage in mod_distill.SPARSE
    student.requires_grad_(stage != "dpt" and not sparse).vision_tower.requires_grad_(False)
    student.multi_modal_projector.requires_grad_(True)
    if sparse:
        moe.prepare(student, args.router)
        for part in moe.parts(student, moe.Router) + moe.parts(student, moe.Experts):
            part.requires_grad_(True)
        for experts in moe.parts(student, moe.Experts):
            experts.__class__ = EvenExperts
    if args.gradient_checkpointing:
        student.language_model.activation_checkpointing_enable({"use_reentrant": False})
    return student


def looks(config: hf.LlavaConfig) -> tuple:
    """What two models must have in common to turn an image into the same features, apart from the weights."""
    names = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "image_size",
        "patch_size",
    )
    vision, layer = config.vision_config, config.vision_feature_layer
    return layer, config.vision_feature_select_strategy, *(getattr(vision, name) for name in names)


def new_teacher(args: argparse.Namespace, student: Llava, dtype: torch.dtype) -> Llava | None:
    """The teacher; its tower is left out if it looks like the student's, whose features then serve both."""
    if not getattr(args, "teacher", None):
        return None
    teacher = without_numbers(read_config(args.teacher), precision(args.teacher_dtype, dtype))
    n, see = zip(*((m.n_visual_tokens, looks(m.config)) for m in (student, teacher)))
    require(n[0] == n[1], f"an image is {n[0]} tokens for the student and {n[1]} for the teacher")
    if see[0] == see[1]:
        teacher.vision_tower = None
    return teacher.eval().requires_grad_(False)


def passes(
    student: Llava, teacher: Llava | None, ids: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The features of n images, and hidden states of student and teacher, as in the stages."""
    vision, mask, answers = student.config.vision_config, torch.ones_like(ids), len(ids) // n
    pixels = torch.empty(n, 3, vision.image_size, vision.image_size)
    z = student.encode_images(pixels).repeat(answers, 1, 1)
    moe.route(student, mask)
    h_s = student(ids, mask, z)
    with torch.no_grad():
        z_t = teacher.encode_images(pixels).repeat(answers, 1, 1) if teacher and teacher.vision_tower else z
        return z, h_s, teacher(ids, mask, z_t) if teacher else None


def losses_of(
    args: argparse.Namespace,
    student: Llava,
    teacher: Llava | None,
    z: Tensor,
    h_s: Tensor,
    h_t: Tensor | None,
) -> Tensor:
    """The stage's losses. All text counts as answer; the preference losses as Eq. (1) of both answers."""

    def objective(response, visual):
        loss = autoregressive_loss(response.log_s, response.y)
        if teacher:
            loss = loss + response_kl(response.log_s, response.log_t)
            loss = loss + visual_kl(visual.log_s, visual.log_t)
        return loss, {}

    (b, n_tokens), n_visual = h_s.shape[:2], student.n_visual_tokens
    w_s, w_t = student.lm_head.weight, teacher.lm_head.weight if teacher else None
    visual = range(n_visual if "visual" in getattr(args, "targets", []) else 0)
    kinds = [rows(b, range(n_visual - 1, n_tokens - 1)), rows(b, visual)]
    y = torch.zeros(b, n_tokens, dtype=torch.long)
    loss, _ = chunks.over_rows(objective, kinds, y, (h_s, w_s), (h_t, w_t) if teacher else None)
    if getattr(args, "gamma", 0):
        y_s, y_t = (h[rows(b, range(n_visual))].unflatten(0, z.shape[:2]) for h in (h_s, h_t))
        r_s, r_t = (self_correlation(h, chunks.gram(*w)) for h, *w in ((y_s, w_s, w_t), (y_t, w_t, w_s)))
        loss = loss + relation_loss(r_s, r_t)
    routers = moe.parts(student, moe.Router)
    return (
        loss + moe.balance(student, torch.ones(len(routers), routers[0].num_experts), 1) if routers else loss
    )


def step(stage: str, args: argparse.Namespace, tokens: int = 0, only_kept: bool = False) -> dict:
    """Bytes by part, FLOPs of a sample and numbers of parameters, for samples of an image and `tokens` tokens
    in all, 0: of the average length. With `only_kept`, only the bytes kept for the backward pass.
    """
    on_gpu, config, b = args.gpus > 0, student_config(stage, args), args.micro_batch
    dtype = precision(args.dtype, torch.bfloat16 if on_gpu else torch.float32)
    as_on_gpu = {"BLOCK": chunks.CHUNK, "_logits": lambda h, w, out: torch.mm(h, w.T, out=out[: len(h)])}
    device = mock.patch.multiple(chunks, **as_on_gpu) if on_gpu else contextlib.nullcontext()
    gc.freeze()  # the ledger's collections need not look at what is there already
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        student = new_student(stage, args, config)
        teacher, n_visual = new_teacher(args, student, dtype), student.n_visual_tokens
        tokens = tokens or n_visual + args.text
        require(tokens > n_visual, f"samples of {tokens} tokens have no room for an image of {n_visual}")
        trained = [p for p in student.parameters() if p.requires_grad]
        stays = args.gpus > 1 or args.global_batch > b  # gradients, from one backward pass to the next
        for p in trained if stays else []:
            p.grad = torch.empty_like(p)
        models = [m for m in (student, teacher) if m]
        known = [t for m in models for t in (*m.parameters(), *m.buffers())] + [
            p.grad for p in trained if stays
        ]
        with Ledger(known) as ledger, count_flops() as counter:
            ids = torch.zeros(b * (1 + (stage == "pd")), tokens, dtype=torch.long)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                z, h_s, h_t = passes(student, teacher, ids, b)
            kept, peaks = ledger.live, [ledger.highest()]
            if only_kept:
                return {"kept": kept}
            twice = counter.get_total_flops() if stage in mod_distill.SPARSE and args.global_batch > b else 0
            loss = losses_of(args, student, teacher, z, h_s.to(dtype), h_t)
            peaks.append(ledger.highest())
            loss.backward()
            peaks.append(ledger.highest())
    n_student, n_teacher = (sum(p.numel() for p in m.parameters()) if m else 0 for m in (student, teacher))
    n_trained = sum(p.numel() for p in trained)
    share = args.gpus if getattr(args, "shard", None) == "optimizer" and args.gpus else 1
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
    need, longest = step(args.stage, args), step(args.stage, args, args.max_len)["together"]
    other = argparse.Namespace(**vars(args) | {"gradient_checkpointing": not args.gradient_checkpointing})
    kept = step(args.stage, other, only_kept=True)["kept"] / GIB
    without = "without" if args.gradient_checkpointing else "with"
    where = f"each of {args.gpus} GPUs" if args.gpus else "the CPU"
    print(f"{args.stage} on {where}: {args.micro_batch} samples of {need['tokens']} tokens at a time")
    billions = (f"{name} {need[f'n_{name}'] / 1e9:.2f}" for name in ("student", "trained", "teacher"))
    print(f"{', '.join(billions)} billion parameters; {str(need['dtype'])[6:]} arithmetic\n")
    for text, n_bytes in (
        ("the student's weights", need["student"]), ("the teacher's weights", need["teacher"]),
        ("AdamW's state", need["optimizer"]), ("gradients, if they stay between passes", need["gradients"]),
        ("activations for the backward pass", need["kept"]),
        (f"   ({kept:.2f} {without} --gradient_checkpointing)", None),
        ("and beyond these, the largest of", None), ("   forward passes", need["forward"]),
        ("   chunks of the losses", need["losses"]), ("   backward pass", need["backward"]),
        ("and, set aside, CUDA, nccl and fragments", SET_ASIDE * (args.gpus > 0)),
        ("together", need["together"]), (f"together with samples of --max_len {args.max_len}", longest),
    ):  # fmt: skip
        print(f"{text:44s}" + (f" {n_bytes / GIB:8.2f} GiB" if n_bytes is not None else ""))
    limit, fits = args.memory * GIB, longest <= args.memory * GIB
    verdict = "the longest samples do not fit" if need["together"] <= limit else "it does not fit"
    print(f"\n{'it fits' if fits else verdict} into {args.memory:g} GiB")
    for flags, smaller in () if fits else changes(args):
        then = step(args.stage, smaller, args.max_len)["together"]
        print(f"   with {flags} {then / GIB:.2f} GiB" + ": fits" * (then <= limit), flush=True)
        if then <= limit:
            break
    samples = args.samples or (558_000 if args.stage == "dpt" else 665_000)
    hours = samples * args.epochs * need["flops"] / (max(args.gpus, 1) * args.tflops * 1e12) / 3600
    print(f"{need['flops'] / 1e12:.2f} TFLOP a sample: {samples:,} samples, {args.epochs} time(s), take "
          f"{hours:.1f} hours at {args.tflops:g} TFLOP/s a GPU")  # fmt: skip
    return need | {"longest": longest, "hours": hours, "fits": fits}


if __name__ == "__main__":
    cli(main)
