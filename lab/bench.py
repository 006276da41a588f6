"""Benchmarks: the losses at the papers' shapes, and inference.

    python -m lab.bench losses     this project, the published way, and the matrix products alone
    python -m lab.bench infer --model CHECKPOINT    size, arithmetic, speed and memory of an answer

A line of JSON for each measurement, on a GPU if there is one. Times are medians; memory is the peak of the
GPU's or of resident memory (Linux): for losses beyond weights and inputs, in their own process; for infer
beyond the libraries. "Products" walks the same chunks, a floor for all that forms the same logits.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evaluate import greedy
from lab.results import machine
from losses import autoregressive_loss, relation_loss, response_kl, self_correlation, visual_kl
from support.chat import Chat, turn
from support.checkpoints import load_stock
from support.chunks import CHUNK, ON_GPU, gram, over_rows
from support.flags import add_flags, cli, new_parser, positive, require
from support.run import best_dtype, precision

N_VISUAL, N_TEXT, V = 729, 100, 151_936  # SigLIP-384's patches, KD §4.1's response tokens, Qwen1.5's ids
D_S, D_T, GAMMA = 1024, 2560, 0.5  # widths of Qwen1.5-0.5B and 4B; KD's weight of the relation loss
N = N_VISUAL + N_TEXT
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_TEXT = torch.arange(N, device=DEVICE) >= N_VISUAL


def memory(peak: bool = False) -> float:
    """What this process holds now, or has held at most, in MiB: of the GPU, or resident."""
    if DEVICE == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024


def in_own_process(function: Callable[..., dict], *arguments: object) -> dict:
    """What the function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def inputs(dtype: torch.dtype, trained: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = {"h_s": torch.randn(N, D_S).to(dtype), "w_s": torch.randn(V, D_S, dtype=dtype).mul_(0.05)}
    x |= {"h_t": torch.randn(N, D_T).to(dtype), "w_t": torch.randn(V, D_T, dtype=dtype).mul_(0.03)}
    x = {name: tensor.to(DEVICE) for name, tensor in (x | {"y": torch.randint(0, V, (N,))}).items()}
    x |= {"gram_t": gram(x["w_t"], V), "y": x["y"].masked_fill(~IS_TEXT, -100)}
    if not trained:
        x["gram_s"] = gram(x["w_s"], V)  # of a frozen head: once in a run
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

    gram_s = gram(x["w_s"], V) if x["w_s"].requires_grad else x["gram_s"]
    heads = (x["h_s"][None], x["w_s"]), (x["h_t"][None], x["w_t"])
    kinds = {"response": IS_TEXT[None], "visual": ~IS_TEXT[None]}
    loss, _ = over_rows(objective, kinds, x["y"][None], *heads)
    r_s = self_correlation(x["h_s"][None, :N_VISUAL], gram_s)
    r_t = self_correlation(x["h_t"][None, :N_VISUAL], x["gram_t"])
    return loss + GAMMA * relation_loss(r_s, r_t, 1)


@torch.no_grad()
def products(x: dict[str, Tensor]) -> None:
    """The matrix products that the losses need, and no others."""
    at_once = CHUNK * (ON_GPU if DEVICE == "cuda" else 1) // V
    d_w = torch.zeros_like(x["w_s"]) if x["w_s"].requires_grad else None
    for h_s, h_t in zip(x["h_s"].split(at_once), x["h_t"].split(at_once)):
        z = h_t @ x["w_t"].T
        torch.mm(h_s, x["w_s"].T, out=z)
        z @ x["w_s"]
        if d_w is not None:
            d_w.addmm_(z.T, h_s)
    if d_w is not None:
        d_w.addmm_(x["w_s"], gram(x["w_s"], V))


def losses_of(way: Callable, dtype: str, head: str, repeats: int) -> dict:
    """Median seconds and peak MiB after one call to warm up, and the norm of the gradient."""
    x, seconds = inputs(precision(dtype, torch.float32), head == "trained"), []
    for k in range(1 + repeats):
        x["h_s"].grad = x["w_s"].grad = None
        if k == 1:  # from here on the peak of memory counts anew
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")
            before = memory()
        start = time.perf_counter()
        loss = way(x)
        if loss is not None:
            loss.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    norm = 0.0 if x["h_s"].grad is None else x["h_s"].grad.float().norm().item()
    return {"seconds": statistics.median(seconds[1:]), "MiB": memory(peak=True) - before, "norm": norm}


def bench_losses(repeats: int) -> Iterator[dict]:
    for dtype, head, apart in ("fp32", "frozen", 1e-4), ("fp32", "trained", 1e-4), ("bf16", "frozen", 3e-2):
        norms = []  # of the gradients
        for way in published, ours, products:
            row = in_own_process(losses_of, way, dtype, head, repeats)
            yield {"way": way.__name__, "dtype": dtype, "head": head} | row
            norms.append(row["norm"])
        same = abs(norms[0] / norms[1] - 1) <= apart
        require(same, f"the first two do not compute the same: their gradients' norms are {norms[:2]}")


def infer(path: str, repeats: int, n_new: int = 64) -> dict:
    """One image, one question and `n_new` tokens of an answer, by the stock model, as others run it."""
    base, dtype = memory(), best_dtype(torch.device(DEVICE))
    model, processor = load_stock(path, dtype)
    model, size = model.to(DEVICE).eval(), model.config.vision_config.image_size
    model.generation_config = greedy(model, processor.tokenizer)
    prompt = Chat(processor).render([turn("user", "What is this?", 1)], ask=True)
    question = processor(images=Image.new("RGB", (size, size)), text=prompt, return_tensors="pt")
    question = question.to(DEVICE, dtype)

    def seconds(n_tokens: int) -> float:
        start = time.perf_counter()
        model.generate(**question, min_new_tokens=n_tokens, max_new_tokens=n_tokens)
        return time.perf_counter() - start  # the tokens are on the CPU's side too: no kernel is pending

    with torch.inference_mode():
        seconds(2)
        prefill, whole = (statistics.median(seconds(n) for _ in range(repeats)) for n in (1, 1 + n_new))
        peak = memory(peak=True)  # attention takes more in the form that torch counts on a CPU, too
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            model(**question)
    text, total = model.config.text_config, model.num_parameters()
    idle = 0 if not text.model_type.endswith("_moe") else 1 - text.num_experts_per_tok / text.num_experts
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    n_prompt = question["input_ids"].shape[1]
    return {
        "model": path, "parameters": total, "activated": round(total - idle * experts),
        "prompt_tokens": n_prompt, "TFLOP": flops.get_total_flops() / 1e12,
        "prefill_tokens_per_s": n_prompt / prefill,
        "decode_tokens_per_s": n_new / max(whole - prefill, 1e-9), "GiB": (peak - base) / 1024,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("bench", choices=("losses", "infer"), help="what to measure")
    add_flags(parser, "measuring", [
        ("--repeats", positive, 3, "measurements, of which the median is taken"),
        ("--model", str, None, "for infer: a LLaVA checkpoint, hub name or folder"),
    ])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    require(args.model or args.bench == "losses", "what to measure is not said: add --model CHECKPOINT")
    print(f"{machine()}, {torch.get_num_threads()} threads, median of {args.repeats}")
    rows = bench_losses(args.repeats) if args.bench == "losses" else [infer(args.model, args.repeats)]
    for row in rows:
        print(json.dumps({"bench": args.bench} | row), flush=True)


if __name__ == "__main__":
    cli(main)
