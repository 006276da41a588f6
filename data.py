"""LLaVA samples -> batches: what is learned, padding, grouping, the order of samples.

A sample is `{"id", "image": path or [paths], "conversations": [{"from": "human"|"gpt", "value"}, ...]}`;
text-only samples have no `image`, and every `<image>` in the conversation stands for one image, in order.
"""

from __future__ import annotations

import os
import random
import sys
from argparse import Namespace
from collections import namedtuple
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model import Llava
from support.chat import IGNORE, IMAGE_TOKEN, PROBE
from support.checks import check_pair, check_sample, load_image
from support.flags import InputError, require
from support.index import Index
from support.ranks import Ranks, ignore_signals
from support.run import Run


class Encoder:
    """Messages -> token ids and what is learned, images as many tokens as they become."""

    def __init__(self, student: Llava, max_len: int, caption_only: bool = False):
        self.chat, self.n_visual = student.chat, student.n_visual_tokens
        self.image_id = self.chat.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.max_len, self.caption_only = max_len, caption_only

    def __call__(self, messages: list[dict], last_only: bool = False) -> tuple[list[int], list[int]]:
        """(token ids, y), at most `max_len`, as `Chat.encode` has them. A conversation that is too long is
        cut, but never inside an image.
        """
        pieces = self.chat.caption(messages) if self.caption_only else self.chat.encode(messages, last_only)
        ids, y = [], []
        for token, learned in zip(*pieces):
            width = self.n_visual if token == self.image_id else 1
            if len(ids) + width > self.max_len:
                if y:
                    y[-1] = IGNORE  # its token did not fit
                break
            ids += [token] * width
            y += [IGNORE] * (width - 1) + [learned]
        return ids, y


