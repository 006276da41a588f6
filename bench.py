"""Benchmarks: the losses at the paper's shapes, a whole DFT step, and a step at the paper's own model sizes.

    python bench.py losses     this project, two ways on full logits, and the matrix products alone
    python bench.py step       one DFT step through dft.py against a plain one with stock transformers
    python bench.py paper      one DFT step with a 4B teacher and a 0.5B student through dft.py, part by part
    python bench.py moe        one step of LLaVA-MoD's sparse language model against the dense one

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
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from bench_steps import (
    GAMMA,
    N_VISUAL,
    V,
    bench_moe,
    bench_paper,
    bench_step,
    dft_child,
    forget_peak,
    in_own_process,
    memory,
    moe_child,
    show,
    stock_child,
)
from flags import InputError, add_flags, cli, new_parser, positive
from fused import Head, gram, token_losses, visual_relation
from losses import autoregressive_loss, response_kl, visual_kl

N_TEXT, D_S, D_T = 100, 1024, 2560  # KD §4.1: response tokens; widths of Qwen1.5-0.5B and 4B
ALPHA, BETA = 1.0, 1.0


def machine() -> str:
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    name = cpu[0] if cpu else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


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


# ---------------------------------------------------------------------------------- command line

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
    print(f"{machine()}, median of {args.repeats}")
    for line in BENCHES[args.bench](args.repeats):
        print(json.dumps(line))


if __name__ == "__main__":
    cli(main)
