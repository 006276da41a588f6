"""LLaVA samples -> batches: the chat template and its mask, padding, grouping, the order of samples.

A sample is `{"id", "image": path or [paths], "conversations": [{"from": "human"|"gpt", "value"}, ...]}`;
text-only samples have no `image`, and every `<image>` in the conversation stands for one image, in order.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaProcessor

from support.checks import IMAGE_TOKEN, check_pair, check_sample, load_image
from support.flags import InputError
from support.index import Index
from support.ranks import Ranks, ignore_signals
from support.run import Run

IGNORE = -100  # label of a position whose token is given, not predicted


# ---------------------------------------------------------------------------------- one sample -> token ids


class Encoder:
    """Messages -> token ids and labels, through the tokenizer's chat template."""

    def __init__(self, processor: LlavaProcessor, n_visual: int, max_len: int, caption_only: bool = False):
        self.tokenizer, self.n_visual, self.max_len = processor.tokenizer, n_visual, max_len
        self.caption_only = caption_only
        self.image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if not re.search(r"{%-?\s*generation", self.tokenizer.chat_template or ""):
            raise InputError(
                "the student's chat template has no {% generation %} block, so its answers cannot be told "
                "from its prompts; start from a checkpoint made here or add the block to its template"
            )

    def __call__(self, messages: list[dict], max_len: int | None = None) -> tuple[list[int], list[int], int]:
        """(token ids, labels, number of images), at most `max_len` long and no image cut in two.

        Labels are the ids of the answers and their end tokens, IGNORE elsewhere. A conversation that is too
        long ends early: before the first image that does not fit whole, else in the middle of a text.
        """
        if self.caption_only:
            pieces, answers = self._caption(messages)
        else:
            coded = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            pieces, answers = coded["input_ids"], coded["assistant_masks"]
        ids, labels, n_images = [], [], 0
        for token, answer in zip(pieces, answers):
            width = self.n_visual if token == self.image_id else 1
            if len(ids) + width > (max_len or self.max_len):
                break
            ids += [token] * width
            labels += [token if answer else IGNORE] * width
            n_images += token == self.image_id
        return ids, labels, n_images

    def _caption(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """Pre-training reads `<image>` and the caption alone, as LLaVA's: the question is left out."""
        images = [self.image_id for m in messages for part in m["content"] if part["type"] == "image"]
        caption = " ".join(m["content"][-1]["text"] for m in messages if m["role"] == "assistant")
        text = self.tokenizer(caption, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        return images + text, [0] * len(images) + [1] * len(text)


# ---------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Padded on the right. `attention_mask` comes from the lengths, never from comparing ids with pad."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T) 1 where there is a token
    labels: Tensor  # (B, T) IGNORE where the token is given
    visual: Tensor  # (B, T) True at image tokens: the rows of Eqs. (3)-(5), unshifted
    pixel_values: Tensor  # (n, 3, H, W), the batch's images in reading order; n may be 0
    teacher_pixels: Tensor | None  # the same prepared for a teacher with a tower of its own
    bad: list[str]  # what was wrong with samples that could not be read
    names: list[str]  # of the samples

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def to(self, device: torch.device) -> Batch:
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self.each(Tensor.pin_memory)

    @property
    def targets(self) -> Tensor:
        """(B, T): what each position predicts, the label to its right. Nothing is shifted anywhere else."""
        return torch.cat([self.labels[:, 1:], torch.full_like(self.labels[:, :1], IGNORE)], dim=1)

    @property
    def response(self) -> Tensor:
        """(B, T): positions that predict an answer token, the rows of Eqs. (1) and (2)."""
        return self.targets != IGNORE

    @property
    def prompt(self) -> Tensor:
        """(B, T): text positions that predict a given text token."""
        is_text = self.attention_mask.bool() & ~self.visual
        next_is_text = torch.cat([is_text[:, 1:], torch.zeros_like(is_text[:, :1])], dim=1)
        return is_text & next_is_text & ~self.response


Counts = namedtuple("Counts", "response visual prompt images tokens bad")


def count_rows(micros: list[Batch], ranks: Ranks) -> Counts:
    """What the global batch holds, of which this rank has `micros`: rows of each kind, images, tokens, and
    unreadable samples. What there is none of counts as 1: a mean over nothing is then 0 / 1.
    """
    counts = [[b.response.sum(), b.visual.sum(), b.prompt.sum(), len(b.pixel_values), b.attention_mask.sum(),
               len(b.bad)] for b in micros]  # fmt: skip
    total = ranks.sum(torch.tensor(counts, dtype=torch.float64).sum(0).to(ranks.device))
    *means_over, bad = total.tolist()
    return Counts(*(max(count, 1.0) for count in means_over), bad)


class LlavaData(Dataset):
    """Checked samples of one data file, each a list of conversations (here: one) over the same images."""

    def __init__(self, path: str, image_root: str, encoder: Encoder, processors: list, skip_bad: int = 0):
        self.image_root, self.encoder, self.skip_bad = image_root, encoder, skip_bad
        self.image_processors = [p.image_processor for p in processors]  # the teacher's only if it differs
        checks = f"{type(self).__name__} images in {os.path.realpath(image_root)}" * (not skip_bad)
        self.index = Index(path, checks, 5, self.measure)
        n_images, n_bytes, *before = self.index.sizes.unbind(1)
        fits = self._longest_prompt(*before) < encoder.max_len
        for i in (~fits).nonzero().flatten().tolist():
            fits[i] = all(map(self.has_answer, self.sample(i)[1]))
        self.usable = fits.nonzero().flatten()  # numbers of the samples in the index
        self.n_too_long = len(fits) - len(self.usable)
        if not len(self):
            raise InputError(
                f"{path}: no training sample is left, {self.n_too_long} of {len(fits)} have a prompt "
                f"longer than --max_len {encoder.max_len} (an image takes {encoder.n_visual} tokens)"
            )
        self.n_images = n_images[self.usable].tolist()
        tokens = n_bytes // 4 + n_images * encoder.n_visual  # about, for grouping
        self.lengths = tokens[self.usable].clamp_max(encoder.max_len).tolist()

    def measure(self, where: str, record: object) -> tuple[int, ...]:
        """Check a record. Its images and bytes of text; images, turns and bytes before its first answer."""
        conversations, images = self.check(where, record)
        for image in () if self.skip_bad else images:
            if not os.path.exists(os.path.join(self.image_root, image)):
                raise InputError(f"{where}: image {os.path.join(self.image_root, image)} does not exist")
        messages = conversations[0]
        n_bytes = [sum(len(part.get("text", "").encode()) for part in m["content"]) for m in messages]
        first = self.first_answer(messages)
        before = sum(part["type"] == "image" for m in messages[:first] for part in m["content"])
        return len(images), sum(n_bytes), before, first, sum(n_bytes[:first])

    def _longest_prompt(self, n_images: Tensor, n_turns: Tensor, n_bytes: Tensor) -> Tensor:
        """At least as many tokens as a prompt of these sizes can have: a token has at least one byte, and the
        template adds less than 16 tokens to a turn and 2 to an image. A caption's prompt is its images.
        """
        text = 16 * (n_turns + 1) + n_bytes
        return n_images * (self.encoder.n_visual + 2) + text * (not self.encoder.caption_only)

    def sample(self, i: int) -> tuple[str, list[list[dict]], list[str]]:
        """(its name, conversations, image paths) of sample `i` of the index, read from the disk."""
        where, record = self.index.read(i)
        return f"{where} (id {record.get('id')})", *self.check(where, record)

    def check(self, where: str, record: object) -> tuple[list[list[dict]], list[str]]:
        messages, images = check_sample(where, record, self.image_root)
        return [messages], images

    def first_answer(self, messages: list[dict]) -> int:
        """The number of the first turn that is learned from."""
        return next(k for k, m in enumerate(messages) if m["role"] == "assistant")

    def code(self, messages: list[dict]) -> tuple[list[int], list[int], int]:
        return self.encoder(messages)

    def has_answer(self, messages: list[dict]) -> bool:
        """Whether at least one token of the answer fits into `max_len`."""
        return any(label != IGNORE for label in self.encoder(messages)[1])

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, i: int) -> dict:
        name, conversations, paths = self.sample(int(self.usable[i]))
        rows = [self.code(messages) for messages in conversations]
        try:
            images = [load_image(name, self.image_root, path) for path in paths[: rows[0][2]]]
            pixels = [
                p(images, return_tensors="pt")["pixel_values"] if images else None
                for p in self.image_processors
            ]
        except InputError as error:
            # One token without a label keeps the batch's shape; `check_samples` counts it.
            rows = [([self.encoder.tokenizer.eos_token_id], [IGNORE], 0)] * len(rows)
            return {"name": name, "rows": rows, "pixels": [None], "bad": str(error)}
        return {"name": name, "rows": rows, "pixels": pixels, "bad": None}

    def collate(self, samples: list[dict]) -> Batch:
        rows = [row for conversation in zip(*(s["rows"] for s in samples)) for row in conversation]
        length = max(len(ids) for ids, _, _ in rows)
        input_ids = torch.full((len(rows), length), self.encoder.tokenizer.pad_token_id)
        labels = torch.full_like(input_ids, IGNORE)
        attention_mask = torch.zeros_like(input_ids)
        for k, (ids, answers, _) in enumerate(rows):
            n = len(ids)
            input_ids[k, :n], labels[k, :n] = torch.tensor(ids), torch.tensor(answers)
            attention_mask[k, :n] = 1
        visual = (input_ids == self.encoder.image_id) & attention_mask.bool()
        pixels, *others = (self._stack(k, samples) for k in range(len(self.image_processors)))
        bad, names = [s["bad"] for s in samples if s["bad"]], [s["name"] for s in samples]
        return Batch(input_ids, attention_mask, labels, visual, pixels, *(others or [None]), bad, names)

    def _stack(self, k: int, samples: list[dict]) -> Tensor:
        images = [s["pixels"][k] for s in samples if s["pixels"][0] is not None]
        size = self.image_processors[k].size
        side = size.get("height") or size.get("shortest_edge")
        return torch.cat(images) if images else torch.zeros(0, 3, side, side)  # (n, 3, H, W)


class PreferenceData(LlavaData):
    """Pairs of answers to one prompt: `chosen` and `rejected` conversations, images once for both.

    A batch of B pairs has 2B rows: the chosen ones, then the rejected ones in the same order. Only the last
    answer, where the two differ, has labels.
    """

    def check(self, where: str, record: object) -> tuple[list[list[dict]], list[str]]:
        return check_pair(where, record, self.image_root)

    def first_answer(self, messages: list[dict]) -> int:
        return len(messages) - 1

    def has_answer(self, messages: list[dict]) -> bool:
        labels = self.code(messages, max_len=sys.maxsize)[1]
        return any(label != IGNORE for label in labels[: self.encoder.max_len])

    def code(self, messages: list[dict], max_len: int | None = None) -> tuple[list[int], list[int], int]:
        ids, labels, n_images = self.encoder(messages, max_len)
        given = max((k for k, label in enumerate(labels) if label == IGNORE), default=-1)
        return ids, [IGNORE] * (given + 1) + labels[given + 1 :], n_images


# ---------------------------------------------------------------------------------- the order of samples


def schedule(data: LlavaData, args: argparse.Namespace) -> list[list[int]]:
    """The samples of every optimizer step of the run. Depends on data, seed and batch size only."""
    epochs = (global_batches(data, args.global_batch, f"{args.seed}/{e}", args.group_by_modality)
              for e in range(args.epochs))  # fmt: skip
    steps = [batch for epoch in epochs for batch in epoch][: args.max_steps or None]
    if not steps:
        raise InputError(
            f"{args.data} has {len(data)} usable samples, fewer than one --global_batch {args.global_batch}"
        )
    return steps


def global_batches(data: LlavaData, size: int, seed: str, group_by_modality: bool) -> list[list[int]]:
    """One epoch as lists of `size` sample indices, the longest first.

    As in LLaVA-1.5, a batch is all images or all text; what is left over of both is mixed, and what does
    not fill a batch is left out. Sorted batches give micro-batches of similar lengths.
    """
    order, rng = list(range(len(data))), random.Random(seed)
    rng.shuffle(order)
    with_images = [i for i in order if data.n_images[i]]
    text_only = [i for i in order if not data.n_images[i]]
    batches, rest = [], []
    for group in [with_images, text_only] if group_by_modality else [order]:
        whole = len(group) - len(group) % size
        batches += [group[k : k + size] for k in range(0, whole, size)]
        rest += group[whole:]
    batches += [rest[k : k + size] for k in range(0, len(rest) - size + 1, size)]
    rng.shuffle(batches)
    return [sorted(batch, key=data.lengths.__getitem__, reverse=True) for batch in batches]


def micro_batches(
    data: LlavaData, steps: list[list[int]], first: int, run: Run
) -> Iterator[tuple[int, list[Batch]]]:
    """(step, this rank's micro-batches) from step `first` on; all ranks get similar lengths."""
    size, stride, rank = run.args.micro_batch, run.args.micro_batch * run.ranks.world, run.ranks.rank
    mine = [batch[k + rank * size :][:size] for batch in steps[first:] for k in range(0, len(batch), stride)]
    loader = iter(DataLoader(
        data, batch_sampler=mine, collate_fn=data.collate, pin_memory=run.ranks.device.type == "cuda",
        num_workers=run.args.workers, worker_init_fn=ignore_signals, generator=torch.Generator(),
    ))  # fmt: skip
    for step in range(first, len(steps)):
        yield step, [next(loader) for _ in range(run.accumulation)]
