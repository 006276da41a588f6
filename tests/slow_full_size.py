"""Slow proof, not part of the suite: at the papers' sizes stages take the memory that lab.plan says. Parts of
the shapes of SigLIP-so400m-384, Qwen1.5-0.5B and (the teacher's) 4B get random weights; then DPT, SFT, DFT
and D2S do two steps each, by their own command lines (AdamW's state comes with the first update, so the first
step takes less), and the peak of each must be the plan's within 15 %.

    python tests/slow_full_size.py FOLDER

The peak is that of resident memory. The plan is of models and training, so the libraries are measured too and
taken off: what a stage holds after its imports. Weights that are read as they lie in a file (the teacher's,
and in SFT, DFT and D2S the student's) are pages of that file; they count as soon as they are used.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers as hf
from PIL import Image

from lab import bench, plan
from support.chat import CHAT_TEMPLATE, IMAGE_TOKEN
from support.flags import cli, require, to_argv

DISK, MEMORY, KEPT, MINUTES = 30, 20, 10, 90  # GiB, GiB free, GiB of parts, with other work on two cores
N_IMAGES = 2
ANSWER = "a red circle and a blue square " * 10  # with the question about the plan's 100 tokens of text
# Between this process and a stage: what the kernel says of a child is at least the peak of who started it.
WATCH = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def qwen(width: int, ffn: int, depth: int, heads: int, tied: bool) -> hf.Qwen2Config:
    return hf.Qwen2Config(
        vocab_size=151936, hidden_size=width, intermediate_size=ffn, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=tied,
        max_position_embeddings=32768, bos_token_id=None, eos_token_id=371, pad_token_id=371)


def make(folder: Path) -> dict:
    """The teacher, its tower as the student's, the student's LLM, all in bf16 as published; and data."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    tokenizer = hf.AutoTokenizer.from_pretrained(ROOT / "assets/toy/qwen-small")
    hf.Qwen2ForCausalLM(qwen(1024, 2816, 24, 16, True)).save_pretrained(folder / "qwen")
    tokenizer.save_pretrained(folder / "qwen")
    tokenizer.add_tokens(hf.AddedToken(IMAGE_TOKEN, special=True, normalized=False))
    tower = hf.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=384, patch_size=14, vision_use_head=False)
    how = {"vision_feature_select_strategy": "full"}
    teacher = hf.LlavaForConditionalGeneration(hf.LlavaConfig(
        vision_config=tower, text_config=qwen(2560, 6912, 40, 20, False), image_seq_length=729, **how,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tie_word_embeddings=False))
    images = hf.SiglipImageProcessorPil(size={"height": 384, "width": 384})
    for part, name in (teacher.model.vision_tower, "siglip"), (teacher, "teacher"):
        part.save_pretrained(folder / name)
        images.save_pretrained(folder / name)
    hf.LlavaProcessor(images, tokenizer, patch_size=14, chat_template=CHAT_TEMPLATE, **how,
                      num_additional_image_tokens=0).save_pretrained(folder / "teacher")
    said = [{"from": "human", "value": "<image>\nwhat is there ?"}, {"from": "gpt", "value": ANSWER}]
    for k in range(N_IMAGES):
        Image.effect_noise((640, 480), 60 + k).convert("RGB").save(folder / f"{k}.jpg")
    (folder / "data.json").write_text(json.dumps([{"image": f"{k}.jpg", "conversations": said}
                                                  for k in range(N_IMAGES)]))
    return {}


def peak_of(*words: str) -> float:
    """The peak of resident memory of `python words...`, which must end well, in GiB."""
    command = [sys.executable, "-c", WATCH, sys.executable, *words]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE)
    require(done.returncode == 0, f"{words[0]} failed with {done.returncode}: what it said is above")
    return int(done.stdout) / 2**20


def main() -> None:
    require(len(sys.argv) == 2, f"usage: python {sys.argv[0]} FOLDER")
    folder, stated = Path(sys.argv[1]).resolve(), f"{DISK} GiB of disk, {MEMORY} GiB of memory"
    print(f"takes {stated} and, on two busy cores, {MINUTES} minutes; {KEPT} GiB are kept", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(folder).free / 2**30 + KEPT * (folder / "data.json").exists()
    memory = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) / 2**20
    short = f"{folder} has {disk:.0f} GiB of disk free, and there are {memory:.0f} GiB of memory"
    require(disk >= DISK and memory >= MEMORY, f"{short}: {stated} are needed")
    if not (folder / "data.json").exists():  # which is written last
        bench.in_own_process(make, folder)
    teacher, common = {"teacher": folder / "teacher"}, {
        "dtype": "bf16", "gradient_checkpointing": True, "micro_batch": 1, "global_batch": N_IMAGES,
        "epochs": 2, "workers": 0, "data": folder / "data.json", "images": folder}
    stages = {  # script, and its models
        "dpt": ("dpt.py", {"vision": folder / "siglip", "llm": folder / "qwen"} | teacher),
        "sft": ("sft.py", {"student": folder / "dpt"}),
        "dft": ("dft.py", {"student": folder / "sft"} | teacher),
        "d2s": ("mod_distill.py", {"step": "d2s", "student": folder / "sft"} | teacher),
    }
    wrong = []
    for stage, (script, models) in stages.items():
        shutil.rmtree(folder / stage, ignore_errors=True)
        argv, began = to_argv(**models, **common, out=folder / stage), time.perf_counter()
        planned = plan.step(plan.parse_args([stage, *argv, "--gpus", "0"]))["together"] / plan.GIB
        libraries = peak_of(script, "--help")
        measured = peak_of(script, *argv) - libraries
        print(f"{stage}: {measured:.1f} GiB beside {libraries:.1f} of libraries, planned {planned:.1f} "
              f"({planned / measured - 1:+.0%}), {(time.perf_counter() - began) / 60:.0f} min", flush=True)
        wrong += [stage] * (abs(planned - measured) > 0.15 * measured)
    for stage in stages:
        shutil.rmtree(folder / stage)
    require(not wrong, f"the plan is more than 15 % off for {', '.join(wrong)}")


if __name__ == "__main__":
    cli(main)
