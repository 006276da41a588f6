"""Tiny models and data that every test shares, and the ways to start a stage."""

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests say what a CPU computes
import torch
import torch.distributed as dist
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tests-")  # of indexes; for the tests' processes too
ROOT = Path(__file__).parent.parent
NP = 4  # visual tokens of the tests' tower: 16 x 16 pixels in patches of 8
torch.set_num_threads(1)  # for models this small, two are slower and, on a busy machine, ten times


def vision_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32,
                              num_hidden_layers=3, num_attention_heads=2, vision_use_head=False)


def text_config(width: int = 16, vocab: int = 448, tied: bool = True) -> Qwen2Config:
    return Qwen2Config(vocab_size=vocab, hidden_size=width, intermediate_size=32, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
                       tie_word_embeddings=tied, eos_token_id=371, pad_token_id=371,
                       bos_token_id=None)


def llava_config(**text: object) -> LlavaConfig:
    return LlavaConfig(vision_config=vision_config(), text_config=text_config(**text), image_token_index=372,
                       image_seq_length=NP, vision_feature_select_strategy="full")


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "assets/toy/qwen-small")


@pytest.fixture(scope="session")
def parts(tmp_path_factory, tokenizer) -> dict[str, str]:
    """Folders of pre-trained parts: a tower, a tied LLM, and a wider untied one with a longer vocabulary."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    SiglipVisionModel(vision_config()).save_pretrained(root / "vision")
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "vision")
    for name, config in ("small", text_config()), ("large", text_config(width=24, vocab=512, tied=False)):
        Qwen2ForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in ("vision", "small", "large")}


def new_student(vision: str, llm: str, teacher: str | None = None):
    from model import Llava
    from support.parts import new_llava

    return Llava(*new_llava(vision, llm, teacher))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, parts) -> dict[str, str]:
    """LLaVA checkpoints with one vision tower and random weights so large that no loss is near zero."""
    root, tower = tmp_path_factory.mktemp("checkpoints"), None
    for name in "small", "large":
        torch.manual_seed(1)
        model = new_student(parts["vision"], parts[name])
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.3)
        tower = tower or model.vision_tower
        model.vision_tower = tower
        model.save(root / name)
    return {name: str(root / name) for name in ("small", "large")}


def turns(*texts: str) -> list[dict]:
    return [{"from": "human" if k % 2 == 0 else "gpt", "value": text} for k, text in enumerate(texts)]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """24 samples: one image, two images, several turns, text only; lengths differ."""
    root, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    (root / "images").mkdir()
    words = "red green blue circle square cross top left bottom right how many objects is there a".split()
    text = lambda low, high: " ".join(rng.choices(words, k=rng.randint(low, high)))
    samples = []
    for i in range(24):
        size = (rng.randint(10, 40), rng.randint(10, 40))
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(root / "images" / f"{i}.png")
        sample = {"id": i, "image": f"{i}.png", "conversations": turns(f"<image>\n{text(2, 9)}", text(1, 7))}
        if i % 4 == 1:
            sample = {"id": i, "conversations": turns(text(2, 30), text(1, 9), text(2, 6), text(1, 5))}
        if i % 4 == 2:
            sample["conversations"] += turns(text(1, 5), text(1, 6))
        if i % 8 == 3:
            sample["image"] = [f"{i}.png", f"{i - 1}.png"]
            sample["conversations"][0]["value"] = f"{text(1, 3)} <image> {text(1, 3)} <image>"
        samples.append(sample)
    (root / "train.json").write_text(json.dumps(samples))
    (root / "train.jsonl").write_text("\n".join(json.dumps(s) for s in samples))
    return root


def open_data(path: Path, images: Path, processor, pairs=False, max_len=2048, caption_only=False, skip_bad=0):
    """The data of a file as a stage has it, for a student with this processor."""
    from types import SimpleNamespace

    from data import LlavaData
    from support.chat import Chat

    files = [*map(str, path)] if isinstance(path, list) else str(path)
    args = SimpleNamespace(
        data=files, images=str(images), max_len=max_len, skip_bad=skip_bad, caption_only=caption_only
    )
    student = SimpleNamespace(
        processor=processor, chat=Chat(processor), n_visual_tokens=NP, vision_tower=True,
        config=SimpleNamespace(text_config=text_config()),
    )
    return LlavaData(args, student, pairs=pairs)


def as_floats(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes as the stock SigLIP processor would have made them."""
    return (pixels.float() / 255 - 0.5) / 0.5


def data_flags(world: Path, **more: object) -> list[str]:
    flags = {"data": world / "train.json", "images": world / "images", "workers": 0, "lr": 0.02,
             "global_batch": 8, "micro_batch": 8, "seed": 3} | more
    argv = [item for flag, value in flags.items() for item in (f"--{flag}", str(value))]
    return [*argv, "--no-group_by_modality"]  # so that images and text-only samples meet in a batch


def but(argv: list[str], **flags: object) -> list[str]:
    """The command line with other values of flags that it has."""
    argv = list(argv)
    for flag, value in flags.items():
        argv[argv.index(f"--{flag}") + 1] = str(value)
    return argv


def launch(script: str, argv: list[str]) -> str:
    """What a script says that is run as a user would, on two ranks: `torchrun --nproc_per_node 2 script`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", str(port), script, *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def on_two_ranks(work: Callable, *given: object) -> list:
    """What `work` returns on each of two ranks: forks of this process, told what torchrun tells its own.

    They have imported everything, which takes a process of `launch` five seconds.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives the ranks
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}

    def play(rank: str, end: object) -> None:
        os.environ.update(told, RANK=rank, LOCAL_RANK=rank)
        end.send(work(*given))

    fork, ranks, answers = multiprocessing.get_context("fork"), [], []
    for rank in "01":
        answer, end = fork.Pipe(duplex=False)
        ranks.append(fork.Process(target=play, args=(rank, end)))
        ranks[-1].start()
        end.close()  # so that a rank that dies ends the wait for its answer
        answers.append(answer)
    try:
        assert all(answer.poll(240) for answer in answers), "a rank hangs"
        seen = [answer.recv() for answer in answers]
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [0, 0]
        return seen
    finally:
        for rank in ranks:
            rank.kill()


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
