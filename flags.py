"""Command lines: flags and their help, the flags that all stages share, and errors for their user."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


class InputError(Exception):
    """Something the user gave is wrong; the message says what, where, and what to do about it."""


def cli(main: Callable[[], None]) -> None:
    """Run a script's `main`; an InputError becomes one sentence on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


# ---------------------------------------------------------------------------------- command line


def positive(text: str) -> int:
    """A whole number from 1, as a kind of flag."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0, as a kind of flag."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def new_parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_flags(parser: argparse.ArgumentParser, title: str, rows: list[tuple]) -> None:
    """A group of flags, each (name, kind, default, help); a default of ... makes the flag required.

    Kinds: a type; a tuple of choices, one of them; a list of choices, any of them; [str], one or more words.
    """
    group = parser.add_argument_group(title)
    for name, kind, default, text in rows:
        options = {"required": True, "help": text}
        if default is not ...:
            options = {"default": default, "help": f"{text} (default: {str(default).replace('%', '%%')})"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(kind, list):
            options |= {"nargs": "+", "type": kind[0]} if kind == [str] else {"nargs": "*", "choices": kind}
        else:
            options |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        group.add_argument(name, **options)


def add_training_flags(parser: argparse.ArgumentParser, lr: float, batch: int, source: str) -> None:
    """The flags that every stage has, with the stage's own defaults; `source` says where those come from."""
    # fmt: off
    add_flags(parser, "data", [
        ("--data", str, ..., "training samples in LLaVA format, .json or .jsonl"),
        ("--images", str, ".", "folder that image paths are relative to"),
        ("--max_len", positive, 2048, "longest sequence in tokens, an image counts Np; as LLaVA-1.5"),
        ("--group_by_modality", bool, True, "image and text-only samples in separate batches; as LLaVA-1.5"),
        ("--skip_bad", natural, 0, "go on without up to this many unreadable images, counted and reported"),
        ("--workers", natural, 4, "data processes per rank"),
    ])
    add_flags(parser, "training", [
        ("--out", str, ..., "folder for the checkpoint and log.jsonl"),
        ("--lr", float, lr, f"peak learning rate; {source}"),
        ("--global_batch", positive, batch, f"samples per optimizer step, all ranks together; {source}"),
        ("--micro_batch", positive, 4, "samples per rank and forward pass: what fits into memory"),
        ("--epochs", positive, 1, "passes over the data; the papers'"),
        ("--max_steps", natural, 0, "stop after this many steps, 0: no limit"),
        ("--warmup", float, 0.03, "share of the steps that warm up, a cosine follows; as LLaVA-1.5"),
        ("--weight_decay", float, 0.0, "AdamW's; as LLaVA-1.5"),
        ("--max_grad_norm", float, 1.0, "gradients are clipped to this norm; as TinyLLaVA's trainer"),
        ("--seed", int, 0, "of the projector and the order of samples"),
    ])
    add_flags(parser, "interruptions", [
        ("--save_every", natural, 1000, "steps between training states in OUT/state, 0: only on a signal"),
        ("--keep", positive, 2, "training states to keep"),
        ("--resume", bool, True, "go on where an interrupted run in OUT was; without, it starts again"),
        ("--max_bad_steps", natural, 0, "leave out the update of up to this many steps that are not finite"),
    ])
    add_flags(parser, "system", [
        ("--dtype", ("auto", "bf16", "fp32"), "auto", "of arithmetic, weights stay fp32; auto: bf16 on CUDA"),
        ("--gradient_checkpointing", bool, False, "recompute the student's layers in the backward pass"),
    ])
    # fmt: on
