"""Whole steps for lab/bench.py, each in a process of its own: DFT here and with stock models; MoE."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from safetensors import safe_open

import dft
import support.run
from data import LlavaData
from lab.world import BASE
from model import Llava
from moe import route, sparsify
from support.chat import CHAT_TEMPLATE
from support.checks import IMAGE_TOKEN
from support.flags import InputError, to_argv

N_VISUAL, V = 729, 151_936  # SigLIP-384's patches, Qwen1.5's ids
GAMMA = 0.5
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
QWEN = {"0.5B": (1024, 2816, 24, 16, True), "1.8B": (2048, 5504, 24, 16, False),
        "4B": (2560, 6912, 40, 20, False)}  # fmt: skip
# The C library keeps freed activations, some gigabytes, in pieces that gradients do not fit into. With this
# environment it gives them back at once, which is slower: peak memory is then what is in use.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "THP_MEM_ALLOC_ENABLE": "1"}
# With this one it keeps all. Fresh memory costs a virtual machine much time, and the gradients of stacked
# experts are too large to be kept otherwise, while those of the dense model are.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def memory(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def in_own_process(*arguments: object, **environment: str) -> dict:
    """Run `python -m lab.bench child ...` and read the JSON on its last line."""
    command = [sys.executable, "-m", "lab.bench", *map(str, arguments)]
    env = os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(command)} failed (exit code {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1])


def text_config(size: str, vocabulary: int) -> hf.Qwen2Config:
    config = hf.Qwen2Config(**dict(zip(KEYS, QWEN[size])), vocab_size=vocabulary, bos_token_id=None)
    config.num_key_value_heads = config.num_attention_heads
    return config


def write_models(root: Path, teacher: str) -> None:
    """Random LLaVA checkpoints (student 0.5B in fp32, teacher in bf16) and a sample of 729 + 100 tokens."""
    tokenizer = hf.AutoTokenizer.from_pretrained(BASE / "qwen-small")  # its ids lie in the big vocabulary too
    tokenizer.add_tokens(hf.AddedToken(IMAGE_TOKEN, special=True, normalized=False))
    tokenizer.chat_template = CHAT_TEMPLATE
    vision = hf.SiglipVisionConfig(  # google/siglip-so400m-patch14-384
        image_size=384, patch_size=14, hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
        num_attention_heads=16, vision_use_head=False,
    )  # fmt: skip
    processor = hf.LlavaProcessor(
        hf.SiglipImageProcessorPil(size={"height": 384, "width": 384}), tokenizer, patch_size=14,
        chat_template=CHAT_TEMPLATE, vision_feature_select_strategy="full",
    )  # fmt: skip
    for name, size, dtype in (("student", "0.5B", torch.float32), ("teacher", teacher, torch.bfloat16)):
        text = text_config(size, V)
        text.eos_token_id = tokenizer.eos_token_id
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
        processor.save_pretrained(root / name)
    Image.frombytes("RGB", (384, 384), random.Random(0).randbytes(3 * 384 * 384)).save(root / "image.png")
    question, answer = "<image>\n" + "how many objects ? " * 4, "red circle top left , " * 15 + "two"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    (root / "data.json").write_text(json.dumps([{"image": "image.png", "conversations": turns}] * 8))


def parameters(path: Path) -> tuple[int, int]:
    """How many numbers a checkpoint holds: in its vision tower, and elsewhere."""
    count = {True: 0, False: 0}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                count[name.startswith("vision_tower")] += math.prod(tensors.get_slice(name).get_shape())
    return count[True], count[False]


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
    steps, first = Steps(), None
    student = hf.LlavaForConditionalGeneration.from_pretrained(f"{root}/student", dtype=torch.float32).train()
    teacher = hf.LlavaForConditionalGeneration.from_pretrained(f"{root}/teacher", dtype=torch.bfloat16).eval()
    student.model.vision_tower.requires_grad_(False)
    processor = hf.AutoProcessor.from_pretrained(f"{root}/student")
    args = SimpleNamespace(data=f"{root}/data.json", images=root, max_len=2048, skip_bad=0)
    data = LlavaData(args, SimpleNamespace(processor=processor, n_visual_tokens=N_VISUAL, vision_tower=True))
    batch = data.collate([data[0]])
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=2e-5)
    for _ in range(n_steps):
        y_s = student(**given, pixel_values=batch.pixel_values).logits.float()
        with torch.no_grad():
            y_t = teacher(**given, pixel_values=batch.pixel_values.bfloat16()).logits.float()
        loss = F.cross_entropy(y_s[batch.response], batch.targets[batch.response])
        for rows in (batch.response, batch.visual):
            log_s, p_t = F.log_softmax(y_s[rows], -1), F.softmax(y_t[rows], -1)
            loss = loss + F.kl_div(log_s, p_t, reduction="batchmean")
        r_s, r_t = (y[batch.visual] @ y[batch.visual].T for y in (y_s, y_t))
        loss = loss + GAMMA * (1 - F.cosine_similarity(r_s.flatten(), r_t.flatten(), dim=0))
        first = first or loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.done()
    return steps.result(Path(root), teacher_tower=True) | {"loss": first}


def dft_child(root: str, n_steps: int) -> dict:
    """The same through dft.py, with a clock around its parts."""
    parts, steps, out = defaultdict(float), Steps(), f"{root}/out-{n_steps}"

    def clock(owner: object, name: str, part: Callable[..., str]) -> None:
        inner = getattr(owner, name)

        def outer(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            parts[part(*args)] += time.perf_counter() - start
            return result

        setattr(owner, name, outer)

    clock(Llava, "encode_images", lambda *_: "vision tower")
    clock(Llava, "forward", lambda m, *_: "student forward" if m.training else "teacher forward")
    clock(dft, "gram", lambda w, _: "Gram of the student's head" if w.dtype == torch.float32 else "start")
    clock(dft, "over_rows", lambda *_: "token losses, with their gradients")
    clock(torch.Tensor, "backward", lambda *_: "backward")
    clock(torch.optim.AdamW, "step", lambda *_: "AdamW")
    dft.write_log = lambda *args: (support.run.write_log(*args), steps.done())
    dft.save_student = lambda run, _: run.bar.close()  # nothing to keep
    dft.main(to_argv(
        student=f"{root}/student", teacher=f"{root}/teacher", teacher_dtype="bf16", dtype="fp32",
        data=f"{root}/data.json", images=root, out=out, global_batch=1, micro_batch=1, workers=0,
        max_steps=n_steps,
    ))  # fmt: skip
    parts.pop("start", None)
    log_line = json.loads((Path(out) / "log.jsonl").read_text().splitlines()[0])
    result = steps.result(Path(root), teacher_tower=False) | {"loss": log_line["loss"]}
    return result | {"parts": {name: seconds / n_steps for name, seconds in parts.items()}}


def moe_child(how: str, n_steps: int) -> dict:
    """Forward and backward pass and AdamW of a language model of the 0.5B shape, dense or made sparse."""
    text = text_config("0.5B", 1024)
    torch.manual_seed(0)
    student = SimpleNamespace(config=SimpleNamespace(text_config=text), language_model=hf.Qwen2Model(text))
    if how == "sparse":
        sparsify(student, 4, 2, "every_other")
    h, mask = torch.randn(1, N_VISUAL + 100, text.hidden_size), torch.ones(1, N_VISUAL + 100)
    optimizer, seconds = torch.optim.AdamW(student.language_model.parameters(), lr=1e-4, fused=True), []
    for _ in range(n_steps):
        start = time.perf_counter()
        route(student, mask)
        student.language_model(inputs_embeds=h).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:])}  # the first one creates AdamW's state
