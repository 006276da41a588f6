"""Benchmarks: the losses at the paper's shapes, a whole DFT step, and a step at the paper's own model sizes.

    python bench.py losses     this project, two ways on full logits, and the matrix products alone
    python bench.py step       one DFT step through dft.py against a plain one with stock transformers
    python bench.py paper      one DFT step with a 4B teacher and a 0.5B student through dft.py, part by part

Every measurement is a process of its own. Times are medians; memory is the peak of resident memory beyond
weights, gradients, optimizer state and inputs (Linux). Random weights: nothing is downloaded. JSON lines end
the output.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from common import InputError, add_flags, cli, new_parser, positive
from fused import Head, gram, token_losses, visual_relation
from losses import autoregressive_loss, response_kl, visual_kl

N_VISUAL, N_TEXT, V, D_S, D_T = 729, 100, 151_936, 1024, 2560  # KD §4.1: SigLIP-384, Qwen1.5 0.5B and 4B
ALPHA, BETA, GAMMA = 1.0, 1.0, 0.5


# ---------------------------------------------------------------------------------- measuring


def memory(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(run: Callable[[], None], repeats: int) -> dict:
    """Median seconds of `run()` after one call to warm up, and the peak MiB of the next one."""
    run()
    fused.release_buffers()
    before = memory("VmRSS")
    forget_peak()
    run()
    peak = memory("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "MiB": peak}


def in_own_process(*arguments: str) -> dict:
    """Run `python bench.py child ...` and read the JSON on its last line."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(command)} failed (exit code {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    name = cpu[0] if cpu else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def show(rows: list[tuple[str, dict]], columns: list[str]) -> None:
    print(f"| {'what':38s} | " + " | ".join(f"{c:>8s}" for c in columns) + " |")
    print("|" + "-" * 40 + "|" + "|".join("-" * 9 + ":" for _ in columns) + "|")
    for name, row in rows:
        print(f"| {name:38s} | " + " | ".join(f"{row[c]:8.2f}" for c in columns) + " |")


# ---------------------------------------------------------------------------------- the losses


