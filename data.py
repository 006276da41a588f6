"""LLaVA samples -> batches: what is learned, padding, grouping, the order of samples.

A sample is `{"id", "image": path or [paths], "conversations": [{"from": "human"|"gpt", "value"}, ...]}`;
text-only samples have no `image`, and every `<image>` in the conversation stands for one image, in order.
"""

from __future__ import annotations

import os
import random
from argparse import Namespace
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from model import Llava
from support.chat import IGNORE, IMAGE_TOKEN, PROBE
from support.checkpoints import check_positions
from support.checks import check_pair, check_sample, load_image
from support.flags import InputError, require
from support.index import Index
from support.ranks import Ranks, start_data_process
from support.run import Run


class Encoder:
    """Messages -> token ids and what is learned, images as many tokens as they become."""

    def __init__(self, student: Llava, max_len: int, caption_only: bool = False):
        self.chat, self.n_visual = student.chat, student.n_visual_tokens
        self.image_id = self.chat.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.max_len, self.caption_only = max_len, caption_only

    def __call__(self, messages: list[dict], last_only: bool = False) -> tuple[list[int], list[int]]:
        """(token ids, y) as `Chat.encode` has them, cut after `max_len` tokens, but never inside an image. In
        pairs (`last_only`) a cut answer is not learned: it would be held against a whole one.
        """
        pieces = self.chat.caption(messages) if self.caption_only else self.chat.encode(messages, last_only)
        ids, y = [], []
        for token, learned in zip(*pieces):
            width = self.n_visual if token == self.image_id else 1
            if len(ids) + width > self.max_len:
                kept = [] if last_only else y[:-1]  # the last one's token did not fit
                y = kept + [IGNORE] * (len(y) - len(kept))
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
# Of a sample: images, turns, bytes of text, turns and bytes before what is learned, whether it is unmarked.
Sizes = namedtuple("Sizes", "images turns text turns_before text_before unmarked")


def count_rows(micros: list[Batch], ranks: Ranks) -> Counts:
    """All ranks' rows of each kind, images, tokens (at least 1: losses are divided by them), bad samples."""
    counts = [[*(rows.sum() for rows in (b.response, b.visual, b.prompt)), len(b.pixel_values),
               b.attention_mask.sum(), len(b.bad)] for b in micros]
    *total, bad = ranks.sum(torch.tensor(counts, dtype=torch.float64).sum(0).to(ranks.device)).tolist()
    return Counts(*(max(count, 1.0) for count in total), bad)


class LlavaData(Dataset):
    """Checked samples of data files; with `pairs`, each has a chosen and a rejected answer to one prompt."""

    def __init__(self, args: Namespace, student: Llava, teacher: Llava | None = None, pairs: bool = False,
                 needs_images: bool = False):
        self.image_root, self.skip_bad, self.pairs = args.images, args.skip_bad, pairs
        self.encoder = Encoder(student, args.max_len, getattr(args, "caption_only", False))
        check_positions(args.max_len, *filter(None, (student, teacher)))
        seeing = [model for model in (student, teacher) if model and model.vision_tower]
        self.image_processors = [model.processor.image_processor for model in seeing]
        ours, theirs = (model.processor.tokenizer.get_vocab() for model in (student, teacher or student))
        self.unknown = {ours[token]: token for token in ours.keys() - theirs.keys()}  # to the teacher
        self.check = check_pair if pairs else check_sample
        folder = f"{os.path.abspath(args.images)} at {os.path.realpath(args.images)}"  # links are followed
        checks = f"{self.check.__name__}, images in {folder}, {Sizes._fields}"
        paths = [args.data] if isinstance(args.data, str) else args.data
        of_file = checks, len(Sizes._fields), self.measure, args.skip_bad > 0
        self.files, self.indexes = ", ".join(paths), [Index(path, *of_file) for path in paths]
        self.sizes = torch.cat([index.sizes for index in self.indexes])  # of all samples, file by file
        self.bad = [message for index in self.indexes for message in index.bad]
        n = len(self.bad) + len(self.sizes)
        advice = f"{len(self.bad)} of {n} samples are bad, more than --skip_bad {args.skip_bad} allows"
        require(len(self.bad) <= args.skip_bad, f"{''.join(self.bad[:1])}; {advice}")
        fits, n_visual = self.fit(), self.encoder.n_visual
        self.usable, self.n_too_long = fits.nonzero().flatten(), int((~fits).sum())
        none = f"{self.files}: none of {len(fits)} samples has anything to learn within"
        require(len(self), f"{none} --max_len {args.max_len}, of which an image takes {n_visual}: raise it")
        sizes = Sizes(*self.sizes[self.usable].unbind(1))
        blind = f"{self.files} has no image: only the projector is trained, and text does not reach it"
        require(not needs_images or sizes.images.any(), blind)
        self.n_images, self.n_unmarked = sizes.images.tolist(), int(sizes.unmarked.sum())
        self.n_joined = int((sizes.turns > 2).sum()) if self.encoder.caption_only else 0
        tokens = sizes.text // 4 + sizes.images * n_visual  # about, for grouping
        self.lengths = tokens.clamp_max(args.max_len).tolist()

    def fit(self) -> Tensor:
        """Of which samples something is learned within --max_len. Only those are read that may be too long: a
        token has at least one byte, and what the template adds to a turn is shorter than all of PROBE.
        """
        sizes, per_turn = Sizes(*self.sizes.unbind(1)), len(self.encoder.chat.encode(PROBE)[0])
        most = sizes.images * (self.encoder.n_visual + 2) + per_turn * (sizes.turns_before + 1)
        fits = most + sizes.text_before < self.encoder.max_len
        for i in (~fits).nonzero().flatten().tolist():
            fits[i] = True  # also if it cannot be encoded: that is named, and counted, when it is met
            with suppress(InputError):
                rows = self.encode(self.sample(i)[1])
                fits[i] = all(any(token != IGNORE for token in y) for _, y in rows)
        return fits

    def measure(self, where: str, record: object) -> Sizes:
        """Check a record, and say how large it is. Of a pair all must fit."""
        conversations, images, unmarked = self.check(where, record, self.image_root, exist=not self.skip_bad)
        n_bytes = [max(len(m["content"][-1]["text"].encode()) for m in turn) for turn in zip(*conversations)]
        before = len(n_bytes) if self.pairs else [m["learned"] for m in conversations[0]].index(True)
        return Sizes(len(images), len(n_bytes), sum(n_bytes), before, sum(n_bytes[:before]), unmarked)

    def sample(self, i: int) -> tuple[str, list[list[dict]], list[str]]:
        """(its name, conversations, image paths) of sample `i` of all files, read from the disk."""
        for index in self.indexes:
            if i < len(index.sizes):
                break
            i -= len(index.sizes)
        where, record = index.read(i)
        conversations, images, _ = self.check(where, record, self.image_root, exist=False)
        return f"{where} (id {str(record.get('id'))[:200]})", conversations, images

    def encode(self, conversations: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
        return [self.encoder(messages, last_only=self.pairs) for messages in conversations]

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, i: int) -> dict:
        name, conversations, paths = self.sample(int(self.usable[i]))
        pixels, bad = None, None
        try:
            rows = self.encode(conversations)
            met = [self.unknown[i] for i in self.unknown.keys() & {*rows[0][0], *rows[-1][0]}]
            require(not met, f"{name} has {met[:3]}, which the teacher's tokenizer does not know")
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
        ids, y = ([torch.tensor(row) for row in kind] for kind in zip(*rows))
        lengths = torch.tensor([[len(row)] for row in ids])
        input_ids = pad_sequence(ids, True, self.encoder.chat.tokenizer.pad_token_id)
        y, is_token = pad_sequence(y, True, IGNORE), torch.arange(input_ids.shape[1]) < lengths
        visual, response = (input_ids == self.encoder.image_id) & is_token, y != IGNORE
        is_text = is_token & ~visual
        prompt = is_text & is_text.roll(-1, 1) & ~response
        prompt[:, -1] = False  # nothing follows
        pixels, none = [], torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        for k in range(len(self.image_processors)):
            pixels.append(torch.cat([s["pixels"][k] for s in samples if s["pixels"]] or [none]))
        pixels = [*pixels, None][:2]  # the student's, the teacher's
        bad, names = [s["bad"] for s in samples if s["bad"]], [s["name"] for s in samples]
        return Batch(input_ids, is_token.long(), y, response, visual, prompt, *pixels, bad, names)


