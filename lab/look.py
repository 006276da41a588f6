"""Look at a data set before a run: is it fit to train on, and which tokens are distilled?

    python -m lab.look llava_v1_5_mix665k.json --images IMAGES --model out/dpt --show 3

The exit code is 0 if nothing that was found would stop a run, and the last line says how many samples would.
"""

import argparse
import sys
from itertools import islice
from statistics import median

from tqdm import tqdm

from data import Encoder, LlavaData
from model import Llava
from support.checks import check_images, load_image
from support.flags import REQUIRED, InputError, add_flags, cli, natural, new_parser, positive
from support.index import records

LABELS = ("text alone", "one image", "several images", "images but no <image>", "left out by --max_len",
          "would stop a run")
# What reads a row, by response + 2 * visual + 4 * prompt: its colour in a terminal and its name.
READERS = {1: ("30;42", "response: Eqs. 1, 2"), 2: ("97;44", "visual: Eqs. 3-5"), 3: ("30;46", "both"),
           4: ("30;43", "prompt: only with --targets prompt"), 0: ("2", "nothing")}
LEGEND = """
What reads the row at each token, by the equations of LLaVA-KD. A row predicts the token after it: the
token before an answer is coloured as response, and the answer's end token is not."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("data", metavar="FILE", nargs="+", help="samples or pairs, .json or .jsonl")
    add_flags(parser, "how to look", [
        ("--images", str, ".", "folder that the image paths in FILE start from"),
        ("--model", str, REQUIRED, "LLaVA checkpoint, hub name or folder; its weights are not read"),
        ("--max_len", positive, 2048, "longest sequence in tokens, with all visual tokens"),
        ("--caption_only", bool, False, "images and answers alone, as in dpt.py"),
        ("--decode", natural, 1000, "samples, spread evenly, to read the images and count the tokens of; all "
         "images must exist"),
        ("--show", natural, 0, "samples to print, every token in the colour of what reads its row"),
    ])
    return parser.parse_args(argv)


def spread(n: int, wanted: int) -> range:
    """At most `wanted` of 0 .. n - 1, evenly."""
    return range(0, n if wanted else 0, max(1, -(-n // max(wanted, 1))))


def survey(data: LlavaData, encode: Encoder, near: range) -> tuple[list[str], list[int]]:
    """What would stop a run, and the tokens of the samples in `near`, whose images are read, too."""
    bad, tokens = list(data.bad), []
    for i in tqdm(range(len(data.sizes)), desc="look", leave=False):
        name, conversations, images = data.sample(i)
        try:
            check_images(name, images, 0, data.image_root)
            if i in near:
                for path in images:
                    load_image(name, data.image_root, path)
                tokens.append(max(len(encode(messages, data.pairs)[0]) for messages in conversations))
        except InputError as error:
            bad.append(f"{name}: {str(error).removeprefix(name + ': ')}")
    return bad, tokens


def coloured(text: str, reader: int) -> str:
    """`repr`: the ends of lines can be seen, and there is nothing that a terminal would obey."""
    return f"\033[{READERS[reader][0]}m{repr(text)[1:-1]}\033[0m"


def show(data: LlavaData, i: int) -> None:
    name, conversations, _ = data.sample(i)
    for row, title in zip(data.encode(conversations), ("", "with the rejected answer")):
        batch = data.collate([{"name": name, "rows": [row], "pixels": None, "bad": None}])
        readers = (batch.response + 2 * batch.visual + 4 * batch.prompt)[0]
        kinds, lengths = readers.unique_consecutive(return_counts=True)
        print("\n" + repr(name)[1:-1], title)
        for reader, ids in zip(kinds.tolist(), batch.input_ids[0].split(lengths.tolist())):
            text = f"<image> x {len(ids)}" if reader & 2 else data.encoder.chat.tokenizer.decode(ids)
            print(coloured(text, reader), end="")
        print()


def main(argv: list[str] | None = None) -> int:
    """Look, and say what is there; the exit code."""
    args = parse_args(argv)
    model = Llava.from_checkpoint(args.model, weights=False)
    begin = [record for path in args.data for _, record in islice(records(path, skip_bad=True), 10)]
    pairs = any(isinstance(record, dict) and "chosen" in record for record in begin)
    lenient = argparse.Namespace(**vars(args), skip_bad=sys.maxsize)  # to find all that is bad
    data = LlavaData(lenient, model, pairs=pairs)
    near = spread(len(data.sizes), args.decode)
    bad, tokens = survey(data, Encoder(model, sys.maxsize, args.caption_only), near)
    n = len(data.sizes) + len(data.bad)
    print(f"{data.files}: {n:,} {'preference pairs' if pairs else 'samples'}")
    kinds = data.sizes[:, 0].clamp_max(2).bincount(minlength=3).tolist()  # by their images
    for label, count in zip(LABELS, [*kinds, data.n_unmarked, data.n_too_long, len(bad)]):
        print(f"  {label:22s}{count:>10,d}{count / n:>8.1%}")
    for message in bad[:10]:
        print(f"    {repr(message)[1:-1]}")
    if tokens:
        long = sum(length > args.max_len for length in tokens) / len(tokens)
        middle, image = f"{median(tokens):,.0f}", model.n_visual_tokens
        print(f"  tokens: {middle} in the middle, at most {max(tokens):,}; an image has {image},")
        print(f"  {long:.1%} of the samples more than --max_len {args.max_len}")
    if args.show:
        print(LEGEND, *(coloured(f" {name} ", reader) for reader, (_, name) in READERS.items()))
    for k in spread(len(data), args.show):
        show(data, int(data.usable[k]))
    if bad:
        print(f"\nnot fit to train on: {len(bad):,} samples would stop a run")
        return 1
    print(f"\nfit to train on: the images of {len(near):,} samples were read, the others exist")
    return 0


if __name__ == "__main__":
    cli(lambda: sys.exit(main()))
