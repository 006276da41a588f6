"""Benchmarks: the losses at the papers' shapes, whole steps, and inference.

    python -m lab.bench losses     this project, the published way, and the matrix products alone
    python -m lab.bench step       one DFT step through dft.py against a plain one with stock transformers
    python -m lab.bench paper      one DFT step with a 4B teacher and a 0.5B student, part by part
    python -m lab.bench infer --model CHECKPOINT    size, arithmetic, speed and memory of an answer

Every measurement is a process of its own. Times are medians; memory is the peak of resident memory beyond
weights, gradients, optimizer state and inputs (Linux); for infer it is all of it, or the GPU's. Weights are
random, except for infer: nothing is downloaded. JSON lines end the output.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lab import steps
from lab.steps import GAMMA, N_VISUAL, QWEN, V, forget_peak, in_own_process, memory
from losses import autoregressive_loss, relation_loss, response_kl, self_correlation, visual_kl
from support.chunks import gram, over_rows
from support.flags import InputError, add_flags, cli, new_parser, positive, require

N_TEXT, D_S, D_T = 100, 1024, 2560  # KD §4.1: response tokens; widths of Qwen1.5-0.5B and 4B
N = N_VISUAL + N_TEXT
IS_TEXT = torch.arange(N) >= N_VISUAL


def inputs(dtype: torch.dtype, trained: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = {"h_s": torch.randn(N, D_S).to(dtype), "w_s": torch.randn(V, D_S, dtype=dtype).mul_(0.05)}
    x |= {"h_t": torch.randn(N, D_T).to(dtype), "w_t": torch.randn(V, D_T, dtype=dtype).mul_(0.03)}
    x |= {"gram_t": gram(x["w_t"], x["w_s"]), "y": torch.randint(0, V, (N,)).masked_fill(~IS_TEXT, -100)}
    if not trained:
        x["gram_s"] = gram(x["w_s"], x["w_t"])  # of a frozen head: once in a run
    x["h_s"].requires_grad_()
    x["w_s"].requires_grad_(trained)
    return x


def published(x: dict[str, Tensor]) -> Tensor:
    """Full logits in the style of released distillation code (LLaVA-MoD's among others).

    Cross-entropy and probabilities of all rows, in fp32, masked afterwards; the "KL" is a cross-entropy,
    whose gradient is the KL's. Relation matrices from the logits.
    """
    y_s, y_t = (x["h_s"] @ x["w_s"].T).float(), (x["h_t"] @ x["w_t"].T).float()
    loss = F.cross_entropy(y_s, x["y"])
    p_t, infinite = F.softmax(y_t, dim=-1, dtype=torch.float32), torch.isinf(y_s)
    log_s = F.log_softmax(y_s, dim=-1, dtype=torch.float32)
    rows = torch.masked_fill(p_t * log_s, infinite, 0).sum(-1)
    for mask in IS_TEXT, ~IS_TEXT:
        loss = loss - (rows * mask).sum() / mask.sum()
    r_s, r_t = (y[:N_VISUAL] @ y[:N_VISUAL].T for y in (y_s, y_t))
    return loss + GAMMA * (1 - F.cosine_similarity(r_s.flatten(), r_t.flatten(), dim=0))


def ours(x: dict[str, Tensor]) -> Tensor:
    def objective(response, visual):
        l_reg = autoregressive_loss(response.log_s, response.y, 1 / N_TEXT)
        l_res = response_kl(response.log_s, response.log_t, 1 / N_TEXT)
        return l_reg + l_res + visual_kl(visual.log_s, visual.log_t, 1 / N_VISUAL), {}

    gram_s = gram(x["w_s"], x["w_t"]) if x["w_s"].requires_grad else x["gram_s"]
    heads = (x["h_s"], x["w_s"]), (x["h_t"], x["w_t"])
    loss, _ = over_rows(objective, [IS_TEXT, ~IS_TEXT], x["y"], *heads)
    r_s = self_correlation(x["h_s"][None, :N_VISUAL], gram_s)
    return loss + GAMMA * relation_loss(r_s, self_correlation(x["h_t"][None, :N_VISUAL], x["gram_t"]))


@torch.no_grad()
def only_products(x: dict[str, Tensor]) -> None:
    """The matrix products that the losses need and nothing else, unchunked, into memory allocated once."""
    if "z" not in x:
        x |= {"z": torch.empty(N, V, dtype=x["h_s"].dtype), "d_h": torch.empty_like(x["h_s"])}
        x |= {"d_w": torch.empty(V, D_S), "g": torch.empty(D_S, D_S)} if x["w_s"].requires_grad else {}
    torch.mm(x["h_t"], x["w_t"].T, out=x["z"])
    torch.mm(x["h_s"], x["w_s"].T, out=x["z"])
    torch.mm(x["z"], x["w_s"], out=x["d_h"])
    if x["w_s"].requires_grad:
        torch.mm(x["z"].T, x["h_s"], out=x["d_w"])
        for i in range(0, D_S, 256):  # W^T W is symmetric: the upper block triangle will do
            torch.mm(x["w_s"][:, i : i + 256].T, x["w_s"][:, i:], out=x["g"][i : i + 256, i:])
        x["d_w"].addmm_(x["w_s"], x["g"])


def losses_of(how: str, dtype: str, head: str, repeats: int) -> dict:
    """Median seconds after one call to warm up, the peak MiB of another, and the norm of the gradient."""
    x = inputs({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], head == "trained")
    norm, seconds = 0.0, []

    def run() -> float:
        x["h_s"].grad = x["w_s"].grad = None
        loss = {"published": published, "ours": ours, "products": only_products}[how](x)
        if loss is None:
            return 0.0
        loss.backward()
        return x["h_s"].grad.float().norm().item()

    run()
    x["h_s"].grad = x["w_s"].grad = None
    before = memory("VmRSS")
    forget_peak()
    norm, peak = run(), memory("VmHWM") - before
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "MiB": peak, "norm": norm}


def bench_losses(args: argparse.Namespace) -> list[dict]:
    lines = []
    for dtype, head in (("fp32", "frozen"), ("fp32", "trained"), ("bf16", "frozen")):
        rows = {how: in_own_process(losses_of, how, dtype, head, args.repeats)
                for how in ("published", "ours", "products")}  # fmt: skip
        mine, theirs, products = rows["ours"], rows["published"], rows["products"]
        check_equal(mine["norm"], theirs["norm"], 1e-4 if dtype == "fp32" else 3e-2)
        show(f"losses, {dtype}, head {head}", rows, ["seconds", "MiB"])
        lines.append({"bench": "losses", "dtype": dtype, "head": head,
                      "time_vs_published": round(mine["seconds"] / theirs["seconds"], 3),
                      "memory_vs_published": round(mine["MiB"] / theirs["MiB"], 3),
                      "time_vs_products": round(mine["seconds"] / products["seconds"], 3)})  # fmt: skip
    return lines


# ---------------------------------------------------------------------------------- whole steps, inference


def bench_step(args: argparse.Namespace) -> list[dict]:
    """Time as users find it; memory in a second, short run of each that gives freed memory back."""
    with tempfile.TemporaryDirectory() as root:
        steps.write_models(Path(root), QWEN["0.5B"], QWEN["1.8B"])
        theirs, mine = (in_own_process(f, root, args.repeats + 1) for f in (steps.stock_step, steps.dft_step))
        for f, row in ((steps.stock_step, theirs), (steps.dft_step, mine)):
            row["MiB"] = in_own_process(f, root, 2, **steps.GIVE_BACK)["MiB"]
    check_equal(mine["loss"], theirs["loss"], 0.02)
    title = "one DFT step: 0.5B student in fp32, 1.8B teacher in bf16, one sample of 729 + 100 tokens, AdamW"
    show(title, {"stock": theirs, "dft": mine}, ["seconds", "MiB"])
    return [{"bench": "step", "time_vs_stock": round(mine["seconds"] / theirs["seconds"], 3),
             "memory_vs_stock": round(mine["MiB"] / theirs["MiB"], 3)}]  # fmt: skip


def bench_paper(args: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as root:
        steps.write_models(Path(root), QWEN["0.5B"], QWEN["4B"])
        row = in_own_process(steps.dft_step, root, args.repeats + 1)
    parts = {name: {"seconds": s} for name, s in sorted(row["parts"].items(), key=lambda part: -part[1])}
    title = "one DFT step at the paper's sizes: 0.5B student in fp32, 4B teacher in bf16, 729 + 100 tokens"
    show(title, parts, ["seconds"])
    return [{"bench": "paper", "seconds": round(row["seconds"], 2), "peak_gib": round(row["peak GiB"], 2)}]


def bench_infer(args: argparse.Namespace) -> list[dict]:
    require(args.model, "what to measure is not said: add --model CHECKPOINT")
    row = in_own_process(steps.infer, args.model, args.repeats)
    for name, value in row.items():
        print(f"| {name:38s} | {value:16,.{0 if isinstance(value, int) else 3}f} |")
    return [{"bench": "infer", "model": args.model} | row]


# ---------------------------------------------------------------------------------- command line


def check_equal(a: float, b: float, tolerance: float) -> None:
    if abs(a - b) > tolerance * abs(b):
        raise InputError(f"they do not compute the same: {a} and {b}")


def show(title: str, rows: dict[str, dict], columns: list[str]) -> None:
    print(f"\n{title}\n| {'':38s} | " + " | ".join(f"{c:>8s}" for c in columns) + " |")
    for name, row in rows.items():
        print(f"| {name:38s} | " + " | ".join(f"{row[c]:8.2f}" for c in columns) + " |")


BENCHES = {"losses": bench_losses, "step": bench_step, "paper": bench_paper, "infer": bench_infer}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("bench", choices=tuple(BENCHES), help="what to measure")
    add_flags(parser, "measuring", [
        ("--repeats", positive, 3, "measurements, of which the median is taken"),
        ("--model", str, None, "for infer: a LLaVA checkpoint, hub name or folder"),
    ])  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    name = cpu[0] if cpu else platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {args.repeats}")
    for line in BENCHES[args.bench](args):
        print(json.dumps(line))


if __name__ == "__main__":
    cli(main)