def schedule(data: LlavaData, args: Namespace) -> list[list[int]]:
    """The samples of every optimizer step of the run. Depends on data, seed and batch size only."""
    n, size, by_modality = len(data), args.global_batch, args.group_by_modality
    require(n >= size, f"{data.files} has {n} usable samples, fewer than one --global_batch {size}")
    epochs = (global_batches(data, size, f"{args.seed}/{e}", by_modality) for e in range(args.epochs))
    return [batch for epoch in epochs for batch in epoch][: args.max_steps or None]


def global_batches(data: LlavaData, size: int, seed: str, group_by_modality: bool) -> list[list[int]]:
    """One epoch as lists of `size` sample indices; the longest first, for micro-batches of similar lengths.

    As in LLaVA-1.5, a batch is all images or all text; what is left over of both is mixed, and what does
    not fill a batch is left out.
    """
    order, rng = list(range(len(data))), random.Random(seed)
    rng.shuffle(order)
    groups = [[i for i in order if data.n_images[i]], [i for i in order if not data.n_images[i]]]
    whole, rest = [], []
    for group in groups if group_by_modality else [order]:
        cut = len(group) - len(group) % size
        whole, rest = whole + group[:cut], rest + group[cut:]
    order = whole + rest
    batches = [order[k : k + size] for k in range(0, len(order) - size + 1, size)]
    rng.shuffle(batches)
    return [sorted(batch, key=data.lengths.__getitem__, reverse=True) for batch in batches]


def micro_batches(data: LlavaData, steps: list, first: int, run: Run) -> Iterator[tuple[int, list[Batch]]]:
    """(step, this rank's micro-batches) from step `first` on; all ranks get similar lengths."""
    size, ranks = run.args.micro_batch, run.ranks
    mine = [batch[k + ranks.rank * size :][:size] for batch in steps[first:]
            for k in range(0, len(batch), size * ranks.world_size)]
    try:
        loader = iter(DataLoader(
            data, batch_sampler=mine, collate_fn=data.collate, pin_memory=ranks.device.type == "cuda",
            num_workers=run.args.workers, worker_init_fn=start_data_process, generator=torch.Generator(),
            multiprocessing_context="fork" if run.args.workers else None,  # they share what is loaded
        ))
    except OSError as error:
        advice = "each takes memory and a little of /dev/shm; --workers 0 does without"
        raise InputError(f"cannot start {run.args.workers} data processes: {error}; {advice}") from None
    for step in range(first, len(steps)):
        yield step, [next(loader) for _ in range(0, run.args.global_batch, size * ranks.world_size)]


if __name__ == "__main__":
    raise SystemExit("look at a data file by: python -m lab.look FILE --images IMAGES --model CHECKPOINT")
