"""Slow proof, not part of the suite: lmms-eval, untouched and in an environment of its own, scores a dense
and a sparse checkpoint of the toy world with exactly `evaluate.py`'s answers and accuracy. About four
minutes on two cores, most of it training; the first call also installs lmms-eval (2.5 GB).

    python tests/slow_lmms_eval.py out/lmms            the environment is made in out/lmms/venv
    python tests/slow_lmms_eval.py out/lmms PYTHON     with the lmms-eval that this python has
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dpt
import evaluate
import mod_distill
import sft
from lab import world
from support.flags import require, to_argv

TASK = """\
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: label
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true,
     ignore_punctuation: true}}
metadata: [{{version: 0.0}}]
"""
UTILS = """\
from PIL import Image

def visual(doc):
    return [Image.open("{images}/" + doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["text"]
"""


def lmms_python(out: Path) -> str:
    """The python of an environment with lmms-eval, made where there is none."""
    python = out / "venv/bin/python"
    if not python.exists():
        venv.create(out / "venv", with_pip=True)
        pinned = [line for line in (ROOT / "requirements.txt").read_text().split() if "==" in line]
        wanted = [*pinned, "lmms-eval==0.7.3", "decord", "filelock<3.20"]
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
        # Without it, as here, images are resized by Pillow; and it needs the very build of torch it is for.
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision"], check=True)
    return str(python)


def checkpoints(out: Path) -> dict[str, Path]:
    """A dense and a sparse student of the toy world, trained for a minute or two each."""
    if not (out / "world").exists():
        world.write_world(out / "world", n_train=400, n_test=75)
    base, common = world.BASE, {"images": out / "world/images", "global_batch": 32, "micro_batch": 32,
                                "epochs": 1000, "max_len": 128, "workers": 0}
    captions, questions = (out / f"world/{kind}.json" for kind in ("pretrain", "finetune"))
    dpt.main(to_argv(vision=base / "siglip", llm=base / "qwen-small", data=captions, out=out / "pt",
                     max_steps=150, lr=3e-3, caption_only=False, **common))
    sft.main(to_argv(student=out / "pt", data=questions, out=out / "dense", max_steps=200, lr=2e-3, **common))
    mod_distill.main(to_argv(step="d2s", kl=0, student=out / "dense", data=questions, out=out / "sparse",
                             max_steps=60, lr=2e-3, **common))
    return {name: out / name for name in ("dense", "sparse")}


def by_lmms_eval(python: str, model: Path, out: Path) -> tuple[float, list[str]]:
    """(accuracy, answers in the questions' order) of the task in `out / "task"`."""
    results = out / f"lmms-{model.name}"
    shutil.rmtree(results, ignore_errors=True)
    loaded, place = f"pretrained={model},device=cpu,device_map=cpu,dtype=float32", out / "task"
    command = [python, "-m", "lmms_eval", "--model", "llava_hf", "--model_args", loaded, "--tasks", "toy",
               "--include_path", str(place), "--batch_size", "1", "--log_samples",
               "--output_path", str(results)]
    # A safe path: else it would take evaluate.py here for the package `evaluate`.
    alone = {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hf")}
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True)
    written = [sorted(results.rglob(f"*{kind}")) for kind in ("results.json", "samples_toy.jsonl")]
    # It ends with 0 even where it fails.
    require(all(written), f"lmms-eval failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    scores, samples = (files[-1] for files in written)
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    answers = [line["filtered_resps"] for line in lines]
    return 100 * json.loads(scores.read_text())["results"]["toy"]["exact_match,none"], answers


def main(out: Path, python: str | None) -> None:
    models, questions = checkpoints(out), out / "world/questions.jsonl"
    (out / "task").mkdir(exist_ok=True)
    (out / "task/toy.yaml").write_text(TASK.format(questions=questions))
    (out / "task/utils.py").write_text(UTILS.format(images=out / "world/images"))
    for name, model in models.items():
        ours = evaluate.main(to_argv(model=model, questions=questions, images=out / "world/images",
                                     out=out / "eval", max_new_tokens=6))[name]["accuracy"]
        said = [json.loads(line)["text"] for line in (out / f"eval/{name}.jsonl").read_text().splitlines()]
        theirs, answers = by_lmms_eval(python or lmms_python(out), model, out)
        differ = [(a, b) for a, b in zip(said, answers, strict=True) if a != b.strip()]
        counts = f"{len(differ)} of {len(said)} answers differ"
        print(f"{name}: evaluate.py {ours:.4f}, lmms-eval {theirs:.4f}, {counts}")
        require(abs(ours - theirs) < 1e-6 and not differ, f"they must agree; the first: {differ[:3]}")
        require(20 < ours < 100, "a model this good or bad proves little: train it otherwise")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else None)
