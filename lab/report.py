"""The runs of any stage in one picture, from their logs.

python -m lab.report out/sft out/dft           draws every number that log.jsonl holds, run against run
python -m lab.report out --picture all.png     all runs that lie anywhere in `out`
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean as mean

from support.flags import add_flags, cli, new_parser, require


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
