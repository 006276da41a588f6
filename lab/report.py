"""A picture of runs of any stage, from their logs.

python -m lab.report out/sft out/dft           draws every number that log.jsonl holds, run against run
python -m lab.report out --picture all.png     all runs that lie anywhere in `out`
"""

from pathlib import Path
from statistics import fmean

from support.flags import add_flags, cli, new_parser, require
from support.index import records


def draw_runs(logs: dict[str, list[dict]], path: Path) -> None:
    """A panel for each number in the logs, a line for each run."""
    from matplotlib.figure import Figure

    names = dict.fromkeys(name for log in logs.values() for name in log[0] if name != "step")
    n_rows = -(-len(names) // 4)
    figure = Figure(figsize=(17, 3 * n_rows), layout="constrained")
    for k, name in enumerate(names, 1):
        axis = figure.add_subplot(n_rows, 4, k, title=name, xlabel="step")
        for run, log in logs.items():
            points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
            n = 1 + len(points) // 50  # steps that share a dot, their mean
            shares = [points[i : i + n] for i in range(0, len(points), n)]
            steps, values = ([fmean(point[k] for point in share) for share in shares] for k in (0, 1))
            axis.plot(steps, values, ".-", label=run)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("out", nargs="+", help="folders of runs, as given to --out, or that hold some")
    add_flags(parser, "the picture", [("--picture", str, "out/report.png", "where to draw it")])
    args, logs = parser.parse_args(argv), {}
    for folder in args.out:
        paths = sorted(Path(folder).rglob("log.jsonl"))
        found = {str(path.parent): [line for _, line in records(path)] for path in paths}
        some = any(found.values())
        require(some, f"no log.jsonl in {folder} or below it has a line: give the --out of a stage")
        logs |= {run: log for run, log in found.items() if log}
    draw_runs(logs, Path(args.picture))
    print(f"{len(logs)} run(s) drawn: {args.picture}")


if __name__ == "__main__":
    cli(main)
