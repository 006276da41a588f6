"""Answers and scores: batched greedy generation for a questions file, with the stock model and processor.

    python evaluate.py --model out/dft --questions pope.jsonl --images IMAGES --metric pope
    python evaluate.py --model out/sft out/dft --questions q.jsonl --images IMAGES --sample 8
    torchrun --nproc_per_node 8 evaluate.py ...    each GPU answers a share of the questions

Questions are JSONL: `question_id`, `text`, `image` (a path, a list of paths, or absent), the reference in
`label` (a string) or `objects` (a list, for hallucination) and `category`, each where it applies. POPE's own
files are in this form. What answers is `LlavaForConditionalGeneration` as others run it, not a model of ours.

Metrics are in support/metrics.py, each one function, beside the reader of its reference. A new one is a
function there and a line of METRICS.
"""

import argparse
import json
import os
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers as hf
from tqdm import tqdm

from support.chat import IMAGE_TOKEN, Chat, turn
from support.checkpoints import load_stock
from support.checks import check_images, images_of, is_text, load_image, without_markers
from support.flags import REQUIRED, InputError, add_flags, cli, natural, new_parser, positive, require
from support.index import records
from support.metrics import METRICS, read_vocabulary
from support.ranks import process_group
from support.run import precision


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "what", [
        ("--model", [str], REQUIRED, "LLaVA checkpoints, hub names or folders"),
        ("--questions", str, REQUIRED, "questions, .jsonl"),
        ("--images", str, ".", "folder that image paths are relative to"),
        ("--metric", tuple(METRICS), "exact", "how to score"),
        ("--objects", str, None, "for hallucination: an object a line, with its other wordings after commas"),
        ("--skip_bad", natural, 0, "leave out up to this many malformed questions and unreadable images"),
        ("--suffix", str, "", "added to every question, such as '\\nAnswer the question using a "
         "single word or phrase.'"),
    ])
    add_flags(parser, "how", [
        ("--out", str, "out/eval", "folder for answers, scores and picture"),
        ("--sample", natural, 0, "draw this many of the questions, with every model's answer"),
        ("--batch", positive, 16, "questions at a time"),
        ("--max_new_tokens", positive, 128, "longest answer, in tokens"),
        ("--dtype", ("auto", "bf16", "fp32"), "auto", "of weights and arithmetic; auto: bf16 on CUDA"),
    ])
    return parser.parse_args(argv)


def read_question(where: str, q: object, image_root: str, metric: str) -> dict:
    """The question, checked, its `images` a list and its reference in the one form that the metric reads."""
    if isinstance(q, InputError):  # its line is no JSON
        raise q
    asks = isinstance(q, dict) and isinstance(q.get("text"), str)
    require(asks, f"{where} is not a question: it needs 'text' (a string)")
    whole = is_text(json.dumps(q, ensure_ascii=False))
    require(whole, f"{where} holds half of a surrogate pair, which is no character")
    images, text = images_of(where, q), q["text"]
    check_images(where, images, text.count(IMAGE_TOKEN) if images else 0, image_root)
    for path in images:
        load_image(where, image_root, path)
    text = without_markers(text, bool(images))
    q |= {"text": text.strip(), "images": images, "where": where}
    _, field, read = METRICS[metric]
    return q | {field: read(q)} if field else q


def read_questions(path: str, image_root: str, metric: str, skip_bad: int = 0) -> tuple[list, list]:
    """The good questions of a file, each with a `question_id`, and what is wrong with the others."""

    def attempt(numbered: tuple) -> dict | InputError:
        k, (where, q) = numbered
        try:
            return {"question_id": k} | read_question(where, q, image_root, metric)
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool:  # every image is decoded, so that all bad ones are known beforehand
        questions = list(pool.map(attempt, enumerate(records(path, skip_bad=True))))
    bad = [q for q in questions if isinstance(q, InputError)]
    n_bad = f"{len(bad)} of {len(questions)} questions are bad, more than --skip_bad {skip_bad}"
    require(len(bad) <= skip_bad, f"{n_bad}; the first: {bad and bad[0]}")
    questions = [q for q in questions if isinstance(q, dict)]
    require(bool(questions), f"{path} holds no question")
    return questions, bad


