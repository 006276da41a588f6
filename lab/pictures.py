"""Pictures of questions with what models answered."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

from support.checks import load_image


def draw_sample(
    path: Path, questions: list[dict], answers: dict[str, list[str]], image_root: str, metric: Callable | None
) -> None:
    """Images with question, reference and every model's answer, as KD's Fig. 3; green: right by `metric`."""
    from matplotlib.figure import Figure

    columns, rows = min(4, len(questions)), -(-len(questions) // 4)
    height = 0.75 + 0.34 * len(answers)  # of the text
    figure = Figure(figsize=(3.4 * columns, (3.4 + height) * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3.4, height] * rows)
    for axis in axes.flat:
        axis.axis("off")
    for k, q in enumerate(questions):
        picture, below = axes[2 * (k // columns) : 2 * (k // columns) + 2, k % columns]
        if q["images"]:
            picture.imshow(load_image(q["where"], image_root, q["images"][0]), interpolation="nearest")
        picture.set_title(wrap(q["text"]), fontsize=10, loc="left")
        reference = str(q.get("label", "; ".join(map(str, q.get("answers") or q.get("objects") or []))))
        lines = [(f"reference: {reference}", "black")]
        for name, given in answers.items():
            right = metric is None or metric([q], [given[k]])["accuracy"] > 50
            lines.append((f"{name}: {given[k]}", "#15803d" if right else "#b91c1c"))
        for i, (text, color) in enumerate(lines):
            below.text(0, 1 - i / len(lines), wrap(text), fontsize=9, color=color, va="top")
    figure.savefig(path, dpi=110)


def wrap(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")
    return textwrap.fill(textwrap.shorten(text, 84, placeholder=" ..."), 42)
