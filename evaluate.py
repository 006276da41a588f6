"""Answers and scores: batched greedy generation for a questions file, with the stock model and processor.

    python evaluate.py --model out/dft --questions pope.jsonl --images IMAGES --metric pope
    python evaluate.py --model out/sft out/dft --questions q.jsonl --images IMAGES --sample 8

Questions are JSONL: `question_id`, `text`, `image` (a path, a list of paths, or absent), the reference in
`label` (a string), `answers` (a list, for vqa) or `objects` (a list, for hallucination), `options` (a list,
for choice) and `category`, each where it applies. POPE's own files are in this form. What answers is
`LlavaForConditionalGeneration` as others run it, not a model of ours.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from tqdm import tqdm

from lab.pictures import draw_sample
from support.chat import Chat
from support.checks import IMAGE_TOKEN, check_images, images_of, load_image, load_stock
from support.flags import add_flags, cli, natural, new_parser, positive, require
from support.index import records
from support.metrics import METRICS, read_vocabulary
from support.run import precision


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "what", [
        ("--model", [str], ..., "LLaVA checkpoints, hub names or folders"),
        ("--questions", str, ..., "questions, .jsonl"),
        ("--images", str, ".", "folder that image paths are relative to"),
        ("--metric", tuple(METRICS), "exact", "how to score"),
        ("--objects", str, None, "for hallucination: an object a line, with its other wordings after commas"),
        ("--suffix", str, "", "added to every question, such as '\\nAnswer with a single word or phrase.'"),
    ])  # fmt: skip
    add_flags(parser, "how", [
        ("--out", str, "out/eval", "folder for answers, scores and picture"),
        ("--sample", natural, 0, "draw this many of the questions, with every model's answer"),
        ("--batch", positive, 16, "questions at a time"),
        ("--max_new_tokens", positive, 128, "longest answer, in tokens"),
        ("--dtype", ("auto", "bf16", "fp32"), "auto", "of weights and arithmetic; auto: bf16 on CUDA"),
    ])  # fmt: skip
    return parser.parse_args(argv)


def read_questions(path: str, image_root: str, reference: str | None) -> list[dict]:
    """Checked questions; every one has the field `reference`, if a metric needs one. `images` is a list."""
    questions = []
    for where, q in records(path):
        asks = isinstance(q, dict) and isinstance(q.get("text"), str)
        require(asks, f"{where} is not a question: it needs 'text' (a string)")
        there = not reference or reference in q
        require(there, f"{where} has no '{reference}', which this metric compares the answer with")
        if reference == "answers":
            given = q["answers"] if isinstance(q["answers"], list) else []
            q["answers"] = [a.get("answer") if isinstance(a, dict) else a for a in given]  # VQA's own form
            several = len(given) > 1 and all(isinstance(a, str) for a in q["answers"])
            require(several, f"{where}: 'answers' must be a list of several humans' answers, ten in VQA")
        images, text = images_of(where, q), q["text"]
        check_images(where, images, text.count(IMAGE_TOKEN) if images else 0, image_root)
        text = text.replace(IMAGE_TOKEN, "").strip()
        questions.append(q | {"text": text, "images": images, "where": where})
    require(bool(questions), f"{path} holds no question")
    return questions


@torch.inference_mode()
def generate(model_path: str, questions: list[dict], args: argparse.Namespace) -> list[str]:
    """The model's greedy answer to every question, in the questions' order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = precision(args.dtype, torch.bfloat16 if device == "cuda" else torch.float32)
    model, processor = load_stock(model_path, dtype)
    chat = Chat(processor)  # whose prompts are those of training
    model.to(device).eval()
    processor.tokenizer.padding_side = "left"  # so that every row's answer starts at the same place
    size = lambda i: (len(questions[i]["images"]), len(questions[i]["text"]))  # noqa: E731
    order = sorted(range(len(questions)), key=size)
    answers, suffix = [""] * len(questions), args.suffix.replace("\\n", "\n")
    for k in tqdm(range(0, len(order), args.batch), desc=f"answers of {model_path}"):
        picked = [questions[i] for i in order[k : k + args.batch]]
        images = [load_image(q["where"], args.images, path) for q in picked for path in q["images"]]
        prompts = []
        for q in picked:
            content = [{"type": "image"}] * len(q["images"]) + [{"type": "text", "text": q["text"] + suffix}]
            prompts.append(chat.render([{"role": "user", "content": content}], ask=True))
        how = {"padding": True, "return_tensors": "pt", "add_special_tokens": chat.begins(prompts[0])}
        inputs = processor(images=images or None, text=prompts, **how)
        inputs = inputs.to(device, dtype)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=args.max_new_tokens)
        new = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, answer in zip(order[k : k + args.batch], new):
            answers[i] = answer.strip()
    return answers


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args = parse_args(argv)
    metric, reference = METRICS[args.metric]
    questions, out = read_questions(args.questions, args.images, reference), Path(args.out)
    if reference == "objects":
        read_vocabulary(questions, args.objects)
    out.mkdir(parents=True, exist_ok=True)
    names = [os.path.basename(os.path.normpath(path)) for path in args.model]
    if len(set(names)) < len(names):
        names = [path.strip("/.").replace("/", "_") for path in args.model]
    scores, answers = {}, {}
    for path, name in zip(args.model, names):
        answers[name] = generate(path, questions, args)
        lines = [{"question_id": q.get("question_id", k), "prompt": q["text"], "text": a, "model_id": path}
                 for k, (q, a) in enumerate(zip(questions, answers[name]))]  # fmt: skip
        (out / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        if metric:
            scores[name] = metric(questions, answers[name])
            flat = scores[name] | scores[name].get("by_category", {})
            print(f"{name}: " + ", ".join(f"{k} {v:.1f}" for k, v in flat.items() if k != "by_category"))
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    if args.sample:
        draw_sample(out / "sample.png", questions[: args.sample], answers, args.images, metric)
    return scores


if __name__ == "__main__":
    cli(main)
