"""Figures of a table's rows; and what its numbers do not show: which expert serves which kind of token, of
the first seed's models, on scenes of the training data.

    python -m lab.figures docs/results/ceiling-*.json --picture ceiling.png    curves, a panel for each file
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import moe
from data import Batch, LlavaData
from lab.intervals import grouped, interval
from lab.letters import LETTERS
from lab.tables import Table, table_named
from lab.world import COLORS, PLACES, SHAPES
from model import Llava
from support.flags import add_flags, cli, new_parser

N = 300  # samples that are looked at, three of a scene
KINDS = ("image: object", "image: nothing", "colour", "shape", "place", "other words")
Groups = dict[tuple[str, int], list[dict]]  # the seeds of each row and number of scenes


def draw_bars(axis: Axes, table: Table, groups: Groups) -> None:
    for k, ((name, _), group) in enumerate(groups.items()):
        mean, half = interval([row["accuracy"] for row in group])
        axis.barh(k, mean, xerr=half, color="#93c5fd" if name in table.rows else "#d4d4d4", capsize=3)
        axis.text(mean + (0 if math.isnan(half) else half), k, f"  {mean:.1f}", va="center", fontsize=9)
    axis.set(yticks=range(len(groups)), yticklabels=[name for name, _ in groups])
    axis.set_xlabel("accuracy, %" + ", with its 95 % interval" * (len(next(iter(groups.values()))) > 1))
    axis.invert_yaxis()
    axis.set_xlim(right=1.1 * axis.get_xlim()[1])  # room for the numbers


def draw_lines(axis: Axes, table: Table, groups: Groups) -> None:
    """Against scenes; "curves" against FLOPs, each with the rows whose names differ in their last word, a
    number of steps.
    """
    lines, names, against_flops = {}, list(table.rows), table.figure == "curves"
    for (name, scenes), group in groups.items():
        if name not in names:  # a teacher
            mean, _ = interval([row["accuracy"] for row in group])
            axis.axhline(mean, color="k", ls=":", lw=1, label=name)
        else:
            beside = scenes * (1 + 0.03 * names.index(name))  # so that no interval hides another
            line, x = (name.rsplit(" ", 1)[0], group[0]["tflop"]) if against_flops else (name, beside)
            lines.setdefault(line, []).append((x, *interval([row["accuracy"] for row in group])))
    for name, points in lines.items():
        axis.errorbar(*zip(*sorted(points)), marker="o", ms=4, capsize=3, label=name)
    axis.set(xscale="log", xlabel="TFLOP of all stages" if against_flops else "scenes that the student sees",
             ylabel="accuracy, %")
    if against_flops:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
    else:
        axis.set_xticks(table.scenes, [f"{n:,}" for n in table.scenes])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)


def draw_differences(axis: Axes, table: Table, groups: Groups) -> None:
    """Of claims that all have the same worse row, at each number of scenes."""
    for k, scenes in enumerate(table.scenes):
        pairs = [zip(groups[better, scenes], groups[worse, scenes]) for better, worse in table.claims]
        gains = [[a["accuracy"] - b["accuracy"] for a, b in pair] for pair in pairs]
        means, halves = zip(*map(interval, gains))
        places = [i + 0.25 * k for i in range(len(gains))]
        axis.errorbar(means, places, xerr=halves, fmt="o", ms=4, capsize=3, label=f"{scenes:,} scenes")
    axis.axvline(0, color="k", ls=":", lw=1)
    axis.set(yticks=range(len(gains)), yticklabels=[better for better, _ in table.claims])
    axis.set_xlabel(f"points above {table.claims[0][1]}; each 95 % interval for itself, not corrected")
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8)


def drawing_of(table: Table, groups: Groups) -> tuple[Callable[[Axes, Table, Groups], None], float]:
    """How to draw it, and how many inches that needs: lines where the number of scenes or of steps varies."""
    if table.figure == "differences":
        return draw_differences, 0.42 * len(table.claims) + 1.4
    if table.figure == "curves" or len(table.scenes) > 1:
        return draw_lines, 4.6
    return draw_bars, 0.42 * len(groups) + 1.4


def draw_tables(tables: list[tuple[Table, Groups]], path: Path) -> None:
    """A panel for each table, all lines with one scale."""
    columns, n_rows = min(2, len(tables)), -(-len(tables) // 2)
    drawings, heights = zip(*(drawing_of(*shown) for shown in tables))
    figure = Figure(figsize=(4 + 4 * columns, max(heights) * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, columns, sharey=set(drawings) == {draw_lines}, squeeze=False).flat
    for axis, draw, (table, groups) in zip(axes, drawings, tables):
        draw(axis, table, groups)
        axis.set_title(table.title, fontsize=10)
    figure.savefig(path, dpi=110)


def kinds_of(model: Llava, batch: Batch, captions: list[str]) -> torch.Tensor:
    """The number in KINDS of every token (B, T); -1 for padding."""
    tokens = model.processor.tokenizer.convert_ids_to_tokens(range(512))
    words = [(token or "").replace("Ġ", "") for token in tokens]
    places = {word for place in PLACES for word in place.split()}
    of_word = [2 if w in COLORS else 3 if w in SHAPES + LETTERS else 4 if w in places else 5 for w in words]
    kinds = torch.tensor(of_word)[batch.input_ids].masked_fill(batch.attention_mask == 0, -1)
    for row, (caption, visual) in enumerate(zip(captions, batch.visual)):
        there = torch.tensor([place in caption for place in PLACES]).view(2, 2)  # the 2 x 2 grid of cells
        patches = there.repeat_interleave(2, 0).repeat_interleave(2, 1)  # and the 4 x 4 patches that see it
        kinds[row, visual] = (~patches).long().flatten()
    return kinds


@torch.no_grad()
def draw_experts(models: dict[str, Path], world: Path, path: Path) -> None:
    """The first sparse layer of every sparse model: what share of a kind's choices each expert is."""
    loaded = {name: Llava.from_checkpoint(str(model)) for name, model in models.items()}
    sparse = {name: model.eval() for name, model in loaded.items() if moe.is_sparse(model)}
    records = json.loads((world / "mixed.json").read_text())[:N]
    captions = [records[i - i % 3]["conversations"][1]["value"] for i in range(len(records))]
    args = argparse.Namespace(data=f"{world}/mixed.json", images=f"{world}/images", skip_bad=0, max_len=128)
    figure = Figure(figsize=(3 * len(sparse) + 1.2, 3), layout="constrained")
    axes = figure.subplots(1, len(sparse), sharey=True, squeeze=False)
    for axis, (name, model) in zip(axes.flat, sparse.items()):
        data = LlavaData(args, model)
        batch = data.collate([data[i] for i in range(len(records))])
        moe.prepare(model)
        moe.watch(model, batch.attention_mask)
        model(batch.input_ids, model.encode_images(batch.pixel_values))
        router, kinds = moe.modules(model, moe.Router)[0], kinds_of(model, batch, captions).flatten()
        n = router.num_experts
        chosen = [router.chosen[kinds == k].flatten().bincount(minlength=n) for k in range(6)]
        shares = torch.stack([count / count.sum() for count in chosen])  # (kinds, E)
        axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (k, e), share in zip(torch.cartesian_prod(*map(torch.arange, shares.shape)), shares.flatten()):
            axis.text(e, k, f"{100 * share:.0f}", ha="center", va="center", color="w" if share > 0.6 else "k")
        axis.set(yticks=range(6), yticklabels=KINDS, xticks=range(n), xlabel="expert")
        axis.set_title(name, fontsize=9)
    figure.suptitle("percent of a kind's choices that go to each expert, first sparse layer", fontsize=10)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of rows, as toy.py writes them")
    add_flags(parser, "the picture", [("--picture", str, "out/curves.png", "where to draw it")])
    args = parser.parse_args(argv)
    tables = [(table_named(path.stem), grouped(json.loads(path.read_text())["rows"])) for path in args.files]
    draw_tables(tables, Path(args.picture))


if __name__ == "__main__":
    cli(main)