class Batch(NamedTuple):
    """Padded on the right. `attention_mask` comes from the lengths, never from comparing ids with pad."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) 1 where there is a token
    y: Tensor  # (B, T) the next token where it is learned, else IGNORE
    response: Tensor  # (B, T) True where it is: the rows of Eqs. (1) and (2)
    visual: Tensor  # (B, T) True at image tokens: the rows of Eqs. (3)-(5)
    prompt: Tensor  # (B, T) True at text whose next token is text that is not learned
    pixel_values: Tensor  # (n, 3, H, W) bytes, the batch's images in reading order; n may be 0
    teacher_pixels: Tensor | None  # the same prepared for a teacher with a tower of its own
    bad: list[str]  # what was wrong with samples that could not be read
    names: list[str]  # of the samples

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))


Counts = namedtuple("Counts", "response visual prompt images tokens bad")
# What `LlavaData.measure` says of a sample: images and bytes of text; images, turns and bytes before what is
# learned; whether its images have no markers.
Sizes = namedtuple("Sizes", "images text images_before turns_before text_before unmarked")


def count_rows(micros: list[Batch], ranks: Ranks) -> Counts:
    """Rows of each kind, images, tokens and unreadable samples of all ranks' micro-batches. All but the last
    are what losses are divided by, so they are at least 1.
    """
    counts = [[*(rows.sum() for rows in (b.response, b.visual, b.prompt)), len(b.pixel_values),
               b.attention_mask.sum(), len(b.bad)] for b in micros]
    *total, bad = ranks.sum(torch.tensor(counts, dtype=torch.float64).sum(0).to(ranks.device)).tolist()
    return Counts(*(max(count, 1.0) for count in total), bad)


class LlavaData(Dataset):
    """Checked samples of a data file. With `pairs`, each has a chosen and a rejected answer to one prompt;
    with `needs_images`, some must have an image.
    """

    def __init__(self, args: Namespace, student: Llava, teacher: Llava | None = None, pairs: bool = False,
                 needs_images: bool = False):
        self.image_root, self.skip_bad, self.pairs = args.images, args.skip_bad, pairs
        self.encoder = encoder = Encoder(student, args.max_len, getattr(args, "caption_only", False))
        seeing = [model for model in (student, teacher) if model and model.vision_tower]
        self.image_processors = [model.processor.image_processor for model in seeing]
        self.check = check_pair if pairs else check_sample
        checks = f"images in {os.path.abspath(args.images)}"  # absolute paths are inside of it, or not
        checks += "" if args.skip_bad else f" at {os.path.realpath(args.images)}"
        checks, width = f"{self.check.__name__} {checks}", len(Sizes._fields)
        self.index = Index(args.data, checks, width, self.measure, args.skip_bad > 0)
        self.bad, n = self.index.bad, len(self.index.bad) + len(self.index.sizes)
        advice = f"{len(self.bad)} of {n} samples are bad, more than --skip_bad {args.skip_bad} allows"
        require(len(self.bad) <= args.skip_bad, f"{''.join(self.bad[:1])}; {advice}")
        sizes, fits = Sizes(*self.index.sizes.unbind(1)), self.fit()
        self.usable, self.n_too_long = fits.nonzero().flatten(), int((~fits).sum())
        long = f"a prompt longer than --max_len {args.max_len} (an image takes {encoder.n_visual} tokens)"
        long += " or answers that are the same until there" if pairs else ""
        none = f"{args.data}: no training sample is left, {self.n_too_long} of {len(fits)} have"
        require(len(self), f"{none} {long}")
        blind = f"{args.data} has no image: only the projector is trained, and text does not reach it"
        require(not needs_images or sizes.images[self.usable].any(), blind)
        self.n_images = sizes.images[self.usable].tolist()
        self.n_unmarked = int(sizes.unmarked[self.usable].sum())
        tokens = sizes.text // 4 + sizes.images * encoder.n_visual  # about, for grouping
        self.lengths = tokens[self.usable].clamp_max(encoder.max_len).tolist()

    def fit(self) -> Tensor:
        """Of which samples something is learned within --max_len. Most are short enough for certain, by the
        sizes of their text: a token has at least one byte, and what the template adds to a turn is shorter
        than all of PROBE. Only the others are read.
        """
        encoder, sizes = self.encoder, Sizes(*self.index.sizes.unbind(1))
        extra = len(encoder.chat.encode(PROBE)[0])
        fixed = 2 if encoder.caption_only else extra * (sizes.turns_before + 1) + sizes.text_before
        fits = sizes.images_before * (encoder.n_visual + 2) + fixed < encoder.max_len
        if self.pairs:  # to the end of both answers, since cut ones may be the same
            whole = sizes.images * encoder.n_visual + extra * (sizes.turns_before + 2) + sizes.text
            fits &= whole < encoder.max_len
        for i in (~fits).nonzero().flatten().tolist():
            try:
                rows = self.encode(self.sample(i)[1])
            except InputError:  # named, and counted by --skip_bad, when it is met
                fits[i] = True
                continue
            learned = all(any(token != IGNORE for token in y) for _, y in rows)
            fits[i] = learned and (not self.pairs or rows[0] != rows[1])
        return fits

    def measure(self, where: str, record: object) -> Sizes:
        """Check a record, and say how large it is."""
        sample = self.check(where, record, self.image_root, exist=not self.skip_bad)
        messages = sample.conversations[0]
        n_bytes = [max(sum(len(part.get("text", "").encode()) for part in one["content"]) for one in turn)
                   for turn in zip(*sample.conversations)]
        first = len(messages) - 1 if self.pairs else [m["role"] for m in messages].index("assistant")
        before = sum(part["type"] == "image" for m in messages[:first] for part in m["content"])
        return Sizes(len(sample.images), sum(n_bytes), before, first, sum(n_bytes[:first]), sample.unmarked)

    def sample(self, i: int) -> tuple[str, list[list[dict]], list[str]]:
        """(its name, conversations, image paths) of sample `i` of the index, read from the disk."""
        where, record = self.index.read(i)
        conversations, images, _ = self.check(where, record, self.image_root, exist=False)
        return f"{where} (id {record.get('id')})", conversations, images

    def encode(self, conversations: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
        return [self.encoder(messages, last_only=self.pairs) for messages in conversations]

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, i: int) -> dict:
        name, conversations, paths = self.sample(int(self.usable[i]))
        pixels, bad = None, None
        try:
            rows = self.encode(conversations)
            n_images = rows[0][0].count(self.encoder.image_id) // self.encoder.n_visual  # those not cut off
            images = [load_image(name, self.image_root, path) for path in paths[:n_images]]
            if images:  # as bytes, a quarter of their floats; `Llava.encode_images` does the last steps
                raw = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
                pixels = [p(images, **raw)["pixel_values"] for p in self.image_processors]
        except InputError as error:  # one token that is not learned keeps the batch's shape
            error = str(error) if name in str(error) else f"{name}: {error}"
            rows, bad = [([self.encoder.chat.end_id], [IGNORE])] * len(conversations), error
        return {"name": name, "rows": rows, "pixels": pixels, "bad": bad}

    def collate(self, samples: list[dict]) -> Batch:
        """B pairs become 2B rows: the chosen answers, then the rejected ones in the same order."""
        rows = [row for conversation in zip(*(s["rows"] for s in samples)) for row in conversation]
        shape = len(rows), max(len(ids) for ids, _ in rows)
        input_ids = torch.full(shape, self.encoder.chat.tokenizer.pad_token_id)
        is_token, y = torch.zeros(shape, dtype=torch.bool), torch.full(shape, IGNORE)
        for k, (ids, learned) in enumerate(rows):
            input_ids[k, : len(ids)], y[k, : len(ids)] = torch.tensor(ids), torch.tensor(learned)
            is_token[k, : len(ids)] = True
        visual, response = (input_ids == self.encoder.image_id) & is_token, y != IGNORE
        is_text = is_token & ~visual
        prompt, pixels = is_text & is_text.roll(-1, 1) & ~response, []
        prompt[:, -1] = False  # nothing follows
        for k, processor in enumerate(self.image_processors):
            side = processor.size.get("height") or processor.size.get("shortest_edge")
            images = [s["pixels"][k] for s in samples if s["pixels"]]
            none = torch.zeros(0, 3, side, side, dtype=torch.uint8)
            pixels.append(torch.cat(images) if images else none)  # (n, 3, H, W)
        pixels = pixels[0], pixels[1] if len(pixels) > 1 else None
        bad, names = [s["bad"] for s in samples if s["bad"]], [s["name"] for s in samples]
        return Batch(input_ids, is_token.long(), y, response, visual, prompt, *pixels, bad, names)


def schedule(data: LlavaData, args: Namespace) -> list[list[int]]:
    """The samples of every optimizer step of the run. Depends on data, seed and batch size only."""
    epochs = (global_batches(data, args.global_batch, f"{args.seed}/{e}", args.group_by_modality)
              for e in range(args.epochs))
    steps = [batch for epoch in epochs for batch in epoch][: args.max_steps or None]
    few = f"{len(data)} usable samples, fewer than one --global_batch {args.global_batch}"
    require(steps, f"{args.data} has {few}")
    return steps


def global_batches(data: LlavaData, size: int, seed: str, group_by_modality: bool) -> list[list[int]]:
    """One epoch as lists of `size` sample indices, the longest first.

    As in LLaVA-1.5, a batch is all images or all text; what is left over of both is mixed, and what does
    not fill a batch is left out. Sorted batches give micro-batches of similar lengths.
    """
    order, rng = list(range(len(data))), random.Random(seed)
    rng.shuffle(order)
    groups = [[i for i in order if data.n_images[i]], [i for i in order if not data.n_images[i]]]
    batches, rest = [], []
    for group in groups if group_by_modality else [order]:
        whole = len(group) - len(group) % size
        batches += [group[k : k + size] for k in range(0, whole, size)]
        rest += group[whole:]
    batches += [rest[k : k + size] for k in range(0, len(rest) - size + 1, size)]
    rng.shuffle(batches)
    return [sorted(batch, key=data.lengths.__getitem__, reverse=True) for batch in batches]


def micro_batches(data: LlavaData, steps: list, first: int, run: Run) -> Iterator[tuple[int, list[Batch]]]:
    """(step, this rank's micro-batches) from step `first` on; all ranks get similar lengths."""
    size, ranks = run.args.micro_batch, run.ranks
    mine = [batch[k + ranks.rank * size :][:size] for batch in steps[first:]
            for k in range(0, len(batch), size * ranks.world_size)]
    loader = iter(DataLoader(
        data, batch_sampler=mine, collate_fn=data.collate, pin_memory=ranks.device.type == "cuda",
        num_workers=run.args.workers, worker_init_fn=ignore_signals, generator=torch.Generator(),
    ))
    for step in range(first, len(steps)):
        yield step, [next(loader) for _ in range(0, run.args.global_batch, size * ranks.world_size)]


if __name__ == "__main__":
    sys.exit("data.py is a library; look at a data file by: python -m lab.look FILE --images DIR --model M")