@torch.inference_mode()
def generate(model_path: str, questions: list[dict], args: argparse.Namespace) -> list[str]:
    """The model's greedy answer to every question, in their order. Ranks take turns at the batches."""
    with process_group() as ranks:
        dtype = precision(args.dtype, torch.bfloat16 if ranks.device.type == "cuda" else torch.float32)
        model, processor = load_stock(model_path, dtype)
        model.to(ranks.device).eval()
        chat, tokenizer = Chat(processor), processor.tokenizer
        tokenizer.padding_side = "left"  # so that every row's answer starts at the same place
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model.generation_config = greedy(model, tokenizer)
        finite = []  # whether the logits of each token are
        model.lm_head.register_forward_hook(lambda head, _, logits: finite.append(logits.isfinite().all()))
        size = lambda i: (len(questions[i]["images"]), len(questions[i]["text"]))
        order, suffix = sorted(range(len(questions)), key=size), args.suffix.replace("\\n", "\n")
        # Token ids minus the padding's: 0 where this rank has no answer, so that the ranks' can be added.
        answers = torch.zeros(len(order), args.max_new_tokens, dtype=torch.int64, device=ranks.device)
        turns = range(0, len(order), args.batch)[ranks.rank :: ranks.world_size]
        for k in tqdm(turns, f"answers of {model_path}", disable=ranks.rank > 0):
            picked = [questions[i] for i in order[k : k + args.batch]]
            places = [(q["where"], args.images, path) for q in picked for path in q["images"]]
            with ThreadPoolExecutor() as pool:
                images = list(pool.map(load_image, *zip(*places))) if places else None
            asked = [turn("user", q["text"] + suffix, len(q["images"])) for q in picked]
            prompts = [chat.render([question], ask=True) for question in asked]  # as in training
            how = {"padding": True, "return_tensors": "pt", "add_special_tokens": chat.begins(prompts[0])}
            inputs = processor(images=images, text=prompts, **how).to(ranks.device, dtype)
            tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens)
            why = f"its weights hold Inf or NaN, or are too large for --dtype {args.dtype}"
            require(all(finite), f"{model_path} computes logits that are not finite: {why}")
            finite.clear()
            new = tokens[:, inputs["input_ids"].shape[1] :]
            answers[order[k : k + args.batch], : new.shape[1]] = new - tokenizer.pad_token_id
        new = tokenizer.batch_decode(ranks.sum(answers) + tokenizer.pad_token_id, skip_special_tokens=True)
    return [answer.strip() for answer in new]


def greedy(model: torch.nn.Module, tokenizer: hf.PreTrainedTokenizerBase) -> hf.GenerationConfig:
    """Of the checkpoint's own settings its end tokens alone: sampling, beams or penalties would count too."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return hf.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)


def draw_sample(path: Path, questions: list, answers: dict[str, list], args: argparse.Namespace) -> None:
    """Images with question, reference and every model's answer, as KD's Fig. 3; two questions in a row."""
    from matplotlib.figure import Figure

    metric, n_rows = METRICS[args.metric][0], -(-len(questions) // 2)
    figure = Figure(figsize=(12, 0.4 + 0.34 * n_rows * (2 + len(answers))), layout="constrained")
    axes = figure.subplots(n_rows, 4, squeeze=False, width_ratios=[1, 2, 1, 2])
    for axis in axes.flat:
        axis.axis("off")
    for (picture, beside), q, *given in zip(axes.reshape(-1, 2), questions, *answers.values()):
        if q["images"]:
            picture.imshow(load_image(q["where"], args.images, q["images"][0]), interpolation="nearest")
        reference = q.get("label", "; ".join(q.get("objects", [])))
        lines = [(q["text"], "black"), (f"reference: {reference}", "black")]
        for name, answer in zip(answers, given):
            right = metric is None or metric([q], [answer])["accuracy"] > 50
            lines += [(f"{'✓' if right else '✗'} {name}: {answer}", "#15803d" if right else "#b91c1c")]
        for i, (text, color) in enumerate(lines):
            text = textwrap.fill(textwrap.shorten(text, 104, placeholder=" ..."), 54)
            beside.text(0, 1 - i / len(lines), text, fontsize=9, color=color, va="top", parse_math=False)
    models = ", ".join(f"{name} = {model}" for name, model in zip(answers, args.model))
    figure.supxlabel(f"{models}; ✓ right, ✗ wrong by --metric {args.metric}", fontsize=9)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args = parse_args(argv)
    require(IMAGE_TOKEN not in args.suffix, f"--suffix must not hold {IMAGE_TOKEN}: questions bring images")
    told = args.metric == "hallucination" or not args.objects
    require(told, f"--objects is for --metric hallucination, but --metric is {args.metric}")
    metric, out = METRICS[args.metric][0], Path(args.out)
    questions, bad = read_questions(args.questions, args.images, args.metric, args.skip_bad)
    if args.metric == "hallucination":
        read_vocabulary(questions, args.objects)
    out.mkdir(parents=True, exist_ok=True)
    names = [os.path.basename(os.path.normpath(path)) for path in args.model]
    if len(set(names)) < len(names):
        names = [path.replace("/", "_") for path in args.model]
    scores, answers = {}, {}
    with process_group() as ranks:
        print("".join(f"left out: {error}\n" for error in bad if ranks.rank == 0), end="")
        for path, name in zip(args.model, names):
            answers[name] = generate(path, questions, args)
            if ranks.rank > 0:
                continue
            lines = [{"question_id": q["question_id"], "prompt": q["text"], "text": a, "model_id": path}
                     for q, a in zip(questions, answers[name])]
            (out / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            if metric:
                scores[name] = metric(questions, answers[name]) | ({"left_out": len(bad)} if bad else {})
                flat = scores[name] | scores[name].get("by_category", {})
                shown = [f"{k} {round(v, 1)}" for k, v in flat.items() if k != "by_category"]
                print(f"{name}: {', '.join(shown)}")
        if ranks.rank > 0:
            return {}
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    if args.sample:
        draw_sample(out / "sample.png", questions[: args.sample], answers, args)
    return scores


if __name__ == "__main__":
    cli(main)
