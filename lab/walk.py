"""A guided reading: one step of a stage in the toy world, each statement with the shapes and values it made.

    python -m lab.walk dft    the other stages are dpt, sft, d2d, d2s and pd

The stage itself runs, on the CPU in fp32, and Python's tracer watches: there is no second copy of its code.
Statements that ran are shown in the order of the file. What one made more than once is shown once, where it
first had rows and was not 0. Both models are new and their projectors random: the walk is about shapes, and
says nothing about how well a model does. docs/walk.md is a walk; its test writes that page anew.
"""

import argparse
import ast
import contextlib
import re
import sys
import tempfile
from itertools import cycle
from pathlib import Path
from types import FrameType, ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

import dpt
import mod_distill
from lab.plan import STAGES
from lab.world import BASE, write_world
from moe import sparsify
from support.flags import cli, new_parser, to_argv


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("stage", choices=STAGES)
    return parser.parse_args(argv)


def prepare(name: str, root: Path) -> list[str]:
    """Make data and models for a stage in the folder; returns the stage's flags for one step with them."""
    write_world(root, n_train=8, n_test=0)
    for role, llm in ("student", "small"), ("teacher", "large"):
        torch.manual_seed(0)
        new = {"vision": f"{BASE}/siglip", "llm": f"{BASE}/qwen-{llm}", "template": "own"}
        model = dpt.new_student(argparse.Namespace(student=None, **new))
        if name == "pd" and role == "student":
            sparsify(model, experts=4, top_k=2, layers="every_other")
        model.save(root / role)
    return to_argv(
        step=name if name in mod_distill.STEPS else None, student=root / "student",
        teacher=root / "teacher" if name != "sft" else None, images=root / "images",
        data=root / ("preference.json" if name == "pd" else "mixed.json"), out=root / "out",
        max_steps=1, global_batch=4, micro_batch=4, max_len=128, workers=0, dtype="fp32",
    )


def show(name: str, x: object) -> dict[str, str]:
    """What it is by its name: a number, or a shape and a type if not fp32; each field of a tuple or dict."""
    if isinstance(x, Tensor) and x.dim():
        return {name: f"{tuple(x.shape)} {x.dtype}".replace("torch.", "").removesuffix(" float32")}
    if isinstance(x, Tensor | float | int):
        return {name: f"{x:.4g}"}
    fields = x._asdict() if hasattr(x, "_asdict") else x if isinstance(x, dict) else {}
    return dict(line for field, part in fields.items() for line in show(f"{name}.{field}", part).items())


def watch(stage: ModuleType, argv: list[str]) -> dict[tuple[int, int], dict[str, str]]:
    """Run the stage; what each statement that ran made, by name. A statement is named by its first line and
    the one after its last, or after its head's if others are in it.
    """
    spans, made, state = {}, {}, {}
    for node in ast.walk(ast.parse(Path(stage.__file__).read_text())):  # what is in others comes after them
        if isinstance(node, ast.stmt):
            start = min(part.lineno for part in (node, *getattr(node, "decorator_list", [])))
            end = node.body[0].lineno if hasattr(node, "body") else node.end_lineno + 1
            spans |= dict.fromkeys(range(start, end), (start, end))

    def trace(frame: FrameType, event: str, _: object):
        code = frame.f_code
        if code.co_filename != stage.__file__ or code.co_name == "parse_args" or code.co_name.startswith("<"):
            return None
        line, values = frame.f_lineno, dict(frame.f_locals)
        now = spans.get(line, (line, line + 1))  # `except` is in no statement of its own
        here, before = state.setdefault(frame, (now, {}))
        if now != here or event == "return":
            known = made.setdefault(here, {})
            for name, x in values.items():
                new = show(name, x) if x is not before.get(name, trace) else {}
                known |= {k: text for k, text in new.items() if known.get(k, "0") == "0" or "(0," in known[k]}
            state[frame] = now, values
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        stage.main(argv)
    finally:
        sys.settrace(old)
    return made


def walk(name: str) -> list[str]:
    """The lines that are printed: the numbers that letters in comments stand for, then the statements."""
    stage, lines, letters, done, last = STAGES[name], [], {}, 1, {}
    with (tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(sys.stderr),
          patch("torch.cuda.is_available", lambda: False), patch("support.index.CACHE", Path(root, "cache"))):
        made = watch(stage, prepare(name, Path(root)))
    source = ["", *Path(stage.__file__).read_text().splitlines()]
    for (start, end), values in sorted(made.items()):
        first = start
        while first > done and source[first - 1].strip().startswith(("#", "else:")):
            first -= 1
        lines += [f"{n:4d}  {source[n]}" for n in range(first, end)]
        pad = " " * (6 + len(source[start]) - len(source[start].lstrip()))
        lines += [f"{pad}-> {key} {text}" for key, text in values.items() if text != last.get(key)]
        comments = re.findall(r"\(([\w ]+,[\w ,]*)\)", source[end - 1].partition("# ")[2])
        shapes = [text[1:].split(")")[0] for text in values.values() if text.startswith("(")]
        for names, sizes in zip(cycle(comments), shapes):
            for letter, n in zip(names.strip(",").split(", "), sizes.strip(",").split(", ")):
                letters.setdefault(letter, {})[n] = None
        done, last = end, last | values
    legend = ", ".join(f"{letter} {' or '.join(sizes)}" for letter, sizes in letters.items())
    return [f"{'':6}Letters in comments: {legend}", *lines]


def main(argv: list[str] | None = None) -> None:
    print(*walk(parse_args(argv).stage), sep="\n")


if __name__ == "__main__":
    cli(main)
