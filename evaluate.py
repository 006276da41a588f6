"""Answers and scores: batched greedy generation for a questions file, with the stock model and processor.

    python evaluate.py --model out/dft --questions pope.jsonl --images IMAGES --metric pope
    python evaluate.py --model out/sft out/dft --questions q.jsonl --images IMAGES --sample 8
    torchrun --nproc_per_node 8 evaluate.py ...    each GPU answers a share of the questions

Questions are JSONL: `question_id`, `text`, `image` (a path, a list of paths, or absent), the reference in
`label` (a string) or `objects` (a list, for hallucination) and `category`, each where it applies. POPE's own
files are in this form. What answers is `LlavaForConditionalGeneration` as others run it, not a model of ours.
Answers are in OUT/<model>.jsonl as soon as they are given, and the same command goes on from there.

Metrics are in support/metrics.py, each one function, beside the reader of its reference. A new one is a
function there and a line of METRICS.
"""

import argparse
import json
import os
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers as hf
from tqdm import tqdm

from support.chat import IMAGE_TOKEN, Chat, turn
from support.checkpoints import load_stock
from support.checks import load_image
from support.flags import REQUIRED, add_flags, cli, natural, new_parser, positive, require
from support.metrics import METRICS, read_vocabulary
from support.questions import add_answers, compare, count_cut, identity, kept_answers, read_questions
from support.ranks import process_group
from support.run import best_dtype, precision, writing


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "what", [
        ("--model", [str], REQUIRED, "LLaVA checkpoints, hub names or folders; all compared with the first"),
        ("--questions", str, REQUIRED, "questions, .jsonl"),
        ("--images", str, ".", "folder that image paths are relative to"),
        ("--metric", tuple(METRICS), "exact", "how to score"),
        ("--objects", str, None, "for hallucination: an object a line, with its other wordings after commas"),
        ("--skip_bad", natural, 0, "leave out up to this many malformed questions and unreadable images"),
        ("--suffix", str, "", "added to every question, such as '\\nAnswer the question using a "
         "single word or phrase.'"),
    ])
    add_flags(parser, "how", [
        ("--out", str, None, "folder for answers, scores and picture; default: out/eval/NAME of NAME.jsonl"),
        ("--sample", natural, 0, "draw this many of the questions, with every model's answer"),
        ("--batch", positive, 16, "questions at a time"),
        ("--max_new_tokens", positive, 128, "longest answer, in tokens"),
        ("--dtype", ("auto", "bf16", "fp32"), "auto", "of weights and arithmetic; auto: bf16 on CUDA"),
    ])
    return parser.parse_args(argv)


