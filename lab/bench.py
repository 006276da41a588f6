"""Benchmarks: the losses at the papers' shapes, and inference.

    python -m lab.bench losses     this project, the published way, and the matrix products alone
    python -m lab.bench infer --model CHECKPOINT    size, arithmetic, speed and memory of an answer

Every measurement is a process of its own. Times are medians; memory is the peak of resident memory beyond
weights and inputs (Linux); for infer it is all of it, or the GPU's. For losses, weights are random: nothing
is downloaded. JSON lines end the output.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from losses import autoregressive_loss, relation_loss, response_kl, self_correlation, visual_kl
from support.chat import Chat, turn
from support.checks import load_stock
from support.chunks import gram, over_rows
from support.flags import add_flags, cli, new_parser, positive, require

N_VISUAL, N_TEXT, V = 729, 100, 151_936  # SigLIP-384's patches, KD §4.1's response tokens, Qwen1.5's ids
D_S, D_T, GAMMA = 1024, 2560, 0.5  # widths of Qwen1.5-0.5B and 4B; KD's weight of the relation loss
N = N_VISUAL + N_TEXT
IS_TEXT = torch.arange(N) >= N_VISUAL


def memory(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def in_own_process(function: Callable[..., dict], *arguments: object) -> dict:
    """What the function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


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


WAYS = {"published": published, "ours": ours, "products": only_products}


def losses_of(how: str, dtype: str, head: str, repeats: int) -> dict:
    """Median seconds after one call to warm up, the peak MiB of another, and the norm of the gradient."""
    x = inputs({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], head == "trained")
    norm, seconds = 0.0, []

    def run() -> float:
        x["h_s"].grad = x["w_s"].grad = None
        loss = WAYS[how](x)
        if loss is None:
            return 0.0
        loss.backward()
        return x["h_s"].grad.float().norm().item()

    run()
    x["h_s"].grad = x["w_s"].grad = None
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    norm, peak = run(), memory("VmHWM") - before
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "MiB": peak, "norm": norm}


def bench_losses(args: argparse.Namespace) -> list[dict]:
    lines = []
    for dtype, head in ("fp32", "frozen"), ("fp32", "trained"), ("bf16", "frozen"):
        rows = {how: in_own_process(losses_of, how, dtype, head, args.repeats) for how in WAYS}
        theirs, mine, products = rows.values()
        difference, most = abs(mine["norm"] / theirs["norm"] - 1), 1e-4 if dtype == "fp32" else 3e-2
        require(difference <= most, f"they do not compute the same: {mine['norm']} and {theirs['norm']}")
        print(f"\nlosses, {dtype}, head {head}\n| {'':38s} |  seconds |      MiB |")
        for how, row in rows.items():
            print(f"| {how:38s} | {row['seconds']:8.2f} | {row['MiB']:8.2f} |")
        lines.append({"bench": "losses", "dtype": dtype, "head": head,
                      "time_vs_published": round(mine["seconds"] / theirs["seconds"], 3),
                      "memory_vs_published": round(mine["MiB"] / theirs["MiB"], 3),
                      "time_vs_products": round(mine["seconds"] / products["seconds"], 3)})  # fmt: skip
    return lines


# ---------------------------------------------------------------------------------- inference


def infer(path: str, repeats: int, n_new: int = 64) -> dict:
    """One image, one question and `n_new` tokens of an answer, by the stock model, as others run it."""
    on_gpu, base = torch.cuda.is_available(), memory("VmRSS")
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model, processor = load_stock(path, dtype)
    model, size = model.to(device).eval(), model.config.vision_config.image_size
    prompt = Chat(processor).render([turn("user", "What is this?", 1)], ask=True)
    picture = Image.frombytes("RGB", (size, size), random.Random(0).randbytes(3 * size * size))
    question = processor(images=picture, text=prompt, return_tensors="pt").to(device, dtype)

    def seconds(n_tokens: int) -> float:
        start = time.perf_counter()
        model.generate(**question, do_sample=False, min_new_tokens=n_tokens, max_new_tokens=n_tokens)
        return time.perf_counter() - start  # the tokens are on the CPU's side too: no kernel is pending

    flops, aten = FlopCounterMode(display=False), torch.ops.aten
    known = flops.flop_registry  # it lacks attention on a CPU
    known[aten._scaled_dot_product_flash_attention_for_cpu] = known[aten._scaled_dot_product_flash_attention]
    with torch.inference_mode():
        seconds(2)
        prefill, whole = (statistics.median(seconds(n) for _ in range(repeats)) for n in (1, 1 + n_new))
        with flops:
            model(**question)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory("VmHWM") - base
    text, total = model.config.text_config, sum(p.numel() for p in model.parameters())
    idle = 0 if text.model_type != "qwen2_moe" else 1 - text.num_experts_per_tok / text.num_experts
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    n_prompt = question["input_ids"].shape[1]
    return {
        "parameters": total, "activated": round(total - idle * experts), "prompt_tokens": n_prompt,
        "TFLOP": flops.get_total_flops() / 1e12, "prefill_tokens_per_s": n_prompt / prefill,
        "decode_tokens_per_s": n_new / max(whole - prefill, 1e-9), "GiB": peak / 1024,
    }  # fmt: skip


def bench_infer(args: argparse.Namespace) -> list[dict]:
    require(args.model, "what to measure is not said: add --model CHECKPOINT")
    row = in_own_process(infer, args.model, args.repeats)
    for name, value in row.items():
        print(f"| {name:38s} | {value:16,.{0 if isinstance(value, int) else 3}f} |")
    return [{"bench": "infer", "model": args.model} | row]


# ---------------------------------------------------------------------------------- command line

BENCHES = {"losses": bench_losses, "infer": bench_infer}


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
