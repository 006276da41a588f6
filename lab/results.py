"""What the rows of a table amount to: means with intervals, paired differences, verdicts, figures.

Intervals are Student's t over the seeds: each seed draws other scenes for the student, another projector and
another order. A difference is paired, since both rows have the same scenes and orders; the test questions are
the same for all.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
from itertools import product
from pathlib import Path

import torch

from lab import figures
from lab.tables import TABLES, Table
from lab.world import POPE, SKILLS
from support.run import ROOT

# The 97.5 % point of Student's t for 1 to 10 degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
LOWER = ("response_rate", "mention_rate")  # the less the better
COLUMNS = {
    "unseen": "unseen", **{f"POPE {kind}": f"POPE {kind}" for kind in POPE},
    "response_rate": "lies, answers", "mention_rate": "lies, objects", "recall": "recall",
}
LEGEND = """\
Accuracy: percent of right answers about pictures that no model was trained on (most show what some training
picture shows too), the mean over the seeds with its 95 % interval; then by skill. Unseen: questions about an
object whose colour and shape no training scene has together. POPE: "is there a W ?", half of them with a W in
the picture, else W is any other word, the most common one, or the one that most often accompanies what is
there. Lies: percent of descriptions that name an object that is not there, and of the objects named; recall:
percent of the objects that are named (CHAIR). Seconds (the median, without reading samples) and TFLOP (the
teacher's forward passes included) are those of all stages of a row together.

Intervals are Student's t over the seeds, which differ in the student's scenes, its new projector and the
order of samples; a teacher is trained once. A claim is **reproduced** or **reversed** if the 95 % interval of
the paired difference leaves out 0; else it is undecided, with the number of seeds with which it would be
decided if mean and spread stayed as they are. Fix the number of seeds beforehand: to add some until there is
a verdict finds too many."""


def t_975(freedom: int) -> float:
    """The 97.5 % point of Student's t; beyond the table by its expansion, right to two digits."""
    return T[freedom - 1] if freedom <= len(T) else 1.96 + 2.3723 / freedom + 2.8225 / freedom**2


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval, which for one value is infinite."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return mean, math.inf
    return mean, t_975(n - 1) * statistics.stdev(values) / math.sqrt(n)


def verdict(gains: list[float]) -> str:
    """Of paired differences, positive where the claim is right, by their interval alone."""
    mean, half = interval(gains)
    if abs(mean) > half:
        return "**reproduced**" if mean > 0 else "**reversed**"
    if len(gains) < 2:
        return "undecided"
    spread = statistics.stdev(gains)
    seeds = (n for n in range(len(gains) + 1, 1001) if t_975(n - 1) * spread / math.sqrt(n) < abs(mean))
    n = next(seeds, None)
    return f"undecided ({n} seeds would)" if n else "undecided (1,000 seeds would not)"


def measure(row: dict, name: str) -> float | None:
    return row.get(name, row["by_category"].get(name))


def plus_minus(values: list[float], sign: str = "") -> str:
    mean, half = interval(values)
    return f"{mean:{sign}.1f}" + ("" if math.isinf(half) else f" ± {half:.1f}")


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (lines[0], ["---"] * len(lines[0]), *lines[1:])
    )