def inputs(dtype: torch.dtype, trained: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    n = N_VISUAL + N_TEXT
    x = {"h_s": torch.randn(n, D_S).to(dtype), "w_s": torch.randn(V, D_S, dtype=dtype).mul_(0.05)}
    x |= {"h_t": torch.randn(n, D_T).to(dtype), "w_t": torch.randn(V, D_T, dtype=dtype).mul_(0.03)}
    x["h_s"].requires_grad_()
    x["w_s"].requires_grad_(trained)
    if not trained:
        x["gram_s"] = gram(x["w_s"])
    return x | {
        "gram_t": gram(x["w_t"]),
        "ids": torch.randint(0, V, (N_TEXT,)),
    }  # of frozen heads: once in a run


def published(x: dict[str, Tensor]) -> Tensor:
    """Full logits in the style of released distillation code (LLaVA-MoD's among others).

    Cross-entropy and probabilities of all rows, in fp32, masked afterwards; the "KL" is a cross-entropy,
    whose gradient is the KL's. Relation matrices from the logits.
    """
    y_s, y_t = (x["h_s"] @ x["w_s"].T).float(), (x["h_t"] @ x["w_t"].T).float()
    is_text = torch.arange(len(y_s)) >= N_VISUAL
    labels = torch.full((len(y_s),), -100).masked_scatter(is_text, x["ids"])
    loss = F.cross_entropy(y_s, labels)
    p_t, infinite = F.softmax(y_t, dim=-1, dtype=torch.float32), torch.isinf(y_s)
    log_s = F.log_softmax(y_s, dim=-1, dtype=torch.float32)
    rows = torch.masked_fill(p_t * log_s, infinite, 0).sum(-1)
    for weight, mask in ((ALPHA, is_text), (BETA, ~is_text)):
        loss = loss - weight * (rows * mask).sum() / mask.sum()
    r_s, r_t = (y[:N_VISUAL] @ y[:N_VISUAL].T for y in (y_s, y_t))
    return loss + GAMMA * (1 - F.cosine_similarity(r_s.flatten(), r_t.flatten(), dim=0))


def careful(x: dict[str, Tensor]) -> Tensor:
    """Full logits, but one log-softmax for all losses, no autograd for the teacher, nothing kept in vain."""
    y_s = (x["h_s"] @ x["w_s"].T).float()
    with torch.no_grad():
        y_t = (x["h_t"] @ x["w_t"].T).float()
        r_t = y_t[:N_VISUAL] @ y_t[:N_VISUAL].T
        log_t = y_t.log_softmax(-1)
        del y_t
    r_s = y_s[:N_VISUAL] @ y_s[:N_VISUAL].T
    log_s = y_s.log_softmax(-1)
    del y_s
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    loss = F.nll_loss(log_s[N_VISUAL:], x["ids"]) + ALPHA * kl[N_VISUAL:].mean() + BETA * kl[:N_VISUAL].mean()
    return loss + GAMMA * (1 - F.cosine_similarity(r_s.flatten(), r_t.flatten(), dim=0))


def ours(x: dict[str, Tensor]) -> Tensor:
    n = N_VISUAL + N_TEXT
    gram_s = gram(x["w_s"]) if x["w_s"].requires_grad else x["gram_s"]
    is_text = torch.arange(n) >= N_VISUAL
    ids = torch.full((n,), -100).masked_scatter(is_text, x["ids"])
    t, w_res, w_vis = Head(x["h_t"], x["w_t"]), is_text / N_TEXT, ~is_text / N_VISUAL
    ar, res, vis, g_s = token_losses(Head(x["h_s"], x["w_s"]), [
        (autoregressive_loss, ids, w_res, 1.0), (response_kl, t, w_res, ALPHA), (visual_kl, t, w_vis, BETA)
    ], gram_s)  # fmt: skip
    relation = visual_relation(x["h_s"][None, :N_VISUAL], g_s, x["h_t"][None, :N_VISUAL], x["gram_t"])
    return ar + ALPHA * res + BETA * vis + GAMMA * relation


class Floor:
    """The matrix products that the losses need and nothing else, unchunked, into memory allocated before."""

    def __init__(self, x: dict[str, Tensor]):
        self.x, n = x, N_VISUAL + N_TEXT
        self.z = torch.empty(n, V, dtype=x["w_s"].dtype)
        self.d_h = torch.empty(n, D_S, dtype=x["w_s"].dtype)
        if x["w_s"].requires_grad:
            self.d_w, self.g = torch.empty(V, D_S), torch.empty(D_S, D_S)

    @torch.no_grad()
    def __call__(self) -> None:
        x = self.x
        torch.mm(x["h_t"], x["w_t"].T, out=self.z)
        torch.mm(x["h_s"], x["w_s"].T, out=self.z)
        torch.mm(self.z, x["w_s"], out=self.d_h)
        if x["w_s"].requires_grad:
            torch.mm(self.z.T, x["h_s"], out=self.d_w)
            for i in range(0, D_S, 256):  # W^T W is symmetric: the upper block triangle will do
                torch.mm(x["w_s"][:, i : i + 256].T, x["w_s"][:, i:], out=self.g[i : i + 256, i:])
            self.d_w.addmm_(x["w_s"], self.g)


def losses_child(how: str, dtype: str, head: str, repeats: int) -> dict:
    x = inputs({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], head == "trained")
    if how == "floor":
        return measure(Floor(x), repeats)
    value = []

    def run() -> None:
        loss = {"published": published, "careful": careful, "ours": ours}[how](x)
        loss.backward()
        value[:] = [loss.item(), x["h_s"].grad.float().norm().item()]
        x["h_s"].grad = x["w_s"].grad = None

    return measure(run, repeats) | {"loss": value[0], "norm": value[1]}


def bench_losses(repeats: int) -> list[dict]:
    lines = []
    for dtype, head in (("fp32", "frozen"), ("fp32", "trained"), ("bf16", "frozen")):
        rows = {how: in_own_process("losses-child", how, dtype, head, repeats)
                for how in ("published", "careful", "ours", "floor")}  # fmt: skip
        for other, key in (("careful", "loss"), ("careful", "norm"), ("published", "norm")):
            a, b = rows["ours"][key], rows[other][key]
            if abs(a - b) > (1e-4 if dtype == "fp32" else 3e-2) * abs(b):
                raise InputError(
                    f"they do not compute the same: {key} {a} against {other} {b} ({dtype}, {head})"
                )
        print(f"\nlosses, {dtype}, head {head}")
        names = {"published": "published style, full logits", "careful": "full logits, carefully",
                 "ours": "this project", "floor": "the matrix products alone"}  # fmt: skip
        show([(names[how], row) for how, row in rows.items()], ["seconds", "MiB"])
        mine, theirs, floor = rows["ours"], rows["published"], rows["floor"]
        lines.append({"bench": "losses", "dtype": dtype, "head": head,
                      "time_vs_published": round(mine["seconds"] / theirs["seconds"], 3),
                      "memory_vs_published": round(mine["MiB"] / theirs["MiB"], 3),
                      "time_vs_floor": round(mine["seconds"] / floor["seconds"], 3)})  # fmt: skip
    return lines


# ---------------------------------------------------------------------------------- whole steps

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "tie_word_embeddings",
)
QWEN = {
    "0.5B": (1024, 2816, 24, 16, True),
    "1.8B": (2048, 5504, 24, 16, False),
    "4B": (2560, 6912, 40, 20, False),
}


