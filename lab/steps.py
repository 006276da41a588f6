"""What lab/bench.py measures besides the losses: whole training steps, and inference."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import dft
import support.run
from data import LlavaData
from lab.world import BASE
from model import Llava
from support.chat import CHAT_TEMPLATE, IMAGE_TOKEN, Chat, turn
from support.checks import load_stock
from support.flags import to_argv

N_VISUAL, V = 729, 151_936  # SigLIP-384's patches, Qwen1.5's ids
GAMMA = 0.5
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
QWEN = {"0.5B": (1024, 2816, 24, 16, True), "1.8B": (2048, 5504, 24, 16, False),
        "4B": (2560, 6912, 40, 20, False)}  # fmt: skip
SO400M = (1152, 4304, 27, 16)  # google/siglip-so400m-patch14-384
# The C library keeps freed activations, some gigabytes, in pieces that gradients do not fit into. With this
# environment it gives them back at once, which is slower: peak memory is then what is in use.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "THP_MEM_ALLOC_ENABLE": "1"}


def memory(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def in_own_process(function: Callable[..., dict], *arguments: object, **environment: str) -> dict:
    """What the function returns in a fresh process, which has these variables in its environment."""
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def count_flops() -> FlopCounterMode:
    """torch's counter, with the operations that it does not know: attention on a CPU, products in place."""
    aten, counter = torch.ops.aten, FlopCounterMode(display=False)
    known, attention = counter.flop_registry, "_scaled_dot_product_flash_attention"
    for suffix in "", "_backward":
        known[getattr(aten, f"{attention}_for_cpu{suffix}")] = known[getattr(aten, f"{attention}{suffix}")]
    known[aten.addmm_] = known[aten.addmm]
    return counter


def n_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def text_config(shape: tuple, vocabulary: int = V) -> hf.Qwen2Config:
    return hf.Qwen2Config(**dict(zip(KEYS, shape)), num_key_value_heads=shape[3], vocab_size=vocabulary,
                          bos_token_id=None)  # fmt: skip


def write_models(
    root: Path, student: tuple, teacher: tuple, vision: tuple = SO400M, vocabulary: int = V
) -> None:
    """Random LLaVA checkpoints with one tower (student in fp32, teacher in bf16); samples of 829 tokens."""
    tokenizer = hf.AutoTokenizer.from_pretrained(BASE / "qwen-small")  # its ids lie in the big vocabulary too
    tokenizer.add_tokens(hf.AddedToken(IMAGE_TOKEN, special=True, normalized=False))
    tokenizer.chat_template = CHAT_TEMPLATE
    tower = dict(zip(KEYS, vision)) | {"image_size": 384, "patch_size": 14, "vision_use_head": False}
    processor = hf.LlavaProcessor(
        hf.SiglipImageProcessorPil(size={"height": 384, "width": 384}), tokenizer, patch_size=14,
        chat_template=CHAT_TEMPLATE, vision_feature_select_strategy="full",
    )  # fmt: skip
    for name, shape, dtype in (("student", student, torch.float32), ("teacher", teacher, torch.bfloat16)):
        text = text_config(shape, vocabulary)
        text.eos_token_id = tokenizer.eos_token_id
        config = hf.LlavaConfig(
            vision_config=hf.SiglipVisionConfig(**tower), text_config=text, image_seq_length=N_VISUAL,
            image_token_index=len(tokenizer) - 1, vision_feature_select_strategy="full",
            tie_word_embeddings=text.tie_word_embeddings,
        )  # fmt: skip
        torch.manual_seed(0)
        model = hf.LlavaForConditionalGeneration._from_config(config, dtype=dtype)
        if name == "student":
            vision_weights = model.model.vision_tower.state_dict()
        model.model.vision_tower.load_state_dict(vision_weights)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    Image.frombytes("RGB", (384, 384), random.Random(0).randbytes(3 * 384 * 384)).save(root / "image.png")
    question, answer = "<image>\n" + "how many objects ? " * 4, "red circle top left , " * 15 + "two"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    (root / "data.json").write_text(json.dumps([{"image": "image.png", "conversations": turns}] * 8))