def grouped(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """The seeds of each row of the table and number of scenes."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in sorted(rows, key=lambda r: (r["scenes"], r["seed"])):
        groups.setdefault((row["method"], row["scenes"]), []).append(row)
    return groups


def table_of(rows: list[dict]) -> str:
    columns = [name for name in (*SKILLS, *COLUMNS) if measure(rows[0], name) is not None]
    names = [COLUMNS.get(column, column) for column in columns]
    lines = [["stages", "scenes", "accuracy", *names, "steps", "seconds", "TFLOP"]]
    for (method, scenes), group in grouped(rows).items():
        values = [plus_minus([measure(r, c) for r in group]) if c in COLUMNS
                  else f"{statistics.fmean(measure(r, c) for r in group):.0f}" for c in columns]
        seconds = statistics.median(r["seconds"] for r in group)
        costs = [f"{group[0]['steps']:,}", f"{seconds:.0f}", f"{group[0]['tflop']:.2f}"]
        accuracy = f"**{plus_minus([r['accuracy'] for r in group])}**"
        lines.append([method, f"{scenes:,}", accuracy, *values, *costs])
    return markdown(lines)


def verdicts_of(table: Table, rows: list[dict]) -> str:
    lines = [["claim", "in", "scenes", "difference, 95 % interval", "right in", "verdict"]]
    groups = grouped(rows)
    for claim, scenes in product(table.claims, table.scenes):
        better, worse, name = (*claim, "accuracy")[:3]
        sign, word = (-1, "lower") if name in LOWER else (1, "higher")
        pairs = zip(groups[better, scenes], groups[worse, scenes], strict=True)  # seed by seed
        differences = [measure(a, name) - measure(b, name) for a, b in pairs]
        gains = [sign * difference for difference in differences]
        right = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
        lines.append([f"{better} {word} than {worse}", COLUMNS.get(name, name), f"{scenes:,}",
                      plus_minus(differences, "+"), right, verdict(gains)])
    return markdown(lines)


def machine() -> str:
    """This machine's processor and what runs on it."""
    try:
        names = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = f"{len(names)} cores of {names[0].split(':')[1].strip()}"
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}"


def commit() -> str:
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip() or "unknown"


def draw(table: Table, rows: list[dict], path: Path) -> None:
    """Bars with intervals; lines, if the number of scenes varies."""
    from matplotlib.figure import Figure

    groups, names, one = grouped(rows), list(table.rows), len(table.scenes) == 1
    figure = Figure(figsize=(8, 0.42 * len(names) + 1.4 if one else 4.6), layout="constrained")
    axis = figure.subplots()
    for k, name in enumerate(names):
        points = [interval([row["accuracy"] for row in groups[name, n]]) for n in table.scenes]
        means, halves = [mean for mean, _ in points], [0 if math.isinf(half) else half for _, half in points]
        if one:
            axis.barh(k, means, xerr=halves, color="#93c5fd", capsize=3)
            axis.text(means[0] + halves[0], k, f"  {means[0]:.1f}", va="center", fontsize=9)
        else:
            scenes = [n * (1 + 0.03 * k) for n in table.scenes]  # so that no interval hides another
            axis.errorbar(scenes, means, halves, marker="o", capsize=3, label=name)
    axis.set_title(table.title, fontsize=10)
    if one:
        axis.set(yticks=range(len(names)), yticklabels=names, xlabel="accuracy, %, with its 95 % interval")
        axis.invert_yaxis()
        axis.set_xlim(right=1.1 * axis.get_xlim()[1])  # room for the numbers
    else:
        axis.set(xscale="log", xlabel="scenes that the student sees", ylabel="accuracy, %")
        axis.set_xticks(table.scenes, [f"{n:,}" for n in table.scenes])
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def write_report(out: Path, rows: list[dict], command: list[str], seconds: float) -> str:
    """Write all rows as JSON, and a page and figures for each table; returns the pages."""
    (out / "report.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    pages = []
    for name in dict.fromkeys(row["table"] for row in rows):
        table, mine = TABLES[name], [row for row in rows if row["table"] == name]
        seeds = sorted({row["seed"] for row in mine if row["method"] in table.rows})
        draw(table, mine, out / f"{name}.png")
        pictures = [f"![{table.title}]({name}.png)"]
        if table.figure:
            models = {row["method"]: row["stages"][-1] for row in mine
                      if row["seed"] == seeds[0] or row["method"] not in table.rows}
            picture = f"{name}-{table.figure}.png"
            getattr(figures, f"draw_{table.figure}")(models, out / "world", out / picture)
            pictures.append(f"![{table.figure}, seed {seeds[0]}]({picture})")
        claims = [verdicts_of(table, mine)] if table.claims else []
        how = f"`{' '.join(['python toy.py', *command])}`, {seconds / 60:.0f} minutes for what was not there"
        made = f"Made by {how}; seeds {', '.join(map(str, seeds))}; commit {commit()}; {machine()}."
        pages.append("\n\n".join([f"# {table.title}", table_of(mine), *claims, *pictures, made]))
        (out / f"{name}.md").write_text(f"{pages[-1]}\n\n{LEGEND}\n")
    report = "\n\n".join([*pages, LEGEND]) + "\n"
    (out / "report.md").write_text(report)
    return report