def write_world(root: Path, teacher: str) -> None:
    """Random LLaVA checkpoints (student 0.5B in fp32, teacher in bf16) and a sample of 729 + 100 tokens."""
    import transformers as hf
    from PIL import Image

    from model import CHAT_TEMPLATE, IMAGE_TOKEN
    from toy_world import BASE

    tokenizer = hf.AutoTokenizer.from_pretrained(BASE / "qwen-small")  # its ids lie in the big vocabulary too
    tokenizer.add_tokens(hf.AddedToken(IMAGE_TOKEN, special=True, normalized=False))
    tokenizer.chat_template = CHAT_TEMPLATE
    vision = hf.SiglipVisionConfig(  # google/siglip-so400m-patch14-384
        image_size=384, patch_size=14, hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
        num_attention_heads=16, vision_use_head=False,
    )  # fmt: skip
    for name, shape, dtype in (("student", "0.5B", torch.float32), ("teacher", teacher, torch.bfloat16)):
        text = hf.Qwen2Config(**dict(zip(SHAPE, QWEN[shape])), vocab_size=V, bos_token_id=None)
        text.num_key_value_heads, text.eos_token_id = text.num_attention_heads, tokenizer.eos_token_id
        config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=len(tokenizer) - 1,
                                image_seq_length=N_VISUAL, vision_feature_select_strategy="full")  # fmt: skip
        with torch.device("meta"):
            model = hf.LlavaForConditionalGeneration(config).to(dtype)
        model.to_empty(device="cpu").tie_weights()
        for part in model, model.model.vision_tower:  # the tower again: the same in both
            torch.manual_seed(0)
            for p in part.parameters():
                p.data.copy_(torch.randn(p.shape) * 0.02 if p.dim() > 1 else torch.ones(p.shape))
        model.save_pretrained(root / name)
        image_processor = hf.SiglipImageProcessorPil(size={"height": 384, "width": 384})
        processor = hf.LlavaProcessor(image_processor, tokenizer, patch_size=14, chat_template=CHAT_TEMPLATE,
                                      vision_feature_select_strategy="full")  # fmt: skip
        processor.save_pretrained(root / name)
    Image.frombytes("RGB", (384, 384), random.Random(0).randbytes(3 * 384 * 384)).save(root / "image.png")
    turns = [
        ("human", "<image>\n" + "how many objects ? " * 4),
        ("gpt", "red circle top left , " * 15 + "two"),
    ]
    sample = {"image": "image.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (root / "data.json").write_text(json.dumps([sample] * 8))


def parameters(path: Path) -> tuple[int, int]:
    """How many numbers a checkpoint holds: in its vision tower, and elsewhere."""
    from safetensors import safe_open

    tower = rest = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                n = math.prod(tensors.get_slice(name).get_shape())
                tower, rest = (tower + n, rest) if name.startswith("vision_tower") else (tower, rest + n)
    return tower, rest


class Steps:
    """Seconds and peak memory of every step; the first one, which creates AdamW's state, does not count."""

    def __init__(self):
        self.base, self.times, self.peaks = memory("VmRSS"), [], []

    def done(self) -> None:
        self.times.append(time.perf_counter())
        self.peaks.append(memory("VmHWM"))
        forget_peak()

    def result(self, root: Path, teacher_tower: bool) -> dict:
        (s_tower, s_rest), (t_tower, t_rest) = parameters(root / "student"), parameters(root / "teacher")
        held = 4 * s_tower + 16 * s_rest + 2 * (t_rest + t_tower * teacher_tower)  # weights, gradients, AdamW
        seconds = statistics.median(b - a for a, b in zip(self.times, self.times[1:]))
        peak = max(self.peaks[1:]) - self.base
        return {"seconds": seconds, "MiB": peak - held / 2**20, "peak GiB": peak / 1024}


def stock_child(root: str, n_steps: int) -> dict:
    """DFT's step written straightforwardly with stock models: full logits of both, every loss by the book."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from data import Encoder, LlavaData

    steps = Steps()
    student = LlavaForConditionalGeneration.from_pretrained(f"{root}/student", dtype=torch.float32).train()
    teacher = LlavaForConditionalGeneration.from_pretrained(f"{root}/teacher", dtype=torch.bfloat16).eval()
    student.model.vision_tower.requires_grad_(False)
    processor = AutoProcessor.from_pretrained(f"{root}/student")
    data = LlavaData(f"{root}/data.json", root, Encoder(processor, N_VISUAL, 2048), [processor])
    batch = data.collate([data[0]])
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=2e-5, weight_decay=0
    )
    for _ in range(n_steps):
        y_s = student(**given, pixel_values=batch.pixel_values).logits.float()
        with torch.no_grad():
            y_t = teacher(**given, pixel_values=batch.pixel_values.bfloat16()).logits.float()
        loss = F.cross_entropy(y_s[batch.response], batch.targets[batch.response])
        for rows in (batch.response, batch.visual):
            loss = loss + F.kl_div(
                F.log_softmax(y_s[rows], -1), F.softmax(y_t[rows], -1), reduction="batchmean"
            )
        r_s, r_t = (y[batch.visual] @ y[batch.visual].T for y in (y_s, y_t))
        loss = loss + GAMMA * (1 - F.cosine_similarity(r_s.flatten(), r_t.flatten(), dim=0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.done()
    return steps.result(Path(root), teacher_tower=True) | {"loss": loss.item()}


def dft_child(root: str, n_steps: int) -> dict:
    """The same through dft.py, with a clock around its parts."""
    import common
    import dft
    import model

    parts, steps = defaultdict(float), Steps()

    def clocked(owner: object, name: str, part: Callable[..., str]) -> None:
        inner = getattr(owner, name)

        def outer(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            parts[part(*args)] += time.perf_counter() - start
            return result

        setattr(owner, name, outer)

    clocked(model.Llava, "encode_images", lambda *_: "vision tower")
    clocked(model.Llava, "forward", lambda m, *_: "student forward" if m.training else "teacher forward")
    clocked(dft, "gram", lambda w: "Gram of the student's head" if w.dtype == torch.float32 else "start")
    clocked(dft, "token_losses", lambda *_: "token losses, with their gradients")
    clocked(dft, "visual_relation", lambda *_: "relation loss")
    clocked(torch.Tensor, "backward", lambda *_: "backward")
    clocked(torch.optim.AdamW, "step", lambda *_: "AdamW")
    log = common.Run.log
    common.Run.log = lambda *args: (log(*args), steps.done())
    common.Run.finish = lambda run, _: run.bar.close()  # nothing to keep
    dft.main(["--student", f"{root}/student", "--teacher", f"{root}/teacher", "--teacher_dtype", "bf16",
              "--dtype", "fp32", "--data", f"{root}/data.json", "--images", root, "--out", f"{root}/out",
              "--global_batch", "1", "--micro_batch", "1", "--workers", "0",
              "--max_steps", str(n_steps)])  # fmt: skip
    parts.pop("start", None)
    log_line = json.loads((Path(root) / "out" / "log.jsonl").read_text().splitlines()[-1])
    result = steps.result(Path(root), teacher_tower=False) | {"loss": log_line["loss"]}
    return result | {"parts": {name: seconds / n_steps for name, seconds in parts.items()}}


def bench_step(repeats: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as root:
        write_world(Path(root), "1.8B")
        rows = {how: in_own_process(f"{how}-child", root, repeats + 1) for how in ("stock", "dft")}
    stock, mine = rows["stock"], rows["dft"]
    if abs(stock["loss"] - mine["loss"]) > 0.02 * abs(stock["loss"]):
        raise InputError(f"the two do not compute the same: loss {mine['loss']} against {stock['loss']}")
    print("\none DFT step: 0.5B student in fp32, 1.8B teacher in bf16, one sample of 729 + 100 tokens, AdamW")
    show([("stock transformers, full logits", stock), ("this project, dft.py", mine)],
         ["seconds", "MiB", "peak GiB"])  # fmt: skip
    ratio = {key: round(mine[field] / stock[field], 3)
             for key, field in (("time_vs_stock", "seconds"), ("memory_vs_stock", "MiB"))}  # fmt: skip
    return [{"bench": "step"} | ratio]


def bench_paper(repeats: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as root:
        write_world(Path(root), "4B")
        row = in_own_process("dft-child", root, repeats + 1)
    print("\none DFT step at the paper's sizes: 0.5B student in fp32, 4B teacher in bf16, 729 + 100 tokens")
    for name, seconds in sorted(row["parts"].items(), key=lambda item: -item[1]):
        print(f"| {name:38s} | {seconds:8.2f} s |")
    print(f"| {'a whole step':38s} | {row['seconds']:8.2f} s |")
    print(f"| {'peak memory, everything':38s} | {row['peak GiB']:6.2f} GiB |")
    return [{"bench": "paper", "seconds": round(row["seconds"], 2), "peak_gib": round(row["peak GiB"], 2)}]


# ---------------------------------------------------------------------------------- command line

CHILDREN = {"losses-child": losses_child, "stock-child": stock_child, "dft-child": dft_child}
BENCHES = {"losses": bench_losses, "step": bench_step, "paper": bench_paper}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("bench", choices=tuple(BENCHES), help="what to measure")
    add_flags(parser, "measuring", [("--repeats", positive, 3, "measurements, of which the median is taken")])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in CHILDREN:  # one measurement, started by one of the benches in a process of its own
        values = [int(v) if v.isdigit() else v for v in argv[1:]]
        print(json.dumps(CHILDREN[argv[0]](*values)))
        return
    args = parse_args(argv)
    print(f"{machine()}, median of {args.repeats}")
    for line in BENCHES[args.bench](args.repeats):
        print(json.dumps(line))


if __name__ == "__main__":
    cli(main)