@torch.inference_mode()
def generate(model_path: str, questions: list[dict], args: argparse.Namespace, file: Path) -> list[str]:
    """The model's greedy answers: those that `file` has, and the others, which are added to it."""
    with process_group() as ranks:
        dtype = precision(args.dtype, best_dtype(ranks.device))
        model, processor = load_stock(model_path, dtype)
        model.to(ranks.device).eval()
        chat, tokenizer, suffix = Chat(processor), processor.tokenizer, args.suffix.replace("\\n", "\n")
        tokenizer.padding_side = "left"  # so that every row's answer starts at the same place
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model.generation_config = greedy(model, tokenizer)
        finite = []  # whether the logits of each token are
        model.lm_head.register_forward_hook(lambda head, _, logits: finite.append(logits.isfinite().all()))
        asked = [turn("user", q["text"] + suffix, len(q["images"])) for q in questions]
        prompts = [chat.render([question], ask=True) for question in asked]  # as in training
        how = {"padding": True, "return_tensors": "pt", "add_special_tokens": chat.begins(prompts[0])}
        images = [os.path.join(args.images, path) for q in questions for path in q["images"]]
        ends = model.generation_config.eos_token_id
        run = identity(model, processor, prompts, args.max_new_tokens, ends, images=images)
        kept = kept_answers(file, questions, run)
        answers = ranks.gather(kept)[0]  # as rank 0 finds them
        rounds = range(len(answers), len(questions), args.batch * ranks.world_size)  # a batch for every rank
        for start in tqdm(rounds, f"answers of {model_path}", disable=ranks.rank > 0):
            first, said, began = start + ranks.rank * args.batch, [], time.perf_counter()
            if picked := questions[first : first + args.batch]:
                places = [(q["where"], args.images, path) for q in picked for path in q["images"]]
                with ThreadPoolExecutor() as pool:
                    images = list(pool.map(load_image, *zip(*places))) if places else None
                inputs = processor(images=images, text=prompts[first : first + args.batch], **how)
                inputs = inputs.to(ranks.device, dtype)
                n, new = inputs["input_ids"].shape[1], args.max_new_tokens
                most = getattr(model.config.text_config, "max_position_embeddings", n + new)
                why = f"a question has {n} tokens, and --max_new_tokens is {new}: give less, or leave it out"
                require(n + new <= most, f"{model_path} has max_position_embeddings {most}, but {why}")
                tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens)
                why = f"its weights hold Inf or NaN, or are too large for --dtype {args.dtype}"
                require(all(finite), f"{model_path} computes logits that are not finite: {why}")
                finite.clear()
                new = tokens[:, inputs["input_ids"].shape[1] :]
                texts = tokenizer.batch_decode(new, skip_special_tokens=True)
                ended = torch.isin(new, torch.tensor(ends, device=new.device)).any(1)
                said = [{"text": text.strip()} | ({} if whole else {"cut": True})
                        for text, whole in zip(texts, ended.tolist())]
            said = [answer for mine in ranks.gather(said) for answer in mine]
            if ranks.rank == 0:
                more = {"run": run, "seconds": round((time.perf_counter() - began) / len(said), 4)}
                add_answers(file, questions[start:], said, model_id=model_path, **more)
            answers += [answer["text"] for answer in said]
    return answers


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
    models = ", ".join(f"{name} = {model}" for name, model in zip(answers, args.model) if name != model)
    legend = f"{models}; ✓ right, ✗ wrong by --metric {args.metric}".removeprefix("; ")
    figure.supxlabel(textwrap.fill(legend, 160), fontsize=9)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    args, scores, answers, table = parse_args(argv), {}, {}, []
    require(IMAGE_TOKEN not in args.suffix, f"--suffix must not hold {IMAGE_TOKEN}: questions bring images")
    told = args.metric == "hallucination" or not args.objects
    require(told, f"--objects is for --metric hallucination, but --metric is {args.metric}")
    metric, out = METRICS[args.metric][0], Path(args.out or f"out/eval/{Path(args.questions).stem}")
    questions, bad = read_questions(args.questions, args.images, args.metric, args.skip_bad)
    if args.metric == "hallucination":
        read_vocabulary(questions, args.objects)
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    names = [os.path.basename(os.path.normpath(path)) for path in args.model]
    if len(set(names)) < len(names):
        names = [path.replace("/", "_") for path in args.model]
    with process_group() as ranks:
        print("".join(f"left out: {error}\n" for error in bad if ranks.rank == 0), end="")
        for path, name in zip(args.model, names):
            answers[name] = generate(path, questions, args, out / f"{name}.jsonl")
            if ranks.rank == 0 and (n_cut := count_cut(out / f"{name}.jsonl")):
                print(f"{name}: {n_cut} of {len(questions)} answers are cut: give a higher --max_new_tokens")
            if ranks.rank == 0 and (metric or len(names) > 1):
                scores[name] = metric(questions, answers[name]) if metric else {}
                scores[name] |= {"left_out": len(bad)} if bad else {}
                if len(names) > 1:
                    scores[name] |= compare(out / f"{name}.jsonl", answers[name], answers[names[0]])
                flat = scores[name] | scores[name].get("by_category", {})
                shown = {k: "-" if v is None else round(v, 3 if k == "seconds" else 1)
                         for k, v in flat.items() if k != "by_category"}
                print(f"{name}: {', '.join(f'{k} {v}' for k, v in shown.items())}")
                table += [[name, *shown.values()]]
        if ranks.rank > 0:
            return {}
    if len(names) > 1:
        for row in ["model", *shown], ["---"] * (len(shown) + 1), *table:
            print(f"| {' | '.join(map(str, row))} |")
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    if args.sample:
        draw_sample(out / "sample.png", questions[: args.sample], answers, args)
    return scores


if __name__ == "__main__":
    cli(main)
