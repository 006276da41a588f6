"""Look at a data set before a run: is it fit to train on, and which tokens are distilled?

    python data.py llava_v1_5_mix665k.json --images IMAGES --model out/dpt --show 3

The exit code is 0 if nothing that was found would stop a run, else 1, and the last line says why.
"""

import argparse
import sys
from collections import Counter
from itertools import groupby, islice

import torch
from tqdm import tqdm

from data import Encoder, LlavaData
from model import Llava
from support.checks import check_images, load_image
from support.flags import InputError, add_flags, cli, natural, new_parser, positive
from support.index import records

KINDS = ("text alone", "one image", "several images")
BAD = ("malformed", "missing image", "broken image", "cannot be encoded")  # they would stop a run
ODD = ("images but no <image>", "empty answer", "duplicate", "left out by --max_len")
# What reads a row, by response + 2 * visual + 4 * prompt: its colour in a terminal and its name.
READERS = {1: ("30;42", "response: Eqs. 1, 2"), 2: ("97;44", "visual: Eqs. 3-5"), 3: ("30;46", "both"),
           4: ("30;43", "prompt: only with --targets prompt"), 0: ("2", "nothing")}  # fmt: skip
LEGEND = """
What reads the row at each token, by the equations of LLaVA-KD. A row predicts the token after it: the last
token of a question has its answer's colour, and the end token of the answer has not."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("data", metavar="FILE", help="samples or preference pairs, .json or .jsonl")
    add_flags(parser, "how to look", [
        ("--images", str, ".", "folder that the image paths in FILE start from"),
        ("--model", str, ..., "LLaVA checkpoint, hub name or folder; its weights are not read"),
        ("--max_len", positive, 2048, "longest sequence in tokens, with all visual tokens"),
        ("--caption_only", bool, False, "images and answers alone, as in dpt.py"),
        ("--decode", natural, 1000, "samples, spread evenly, to read the images and count the tokens of; all "
         "images must exist"),
        ("--show", natural, 0, "samples to print, every token in the colour of what reads its row"),
    ])  # fmt: skip
    return parser.parse_args(argv)


def spread(n: int, wanted: int) -> list[int]:
    """`wanted` of 0 .. n - 1, evenly; all if there are no more."""
    return torch.linspace(0, n - 1, min(wanted, n), dtype=torch.float64).round().long().tolist()


def survey(data: LlavaData, encode: Encoder, near: set[int]) -> tuple[dict[str, list[str]], list, list]:
    """Samples by what is to be said of them, the answers in each, and the tokens of those that are `near`."""
    found = {label: [] for label in KINDS + BAD + ODD} | {"malformed": data.bad}
    answers, tokens, first, usable = [], [], {}, set(data.usable.tolist())
    for i in tqdm(range(len(data.index.sizes)), desc="look", leave=False):
        (name, conversations, images), trouble = data.sample(i), "missing image"
        found[KINDS[min(len(images), 2)]].append(name)
        try:
            check_images(name, images, 0, data.image_root)
            trouble = "broken image"
            for path in images if i in near else ():
                load_image(name, data.image_root, path)
            trouble = "cannot be encoded"
            tokens += [max(len(encode(c, data.pairs)[0]) for c in conversations)] if i in near else []
        except InputError as error:
            found[trouble].append(f"{name}: {str(error).removeprefix(name + ': ')}")
        said = [m["content"][-1]["text"] for c in conversations for m in c if m["role"] == "assistant"]
        twin = first.setdefault(hash(repr((conversations, images))), i)
        so = data.index.sizes[i, 5], not all(said), twin != i, i not in usable
        for label in [label for label, is_so in zip(ODD, so) if is_so]:
            same = f" is the same as {data.sample(twin)[0]}" if label == "duplicate" else ""
            found[label].append(name + same)
        answers.append(len(said) // len(conversations))
    return found, answers, tokens


def bars(title: str, values: list[int]) -> None:
    """Draw how many samples have which value."""
    width = max(values) // 12 + 1
    counts = Counter(value // width for value in values)
    print(f"\n  {title}")
    for k in range(min(counts), max(counts) + 1):
        span = f"{k * width:,}" + f" to {(k + 1) * width - 1:,}" * (width > 1)
        print(f"  {span:22s}{counts[k]:>10,d}  {'█' * (50 * counts[k] // max(counts.values()))}")


def coloured(text: str, reader: int) -> str:
    """`repr`: the ends of lines can be seen, and there is nothing that a terminal would obey."""
    return f"\033[{READERS[reader][0]}m{repr(text)[1:-1]}\033[0m"


def show(data: LlavaData, i: int) -> None:
    name, conversations, _ = data.sample(i)
    for row, title in zip(data.code(conversations), ("", "with the rejected answer")):
        batch = data.collate([{"name": name, "rows": [row], "pixels": None, "bad": None}])
        readers = (batch.response + 2 * batch.visual + 4 * batch.prompt)[0].tolist()
        print("\n" + repr(name)[1:-1], title)
        for reader, run in groupby(zip(readers, row[0]), key=lambda token: token[0]):
            ids = [token for _, token in run]
            text = f"<image> x {len(ids)}" if reader & 2 else data.encoder.chat.tokenizer.decode(ids)
            print(coloured(text, reader), end="")
        print()


def main(argv: list[str] | None = None) -> int:
    """Look, and say what is there; the exit code."""
    args = parse_args(argv)
    model = Llava.from_checkpoint(args.model, weights=False)
    try:
        begin = [record for _, record in islice(records(args.data, skip_bad=True), 10)]
        pairs = any(isinstance(record, dict) and "chosen" in record for record in begin)
        lenient = argparse.Namespace(**vars(args), skip_bad=sys.maxsize)  # to find all that is bad
        data = LlavaData(lenient, model, pairs=pairs)
    except InputError as error:
        print(f"not fit to train on: {error}")
        return 1
    near = spread(len(data.index.sizes), args.decode)
    found, answers, tokens = survey(data, Encoder(model, sys.maxsize, args.caption_only), set(near))
    n = len(answers) + len(data.bad)
    print(f"{args.data}: {n:,} {'preference pairs' if pairs else 'samples'}")
    for label, names in found.items():
        print(f"  {label:22s}{len(names):>10,d}{len(names) / n:>8.1%}")
        for name in names[:10] if label not in KINDS else ():
            print(f"    {repr(name)[1:-1]}")
    bars("answers", answers)
    if tokens:
        long = sum(length > args.max_len for length in tokens) / len(tokens)
        size = f"an image has {model.n_visual_tokens}"
        bars(f"tokens; {size}, {long:.1%} of the samples more than --max_len {args.max_len}", tokens)
    if args.show:
        print(LEGEND, *(coloured(f" {name} ", reader) for reader, (_, name) in READERS.items()))
    for k in spread(len(data), args.show):
        show(data, int(data.usable[k]))
    bad = ", ".join(f"{len(found[label]):,} {label}" for label in BAD if found[label])
    read = f"the images of {len(near):,} samples were read, of the others it is known that they exist"
    print(f"\nnot fit to train on: {bad}" if bad else f"\nfit to train on: {read}")
    return 1 if bad else 0


if __name__ == "__main__":
    cli(lambda: sys.exit(main()))
