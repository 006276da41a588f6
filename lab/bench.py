"""Benchmarks: the losses at the papers' shapes, whole steps, and LLaVA-MoD's sparse layers.

    python -m lab.bench losses     this project, two ways on full logits, and the matrix products alone
    python -m lab.bench step       one DFT step through dft.py against a plain one with stock transformers
    python -m lab.bench paper      one DFT step with a 4B teacher and a 0.5B student, part by part
    python -m lab.bench moe        one step of LLaVA-MoD's sparse language model against the dense one

Every measurement is a process of its own. Times are medians; memory is the peak of resident memory beyond
weights, gradients, optimizer state and inputs (Linux). Random weights: nothing is downloaded. JSON lines end
the output.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.steps import (
    GAMMA,
    GIVE_BACK,
    KEEP,
    N_VISUAL,
    V,
    dft_child,
    forget_peak,
    in_own_process,
    memory,
    moe_child,
    stock_child,
    write_models,
)
from losses import autoregressive_loss, relation_loss, response_kl, self_correlation, visual_kl
from support.chunks import gram, over_rows
from support.flags import InputError, add_flags, cli, new_parser, positive

N_TEXT, D_S, D_T = 100, 1024, 2560  # KD §4.1: response tokens; widths of Qwen1.5-0.5B and 4B
N = N_VISUAL + N_TEXT
IS_TEXT = torch.arange(N) >= N_VISUAL


# ---------------------------------------------------------------------------------- the losses


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
    loss = F.nll_loss(log_s[IS_TEXT], x["y"][IS_TEXT]) + kl[IS_TEXT].mean() + kl[~IS_TEXT].mean()
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


class Products:
    """The matrix products that the losses need and nothing else, unchunked, into memory allocated before."""

    def __init__(self, x: dict[str, Tensor]):
        self.x, dtype = x, x["w_s"].dtype
        self.z, self.d_h = torch.empty(N, V, dtype=dtype), torch.empty(N, D_S, dtype=dtype)
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
    """Median seconds after one call to warm up, the peak MiB of another, loss and gradient norm."""
    x = inputs({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], head == "trained")
    products, value = Products(x) if how == "products" else None, []

    def run() -> None:
        if products:
            return products()
        loss = {"published": published, "careful": careful, "ours": ours}[how](x)
        loss.backward()
        value[:] = [loss.item(), x["h_s"].grad.float().norm().item()]
        x["h_s"].grad = x["w_s"].grad = None
        return None

    run()
    before = memory("VmRSS")
    forget_peak()
    run()
    peak, seconds = memory("VmHWM") - before, []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "MiB": peak} | dict(zip(("loss", "norm"), value))


def bench_losses(repeats: int) -> list[dict]:
    lines = []
    for dtype, head in (("fp32", "frozen"), ("fp32", "trained"), ("bf16", "frozen")):
        rows = {how: in_own_process("losses-child", how, dtype, head, repeats)
                for how in ("published", "careful", "ours", "products")}  # fmt: skip
        mine, theirs, products = rows["ours"], rows["published"], rows["products"]
        for other, key in (("careful", "loss"), ("careful", "norm"), ("published", "norm")):
            check_equal(mine[key], rows[other][key], 1e-4 if dtype == "fp32" else 3e-2)
        print(f"\nlosses, {dtype}, head {head}")
        show(rows, ["seconds", "MiB"])
        lines.append({"bench": "losses", "dtype": dtype, "head": head,
                      "time_vs_published": round(mine["seconds"] / theirs["seconds"], 3),
                      "memory_vs_published": round(mine["MiB"] / theirs["MiB"], 3),
                      "time_vs_products": round(mine["seconds"] / products["seconds"], 3)})  # fmt: skip
    return lines


# ---------------------------------------------------------------------------------- whole steps


def bench_step(repeats: int) -> list[dict]:
    """Time as users find it; memory in a second, short run of each that gives freed memory back."""
    with tempfile.TemporaryDirectory() as root:
        write_models(Path(root), "1.8B")
        rows = {how: in_own_process(f"{how}-child", root, repeats + 1) for how in ("stock", "dft")}
        for how, row in rows.items():
            row["MiB"] = in_own_process(f"{how}-child", root, 2, **GIVE_BACK)["MiB"]
    check_equal(rows["dft"]["loss"], rows["stock"]["loss"], 0.02)
    print("\none DFT step: 0.5B student in fp32, 1.8B teacher in bf16, one sample of 729 + 100 tokens, AdamW")
    show(rows, ["seconds", "MiB"])
    ratio = {key: round(rows["dft"][of] / rows["stock"][of], 3)
             for key, of in (("time_vs_stock", "seconds"), ("memory_vs_stock", "MiB"))}  # fmt: skip
    return [{"bench": "step"} | ratio]


def bench_paper(repeats: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as root:
        write_models(Path(root), "4B")
        row = in_own_process("dft-child", root, repeats + 1)
    print("\none DFT step at the paper's sizes: 0.5B student in fp32, 4B teacher in bf16, 729 + 100 tokens")
    for name, seconds in sorted(row["parts"].items(), key=lambda item: -item[1]):
        print(f"| {name:38s} | {seconds:8.2f} s |")
    return [{"bench": "paper", "seconds": round(row["seconds"], 2), "peak_gib": round(row["peak GiB"], 2)}]


def bench_moe(repeats: int) -> list[dict]:
    rows = {how: in_own_process("moe-child", how, repeats + 1, **KEEP) for how in ("dense", "sparse")}
    print("\none step of the 0.5B language model in fp32, 829 tokens: dense, and E4T2 in every other layer")
    show(rows, ["seconds"])
    return [{"bench": "moe", "time_vs_dense": round(rows["sparse"]["seconds"] / rows["dense"]["seconds"], 3)}]


# ---------------------------------------------------------------------------------- command line


def check_equal(a: float, b: float, tolerance: float) -> None:
    if abs(a - b) > tolerance * abs(b):
        raise InputError(f"they do not compute the same: {a} and {b}")


def show(rows: dict[str, dict], columns: list[str]) -> None:
    print(f"| {'':12s} | " + " | ".join(f"{c:>8s}" for c in columns) + " |")
    for name, row in rows.items():
        print(f"| {name:12s} | " + " | ".join(f"{row[c]:8.2f}" for c in columns) + " |")


CHILDREN = {"losses-child": losses_child, "stock-child": stock_child, "dft-child": dft_child,
            "moe-child": moe_child}  # fmt: skip
BENCHES = {"losses": bench_losses, "step": bench_step, "paper": bench_paper, "moe": bench_moe}


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
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    name = cpu[0] if cpu else platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {args.repeats}")
    for line in BENCHES[args.bench](args.repeats):
        print(json.dumps(line))


if __name__ == "__main__":
    cli(main)
