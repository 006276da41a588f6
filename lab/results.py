"""What the rows of a table amount to: means with intervals, paired differences, verdicts, and a page."""

import json
import math
import platform
import statistics
import subprocess
from pathlib import Path

import torch

from lab.figures import draw_tables
from lab.intervals import grouped, holm, interval, p_value
from lab.tables import Table, table_named
from lab.world import POPE, SKILLS
from support.run import ROOT

LIES = {"response_rate": "lies, answers", "mention_rate": "lies, objects"}  # the less the better
COLUMNS = (*SKILLS, "unseen", *(f"POPE {kind}" for kind in POPE), *LIES, "recall",
           *(f"{what}, {rows}" for what in ("agree", "KL") for rows in ("answers", "images")))
LEGEND = """\
Accuracy: percent of right answers about pictures that no model was trained on (most show what some training
picture shows too), the mean over the seeds with its 95 % interval; then by skill. Unseen: questions about an
object whose colour and shape no training scene has together. POPE: "is there a W ?", half of them with a W in
the picture, else W is any other word, the most common one, or the one that most often accompanies what is
there. Lies: percent of descriptions that name an object that is not there, and of the objects named; recall:
percent of the objects that are named (CHAIR). Agree: how often, in percent of the rows, student and teacher
find the same token likeliest; KL: of the teacher's distribution to the student's, in nats. Both are over the
answers of 1,000 questions, which are given, and over the images. Seconds (of one core, the median, without
reading samples) and TFLOP (the teacher's forward passes included) are those of all stages of a row together.
A row with * is ours: the paper's table has none.

Intervals are Student's t over the seeds, which differ in the student's scenes, its new projector and the
order of samples; a teacher is trained once, unless the title says that each seed has its own. A claim is
**reproduced** or **reversed** if the 95 % interval of the paired difference leaves out 0; else it is
undecided, with the number of seeds with which it would be decided if mean and spread stayed as they are.
Cost: seconds and FLOPs of the first row, by those of the second. Fix the number of seeds beforehand: to add
some until there is a verdict finds too many."""
ONE = ("One seed has no interval and gives no verdict. Rows of other seeds differ by some points: "
       "take --seeds 3 or more.")


def verdict(gains: list[float], p: float) -> str:
    """Of paired differences, positive where the claim is right, by the p-value of their mean alone."""
    mean = statistics.fmean(gains)
    if p < 0.05:
        return "**reproduced**" if mean > 0 else "**reversed**"
    if len(gains) < 2:
        return "undecided"
    n = next((n for n in range(len(gains) + 1, 1001) if p_value(gains, n) < 0.05), None)
    return f"undecided ({n} seeds would)" if n else "undecided (1,000 seeds would not)"


def plus_minus(values: list[float], sign: str = "", digits: int = 1) -> str:
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def markdown(lines: list[list[str]]) -> str:
    with_rule = lines[0], ["---"] * len(lines[0]), *lines[1:]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in with_rule)


def costs_of(group: list[dict]) -> tuple[float, float]:
    return statistics.median(row["seconds"] for row in group), group[0]["tflop"]


def table_of(rows: list[dict]) -> str:
    columns = [column for column in COLUMNS if column in rows[0]]
    names = (LIES.get(column, column) for column in columns)
    lines = [["stages", "scenes", "accuracy", *names, "steps", "seconds", "TFLOP"]]
    for (method, scenes), group in grouped(rows).items():
        found = {column: [row[column] for row in group] for column in columns}
        values = [f"{statistics.fmean(found[c]):.0f}" if c in SKILLS
                  else plus_minus(found[c], digits=3 if c.startswith("KL") else 1) for c in columns]
        seconds, tflop = costs_of(group)
        accuracy = f"**{plus_minus([r['accuracy'] for r in group])}**"
        costs = [f"{group[0]['steps']:,}", f"{seconds:.0f}", f"{tflop:.2f}"]
        lines.append([method, f"{scenes:,}", accuracy, *values, *costs])
    return markdown(lines)


def verdicts_of(table: Table, rows: list[dict]) -> str:
    """A line for each claim and number of scenes; Holm's correction is over the claims of one number."""
    lines = [["claim", "in", "scenes", "difference, 95 % interval", "right in", "cost",
              "p" + ", Holm" * table.holm, "verdict"]]
    groups = grouped(rows)
    for scenes in table.scenes:
        found = []
        for claim in table.claims:
            better, worse, name = (*claim, "accuracy")[:3]
            sign, word = (-1, "lower") if name in LIES else (1, "higher")
            first, second = groups[better, scenes], groups[worse, scenes]
            gains = [sign * (a[name] - b[name]) for a, b in zip(first, second, strict=True)]  # seed by seed
            ratios = (f"{a / b:.2f}" for a, b in zip(costs_of(first), costs_of(second)))
            found.append((gains, [
                f"{better} {word} than {worse}", LIES.get(name, name), f"{scenes:,}",
                plus_minus([sign * gain for gain in gains], "+"),
                f"{sum(gain > 0 for gain in gains)} of {len(gains)}", ", ".join(ratios),
            ]))
        p = [p_value(gains) for gains, _ in found]
        for (gains, line), value in zip(found, holm(p) if table.holm else p):
            lines.append([*line, f"{value:.4f}", verdict(gains, value)])
    return markdown(lines)


def machine() -> str:
    """This machine's processor, by whose instructions sums are rounded, and what runs on it."""
    try:
        names = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        name = f"{len(names)} cores of {names[0].split(':')[1].strip()}"
    except (OSError, IndexError):
        name = platform.processor() or platform.machine()
    name = f"{name} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}"


def page_of(name: str, made: str, rows: list[dict], pictures: dict[str, str]) -> str:
    """The page of a table in a world, as `table_named` knows them."""
    table = table_named(name)
    seeds = sorted({row["seed"] for row in rows if row["method"] in table.rows})
    parts = [f"# {table.title}", table_of(rows)]
    parts += [verdicts_of(table, rows)] if table.claims else []
    parts += [ONE] if len(seeds) == 1 else []
    parts += [f"![{title}]({file})" for file, title in pictures.items()]
    return "\n\n".join([*parts, f"Seeds {', '.join(map(str, seeds))}. {made}"])


def write_page(out: Path, name: str, rows: list[dict], command: list[str], seconds: float,
               pictures: dict[str, str]) -> str:
    """Write a table's rows as JSON, its figure, and its page, which is returned."""
    table, how = table_named(name), f"`{' '.join(['python toy.py', *command])}`"
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    code = subprocess.run(ask, capture_output=True, text=True).stdout.strip() or "unknown"
    made = f"Made by {how} in {seconds / 60:.0f} minutes, but for what was there; commit {code}; {machine()}."
    draw_tables([(table, grouped(rows))], out / f"{name}.png")
    pictures = {f"{name}.png": table.title} | pictures
    head = json.dumps({"made": made, "pictures": pictures}, indent=1)
    lines = ",\n  ".join(map(json.dumps, rows))
    (out / f"{name}.json").write_text(f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
    page = page_of(name, made, rows, pictures)
    (out / f"{name}.md").write_text(f"{page}\n\n{LEGEND}\n")
    return page
