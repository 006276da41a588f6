"""The runs of any stage in one picture, from their logs; and the toy world's report.

python -m lab.report out/sft out/dft           draws every number that log.jsonl holds, run against run
python -m lab.report out --picture all.png     all runs that lie anywhere in `out`
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean as mean

import evaluate
from support.flags import add_flags, cli, new_parser, require
from support.metrics import exact_match, hallucination, read_vocabulary

# ---------------------------------------------------------------------------------- the logs of any runs


def find_logs(folders: Iterable[str]) -> dict[str, list[dict]]:
    """The lines of every log.jsonl in the folders and below them, by the name of the run."""
    logs = {}
    for folder in folders:
        found = sorted(Path(folder).rglob("log.jsonl"))
        require(found, f"there is no log.jsonl in {folder} or below it: give the --out of a stage")
        for path in found:
            lines = path.read_text().splitlines()
            try:
                logs[str(path.parent)] = [json.loads(line) for line in lines]
            except ValueError:
                require(False, f"{path} holds a line that is no JSON: a run that goes on cuts it off")
    return {name: log for name, log in logs.items() if log}


def draw_runs(logs: dict[str, list[dict]], path: Path) -> None:
    """A panel for each number in the logs, a line for each run; a panel of its own for a run's experts."""
    from matplotlib.figure import Figure

    names = dict.fromkeys(name for log in logs.values() for name in log[0] if not name.startswith("expert_"))
    last = [name for name in ("grad_norm", "lr", "tokens_per_s") if name in names]
    panels = [name for name in names if name not in (*last, "step")] + last
    sparse = [run for run, log in logs.items() if "expert_0" in log[0]]
    n = len(panels) + len(sparse)
    columns, n_rows = min(4, n), -(-n // 4)
    figure = Figure(figsize=(4.2 * columns, 2.9 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, columns, squeeze=False)
    for axis in axes.flat[n:]:
        axis.axis("off")
    for axis, name in zip(axes.flat, panels):
        for k, (run, log) in enumerate(logs.items()):
            draw_line(axis, log, name, color=f"C{k % 10}", label=run)
        positive = name not in last[1:] and axis.get_lines() and axis.dataLim.ymin > 0
        axis.set(title=name, xlabel="step", yscale="log" if positive else "linear")
    for axis, run in zip(axes.flat[len(panels) :], sparse):
        for name in (name for name in logs[run][0] if name.startswith("expert_")):
            draw_line(axis, logs[run], name, label=name)
        axis.set(title=f"share of the tokens, {run}", xlabel="step", ylim=(0, None))
        axis.legend(frameon=False, fontsize=7)
    lines = axes.flat[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=min(3, len(logs)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_line(axis, log: list[dict], name: str, **style: object) -> None:
    """A number over the steps: as it was, pale, and its mean over the last fiftieth of the run."""
    lines = [line for line in log if line.get(name) is not None]
    steps, values = ([line[key] for line in lines] for key in ("step", name))
    n = max(1, len(values) // 50)
    smooth = [mean(values[max(0, k - n + 1) : k + 1]) for k in range(len(values))]
    (line,) = axis.plot(steps, smooth, linewidth=1.4, marker="." if len(steps) == 1 else None, **style)
    axis.plot(steps, values, linewidth=0.6, alpha=0.25, color=line.get_color())


# ---------------------------------------------------------------------------------- the toy world's report

# Every row that there can be, in the table's order, and what it is compared with at equal training.
ROWS = {
    "Teacher": None, "PT+SFT": None, "PT+SFT+SFT": "PT+SFT", "DPT+SFT+DFT": "PT+SFT+SFT",
    "CKD's assistant": None, "KD by the assistant": None, "KD by the teacher": "KD by the assistant",
    "KD by the teacher, twice": "KD by the teacher", "CKD, top-down": "KD by the teacher, twice",
    "CKD, bottom-up": "CKD, top-down", "MoD's teacher": None, "D2D": None, "D2D+D2D, dense": "D2D",
    "SFT+SFT, sparse": None, "D2D+D2S, E4T1": "D2D+D2D, dense", "D2D+D2S": "SFT+SFT, sparse",
    "D2D+D2S+DPO": "D2D+D2S", "D2D+D2S+KTO": "D2D+D2S",
}  # fmt: skip
LIES = {"response_rate": "lies, answers", "mention_rate": "lies, objects", "recall": "recall"}
LEGEND = """\
Accuracy in percent on held-out scenes: the mean over the seeds of the student's training, and each seed's.
Gain: points over another method on the same scenes and seeds, and in how many seeds it was the better one.
Steps and seconds are those of all stages of a method together. Lies: descriptions that name an object that is
not there, and the share of such among the objects named; recall: the share of the scene's objects named.
Teachers saw 4,000 scenes in every row."""
# The pictures show these methods, on so many scenes: questions, how to score, where answers are, name.
DRAWN = {"Teacher": 4000, "MoD's teacher": 4000, "PT+SFT": 400, "PT+SFT+SFT": 400, "DPT+SFT+DFT": 400,
         "SFT+SFT, sparse": 400, "D2D+D2S": 400, "D2D+D2S+DPO": 400, "D2D+D2S+KTO": 400}  # fmt: skip
PICTURES = [("questions", "exact", "eval", exact_match, "sample.png"),
            ("describe", "hallucination", "hallucination", hallucination, "descriptions.png")]  # fmt: skip


def table(rows: list[dict]) -> str:
    """A line for each method and number of scenes, the seeds together; gains are over the same seeds."""
    kinds, lines = list(rows[0]["by_category"]), []
    head = ["method", "scenes", "accuracy", "gain", *kinds, *LIES.values(), "steps", "seconds"]
    by_key: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda r: (list(ROWS).index(r["method"]), r["scenes"])):
        by_key.setdefault((row["method"], row["scenes"]), {})[row["seed"]] = row
    for (method, scenes), seeds in by_key.items():
        group, base = list(seeds.values()), by_key.get((ROWS[method], scenes), {})
        gains = [row["accuracy"] - base[s]["accuracy"] for s, row in seeds.items() if s in base]
        accuracy = f"**{mean(r['accuracy'] for r in group):.1f}**"
        if len(group) > 1:
            accuracy += " (" + ", ".join(f"{r['accuracy']:.1f}" for r in group) + ")"
        better = f"on {ROWS[method]}, {sum(gain > 0 for gain in gains)} of {len(gains)}"
        cells = [method, f"{scenes:,}", accuracy, f"{mean(gains):+.1f} {better}" if gains else ""]
        cells += [f"{mean(r['by_category'][k] for r in group):.0f}" for k in kinds]
        cells += [f"{mean(r[k] for r in group):.1f}" if k in group[0] else "" for k in LIES]
        lines.append([*cells, str(group[0]["steps"]), f"{mean(r['seconds'] for r in group):.0f}"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def write_report(out: Path, world: Path, new: list[dict]) -> str:
    """Add the rows to those of earlier calls and write report.json, report.md and the pictures."""
    path, key = out / "report.json", lambda r: (r["method"], r["scenes"], r["seed"])
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [r for r in old if key(r) not in map(key, new)] + new
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    shown = [r for r in rows if r["seed"] == 0 and r["scenes"] == DRAWN.get(r["method"])]
    logs = find_logs(dict.fromkeys(stage for r in shown for stage in r["stages"]))
    draw_runs({run.removeprefix(f"{out}/"): log for run, log in logs.items()}, out / "curves.png")
    for file, kind, folder, metric, picture in PICTURES:
        questions, _ = evaluate.read_questions(world / f"{file}.jsonl", str(world / "images"), kind)
        answers = {}
        if kind == "hallucination":
            read_vocabulary(questions, None)
        for row in shown:
            stage = Path(row["stages"][-1])
            said = out / folder / stage.relative_to(out) / f"{stage.name}.jsonl"
            if said.exists():
                answers[row["method"]] = [json.loads(line)["text"] for line in said.read_text().splitlines()]
        if answers:
            evaluate.draw_sample(out / picture, questions[:8], answers, str(world / "images"), metric)
    pictures = [f"![{p.stem}]({p.name})" for p in sorted(out.glob("*.png"))]
    parts = ["# The toy world", table(rows), LEGEND, *pictures]
    (out / "report.md").write_text("\n\n".join(parts) + "\n")
    return table(rows)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("out", nargs="+", help="folders of runs, as given to --out, or that hold some")
    add_flags(parser, "the picture", [("--picture", str, "out/report.png", "where to draw it")])
    args = parser.parse_args(argv)
    logs = find_logs(args.out)
    require(logs, "none of these runs has done a step yet: their log.jsonl are empty")
    draw_runs(logs, Path(args.picture))
    print(f"{len(logs)} run(s) drawn: {args.picture}")


if __name__ == "__main__":
    cli(main)
