"""Command lines: flags with their help, the flags that stages share, and errors for their user."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path


class InputError(Exception):
    """Something the user gave is wrong; the message says what, where, and what to do about it."""


def require(right: object, message: str) -> None:
    """Raise an InputError with this message unless what the user gave is right."""
    if not right:
        raise InputError(message)


def cli(main: Callable[[], object]) -> None:
    """Run a script's `main`; an InputError becomes one sentence on stderr and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters that data have
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """A kind of flag: a number from `low` to `high`."""

    def a_number(text: str) -> float:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    a_number.__name__ = kind.__name__  # argparse says "invalid int value" of what is no number
    return a_number


REQUIRED = ...  # as the default of a flag: it must be given
natural, positive, weight, share = number(int, 0), number(int, 1), number(float, 0), number(float, 0, 1)


class Parser(argparse.ArgumentParser):
    """A parser that refuses a flag that is given twice, of which argparse takes the last."""

    def parse_known_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None):
        words = [w.split("=")[0].replace("--no-", "--") for w in (sys.argv[1:] if args is None else args)]
        twice = sorted({w for w in words if w.startswith("--") and words.count(w) > 1})
        require(not twice, f"{', '.join(twice)} is given twice; give it once, with all of its values")
        return super().parse_known_args(args, namespace)


def new_parser(doc: str) -> argparse.ArgumentParser:
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def add_flags(parser: argparse.ArgumentParser, title: str, rows: list[tuple]) -> None:
    """A group of flags, each (name, kind, default, help).

    Kinds: a type; a tuple of choices, one of them; a list of choices, any of them; [str], one or more words.
    """
    group = parser.add_argument_group(title)
    for name, kind, default, text in rows:
        options = {"required": True} if default is REQUIRED else {"default": default}
        options["help"] = text + ("" if default in (REQUIRED, None, "") else " (default: %(default)s)")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(kind, list):
            options |= {"nargs": "+", "type": str} if kind == [str] else {"nargs": "*", "choices": kind}
        else:
            options |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        group.add_argument(name, **options)


def to_argv(**flags: object) -> list[str]:
    """What argparse reads as these flags: `None` is left out, `True` is --flag, `False` is --no-flag."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


KD = "teacher_dtype targets alpha beta gamma relation delta".split()  # the flags that follow


def add_kd_flags(parser: argparse.ArgumentParser, alpha: float, beta: float, gamma: float, relation: str,
                 source: str) -> None:
    """The weights of Eqs. (6) and (7) of LLaVA-KD and the form of L_rel, with a stage's own defaults."""
    add_flags(parser, "distillation", [
        ("--teacher_dtype", ("auto", "bf16", "fp32"), "auto", "of the teacher's weights; auto: as --dtype"),
        ("--targets", ["response", "visual", "prompt"], ["response", "visual"],
         "rows whose distribution is distilled (MDist); KD Table 4"),
        ("--alpha", weight, alpha, f"weight of L_res (CKD: L_txt); {source}"),
        ("--beta", weight, beta, f"weight of L_vis; {source}"),
        ("--gamma", weight, gamma, f"weight of L_rel (RDist; CKD: L_cos), 0: off; {source}"),
        ("--relation", ("matrix", "columns"), relation, "L_rel of R whole, KD Eq. 5; by column, CKD Eq. 6"),
        ("--delta", weight, 1.0, "weight of the prompt's KL, if it is a target"),
    ])


def drop_kd(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Let a stage without a teacher distil nothing. A flag of distillation beside its default is an error."""
    for flag in KD:
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} is of distillation, which needs --teacher")
    args.targets, args.gamma = [], 0.0


def kd_weights(args: argparse.Namespace) -> tuple[float, float, float]:
    """alpha, beta, delta: the weights of L_res, L_vis, L_prompt, 0 for rows that --targets leaves out."""
    weights = {"response": args.alpha, "visual": args.beta, "prompt": args.delta}
    return tuple(weight if kind in args.targets else 0.0 for kind, weight in weights.items())


def add_training_flags(parser: argparse.ArgumentParser, lr: float, batch: int, epochs: int, warmup: float,
                       source: str) -> None:
    """The flags that every stage has, with the stage's own defaults; `source` says where those come from."""
    add_flags(parser, "data", [
        ("--data", [str], REQUIRED, "one or more files of samples in LLaVA format, .json or .jsonl"),
        ("--images", str, ".", "folder that the image paths in DATA start from"),
        ("--max_len", positive, 2048, "longest sequence in tokens, with all visual tokens; as LLaVA-1.5"),
        ("--group_by_modality", bool, True, "image and text-only samples in separate batches; as LLaVA-1.5"),
        ("--skip_bad", natural, 0, "leave out up to this many samples that are malformed or cannot be read"),
        ("--workers", natural, 4, "data processes per rank"),
    ])
    add_flags(parser, "training", [
        ("--lr", weight, lr, f"peak learning rate; {source}"),
        ("--global_batch", positive, batch, f"samples per optimizer step, over all ranks; {source}"),
        ("--micro_batch", positive, 4, "samples per rank and forward pass: as many as fit into memory"),
        ("--epochs", positive, epochs, "passes over the data; as in the papers"),
        ("--max_steps", natural, 0, "end after this many steps, 0: no limit"),
        ("--warmup", share, warmup, "share of steps in which the rate rises, then a cosine; as LLaVA-1.5"),
        ("--weight_decay", weight, 0.0, "AdamW's; as LLaVA-1.5"),
        ("--max_grad_norm", weight, 1.0, "clip gradients to this norm, 0: off; as TinyLLaVA's trainer"),
        ("--seed", number(int, 0, 2**63 - 1), 0, "of new weights, the order of samples and router noise"),
        ("--dtype", ("auto", "bf16", "fp32"), "auto", "of arithmetic, weights stay fp32; auto: bf16 on CUDA"),
        ("--gradient_checkpointing", bool, False, "recompute the student's layers in the backward pass"),
        ("--shard", ("none", "optimizer"), "none", "optimizer: each rank keeps a share of AdamW's state"),
    ])
    add_flags(parser, "the run", [
        ("--out", str, REQUIRED, "folder for the checkpoint and log.jsonl"),
        ("--save_every", natural, 1000, "steps between training states in OUT/state, 0: the last alone"),
        ("--keep", positive, 2, "training states to keep"),
        ("--resume", bool, None, "default: an interrupted run in OUT goes on if its code and inputs are the "
         "same; --resume: even if they have changed; --no-resume: the run starts again"),
        ("--max_bad_steps", natural, 0, "leave out up to so many steps whose loss or gradient is not finite"),
    ])