class Steps:
    """Seconds and peak memory of every step; the first one, which creates AdamW's state, does not count."""

    def __init__(self):
        self.base, self.times, self.peaks = memory("VmRSS"), [], []

    def done(self) -> None:
        self.times.append(time.perf_counter())
        self.peaks.append(memory("VmHWM"))
        forget_peak()

    def result(self, root: str, towers: int) -> dict:
        """Of a DFT step, in which student and teacher have so many vision towers together."""
        s, t = (load_stock(f"{root}/{name}", torch.float32, False)[0] for name in ("student", "teacher"))
        tower = n_parameters(
            s.model.vision_tower
        )  # weights, and all but towers with gradients and AdamW's state
        held = 4 * tower + 16 * (n_parameters(s) - tower) + 2 * (n_parameters(t) - (2 - towers) * tower)
        seconds = statistics.median(b - a for a, b in zip(self.times, self.times[1:]))
        peak = max(self.peaks[1:]) - self.base
        return {"seconds": seconds, "MiB": peak - held / 2**20, "peak GiB": peak / 1024}


def stock_step(root: str, n_steps: int) -> dict:
    """DFT's step written straightforwardly with stock models: full logits of both, every loss by the book."""
    steps, first, llava = Steps(), None, hf.LlavaForConditionalGeneration
    student = llava.from_pretrained(f"{root}/student", dtype=torch.float32).train()
    teacher = llava.from_pretrained(f"{root}/teacher", dtype=torch.bfloat16).eval()
    student.model.vision_tower.requires_grad_(False)
    processor = hf.AutoProcessor.from_pretrained(f"{root}/student")
    args = SimpleNamespace(data=f"{root}/data.json", images=root, max_len=2048, skip_bad=0)
    sees = {"processor": processor, "n_visual_tokens": N_VISUAL, "vision_tower": True}
    data = LlavaData(args, SimpleNamespace(chat=Chat(processor), **sees))
    batch = data.collate([data[0]])
    pixels = batch.pixel_values / 127.5 - 1  # as SigLIP's processor has them
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=2e-5)
    for _ in range(n_steps):
        y_s = student(**given, pixel_values=pixels).logits.float()
        with torch.no_grad():
            y_t = teacher(**given, pixel_values=pixels.bfloat16()).logits.float()
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
    return steps.result(root, towers=2) | {"loss": first}


def dft_step(root: str, n_steps: int) -> dict:
    """The same through dft.py, with a clock around its parts."""
    parts, steps, out = defaultdict(float), Steps(), f"{root}/out-{n_steps}"

    def clock(owner: object, name: str, part: Callable[..., str]) -> None:
        inner = getattr(owner, name)

        def outer(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            parts[part(*args)] += (time.perf_counter() - start) / n_steps
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
    return steps.result(root, towers=1) | {"loss": log_line["loss"], "parts": parts}


def infer(path: str, repeats: int, n_new: int = 64) -> dict:
    """One image, one question and `n_new` tokens of an answer, by the stock model, as others run it."""
    on_gpu, base = torch.cuda.is_available(), memory("VmRSS")
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model, processor = load_stock(path, dtype)
    model, size = model.to(device).eval(), model.config.vision_config.image_size
    prompt = Chat(processor).render([turn("user", "What is this?", 1)], ask=True)
    picture = Image.frombytes("RGB", (size, size), random.Random(0).randbytes(3 * size * size))
    inputs = processor(images=picture, text=prompt, return_tensors="pt").to(device, dtype)

    def seconds(n_tokens: int) -> float:
        start = time.perf_counter()
        model.generate(**inputs, do_sample=False, min_new_tokens=n_tokens, max_new_tokens=n_tokens)
        return time.perf_counter() - start  # the tokens are on the CPU's side too: no kernel is pending

    with torch.inference_mode():
        seconds(2)
        prefill, whole = (statistics.median(seconds(n) for _ in range(repeats)) for n in (1, 1 + n_new))
        with count_flops() as flops:
            model(**inputs)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory("VmHWM") - base
    text, total = model.config.text_config, n_parameters(model)
    idle = 0 if text.model_type != "qwen2_moe" else 1 - text.num_experts_per_tok / text.num_experts
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    n_prompt = inputs["input_ids"].shape[1]
    return {
        "parameters": total, "activated": round(total - idle * experts), "prompt_tokens": n_prompt,
        "TFLOP": flops.get_total_flops() / 1e12, "prefill_tokens_per_s": n_prompt / prefill,
        "decode_tokens_per_s": n_new / max(whole - prefill, 1e-9), "GiB": peak / 1024,
    }  # fmt: skip
