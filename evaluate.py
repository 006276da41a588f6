"""Answers and scores: batched greedy generation for a questions file, with the stock model and processor.

    python evaluate.py --model out/dft --questions pope.jsonl --images IMAGES --metric pope
    python evaluate.py --model out/sft out/dft --questions q.jsonl --images IMAGES --sample 8

Questions are JSONL: `question_id`, `text`, `image` (a path, a list of paths, or absent), the reference in
`label` (a string), `answers` (a list, for vqa) or `objects` (a list, for hallucination), `options` (a list,
for choice) and `category`, each where it applies. POPE's own files are in this form. What answers is
`LlavaForConditionalGeneration` as others run it, not a model of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from support.checks import IMAGE_TOKEN, check_images, load_image, load_stock
from support.flags import InputError, add_flags, cli, natural, new_parser, positive
from support.index import records
from support.metrics import METRICS, read_vocabulary

# ---------------------------------------------------------------------------------- questions and answers


def read_questions(path: str, image_root: str, reference: str | None) -> list[dict]:
    """Checked questions; every one has the field `reference`, if a metric needs one. `images` is a list."""
    questions = []
    for where, q in records(path):
        if not isinstance(q, dict) or not isinstance(q.get("text"), str):
            raise InputError(f"{where} is not a question: it needs 'text' (a string)")
        if reference and reference not in q:
            raise InputError(f"{where} has no '{reference}', which this metric compares the answer with")
        if reference == "answers":
            given = q["answers"] if isinstance(q["answers"], list) else []
            q["answers"] = [a.get("answer") if isinstance(a, dict) else a for a in given]  # VQA's own form
            if len(given) < 2 or not all(isinstance(a, str) for a in q["answers"]):
                raise InputError(f"{where}: 'answers' must be a list of several humans' answers, ten in VQA")
        image = q.get("image")
        n_images = len(image) if isinstance(image, list) else int(image is not None)
        images = check_images(where, image, q["text"].count(IMAGE_TOKEN) or n_images, image_root)
        for name in images:
            if not os.path.exists(os.path.join(image_root, name)):
                raise InputError(f"{where}: image {os.path.join(image_root, name)} does not exist")
        text = q["text"].replace(IMAGE_TOKEN, "").strip()
        questions.append(q | {"text": text, "images": images, "where": where})
    if not questions:
        raise InputError(f"{path} holds no question")
    return questions


@torch.inference_mode()
def generate(
    model_path: str,
    questions: list[dict],
    image_root: str,
    suffix: str = "",
    batch_size: int = 16,
    max_new_tokens: int = 128,
    dtype: str = "auto",
) -> list[str]:
    """The model's greedy answer to every question, in the questions' order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_dtype = (
        torch.bfloat16 if dtype == "bf16" or (dtype == "auto" and device == "cuda") else torch.float32
    )
    model, processor = load_stock(model_path, torch_dtype)
    model.to(device).eval()
    processor.tokenizer.padding_side = "left"  # so that every row's answer starts at the same place
    order = sorted(
        range(len(questions)), key=lambda i: (len(questions[i]["images"]), len(questions[i]["text"]))
    )
    answers = [""] * len(questions)
    for k in tqdm(range(0, len(order), batch_size), desc=f"answers of {model_path}"):
        picked = [questions[i] for i in order[k : k + batch_size]]
        images = [load_image(q["where"], image_root, path) for q in picked for path in q["images"]]
        prompts = []
        for q in picked:
            content = [{"type": "image"}] * len(q["images"]) + [{"type": "text", "text": q["text"] + suffix}]
            turn = [{"role": "user", "content": content}]
            prompts.append(processor.apply_chat_template(turn, add_generation_prompt=True))
        inputs = processor(images=images or None, text=prompts, padding=True, return_tensors="pt").to(device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(torch_dtype)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        for i, answer in zip(
            order[k : k + batch_size], processor.batch_decode(new, skip_special_tokens=True)
        ):
            answers[i] = answer.strip()
    return answers


# ---------------------------------------------------------------------------------- pictures


def draw_sample(
    path: Path, questions: list[dict], answers: dict[str, list[str]], image_root: str, metric: Callable | None
) -> None:
    """Images with question, reference and every model's answer, as KD's Fig. 3; green: right by `metric`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(4, len(questions))
    rows = -(-len(questions) // columns)
    text_height = 0.75 + 0.34 * len(answers)
    size, ratios = (3.4 * columns, (3.4 + text_height) * rows), [3.4, text_height] * rows
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=size, squeeze=False, height_ratios=ratios, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for k, q in enumerate(questions):
        picture, below = axes[2 * (k // columns) : 2 * (k // columns) + 2, k % columns]
        if q["images"]:
            picture.imshow(load_image(q["where"], image_root, q["images"][0]), interpolation="nearest")
        picture.set_title(_wrap(q["text"]), fontsize=10, loc="left")
        reference = str(q.get("label", "; ".join(map(str, q.get("answers") or q.get("objects") or []))))
        lines = [("reference", reference, "black")]
        for name, given in answers.items():
            right = metric is None or metric([q], [given[k]])["accuracy"] > 50
            lines.append((name, given[k], "#15803d" if right else "#b91c1c"))
        for i, (name, text, color) in enumerate(lines):
            below.text(0, 1 - i / len(lines), _wrap(f"{name}: {text}"), fontsize=9, color=color, va="top")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _wrap(text: str, width: int = 42) -> str:
    text = "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")
    return textwrap.fill(textwrap.shorten(text, 2 * width, placeholder=" ..."), width)


# ---------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    # fmt: off
    add_flags(parser, "what", [
        ("--model", [str], ..., "LLaVA checkpoints, hub names or folders"),
        ("--questions", str, ..., "questions, .jsonl"),
        ("--images", str, ".", "folder that image paths are relative to"),
        ("--metric", tuple(METRICS), "exact", "how to score"),
        ("--objects", str, None, "for hallucination: an object a line, with its other wordings after commas"),
        ("--suffix", str, "", "added to every question, such as '\\nAnswer with a single word or phrase.'"),
    ])
    add_flags(parser, "how", [
        ("--out", str, "out/eval", "folder for answers, scores and picture"),
        ("--sample", natural, 0, "draw this many of the questions, with every model's answer"),
        ("--batch", positive, 16, "questions at a time"),
        ("--max_new_tokens", positive, 128, "longest answer, in tokens"),
        ("--dtype", ("auto", "bf16", "fp32"), "auto", "of weights and arithmetic; auto: bf16 on CUDA"),
    ])
    # fmt: on
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args = parse_args(argv)
    metric, reference = METRICS[args.metric]
    questions = read_questions(args.questions, args.images, reference)
    if reference == "objects":
        read_vocabulary(questions, args.objects)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    names = {path: os.path.basename(os.path.normpath(path)) for path in args.model}
    if len(set(names.values())) < len(names):
        names = {path: path.strip("/.").replace("/", "_") for path in args.model}
    scores, answers = {}, {}
    for path, name in names.items():
        answers[name] = generate(path, questions, args.images, args.suffix.replace("\\n", "\n"), args.batch,
                                 args.max_new_tokens, args.dtype)  # fmt: skip
        with open(out / f"{name}.jsonl", "w") as file:
            for k, (q, answer) in enumerate(zip(questions, answers[name])):
                line = {
                    "question_id": q.get("question_id", k),
                    "prompt": q["text"],
                    "text": answer,
                    "model_id": path,
                }
                file.write(json.dumps(line) + "\n")
        if metric:
            scores[name] = metric(questions, answers[name])
            flat = {k: v for k, v in scores[name].items() if k != "by_category"} | scores[name].get(
                "by_category", {}
            )
            print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in flat.items()))
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    if args.sample:
        draw_sample(out / "sample.png", questions[: args.sample], answers, args.images, metric)
    return scores


if __name__ == "__main__":
    cli(main)
