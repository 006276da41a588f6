"""The lab's report: one table of all methods that were run, what it says, loss curves, answers to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import evaluate
from support.metrics import exact_match, hallucination, read_vocabulary

# Every row there can be, in the table's order, and its colour.
COLORS = {
    "Teacher": "#6b7280", "PT+SFT": "#93c5fd", "PT+SFT+SFT": "#2563eb", "DPT+SFT+DFT": "#ea580c",
    "CKD's assistant": "#9ca3af", "KD by the assistant": "#fdba74", "KD by the teacher": "#fb923c",
    "KD by the teacher, twice": "#f97316", "CKD, top-down": "#f59e0b", "CKD, bottom-up": "#b45309",
    "MoD's teacher": "#6b7280", "D2D": "#a7f3d0", "D2D+D2D, dense": "#6ee7b7", "SFT+SFT, sparse": "#93c5fd",
    "D2D+D2S, E4T1": "#34d399", "D2D+D2S": "#059669", "D2D+D2S+DPO": "#c084fc", "D2D+D2S+KTO": "#7c3aed",
}  # fmt: skip
# (scenes, method, baseline, field, what the papers say of it)
COMPARISONS = [
    (400, "DPT+SFT+DFT", "PT+SFT", "accuracy", "KD Table 2"),
    (400, "DPT+SFT+DFT", "PT+SFT+SFT", "accuracy", "KD Table 2, at equal time"),
    (4000, "DPT+SFT+DFT", "PT+SFT", "accuracy", "KD Table 2"),
    (4000, "DPT+SFT+DFT", "PT+SFT+SFT", "accuracy", "KD Table 2, at equal time"),
    (400, "CKD, bottom-up", "CKD, top-down", "accuracy", "CKD Table 3"),
    (400, "CKD, bottom-up", "KD by the teacher", "accuracy", "CKD Table 1"),
    (400, "CKD, bottom-up", "KD by the teacher, twice", "accuracy", "CKD Table 1, at equal training"),
    (400, "CKD, bottom-up", "KD by the assistant", "accuracy", "CKD, what the second teacher adds"),
    (400, "D2D+D2S", "SFT+SFT, sparse", "accuracy", "MoD Table 5: KD against SFT"),
    (400, "D2D+D2S, E4T1", "D2D+D2D, dense", "accuracy", "MoD Table 8: sparse against dense"),
    (400, "D2D+D2S+KTO", "D2D+D2S", "response_rate", "MoD Table 4: preference distillation"),
    (400, "D2D+D2S+KTO", "D2D+D2S", "mention_rate", "MoD Table 4: preference distillation"),
    (400, "D2D+D2S+KTO", "D2D+D2S", "accuracy", "MoD Table 3: preference distillation"),
    (400, "D2D+D2S+KTO", "D2D+D2S+DPO", "response_rate", "MoD Table 16: KTO against DPO"),
]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def is_teacher(method: str) -> bool:
    return method in ("Teacher", "MoD's teacher", "CKD's assistant")


def groups(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Rows of one method on one number of scenes, the seeds together; in the order of COLORS."""
    keys = sorted({(list(COLORS).index(r["method"]), r["scenes"]) for r in rows})
    named = [(list(COLORS)[m], n) for m, n in keys]
    return {key: [r for r in rows if (r["method"], r["scenes"]) == key] for key in named}


def table(rows: list[dict]) -> str:
    kinds = list(rows[0]["by_category"])
    said = {"response_rate": "lies, answers", "mention_rate": "lies, objects", "recall": "recall"}
    head = ["method", "scenes", "accuracy", *kinds, *said.values(), "steps", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (method, scenes), group in groups(rows).items():
        accuracy = f"**{mean([r['accuracy'] for r in group]):.1f}**"
        if len(group) > 1:
            accuracy += " (" + ", ".join(f"{r['accuracy']:.1f}" for r in group) + ")"
        cells = [method, f"{scenes:,}", accuracy]
        cells += [f"{mean([r['by_category'][k] for r in group]):.0f}" for k in kinds]
        cells += [f"{mean([r[k] for r in group]):.1f}" if k in group[0] else "" for k in said]
        cells += [str(group[0]["steps"]), f"{mean([r['seconds'] for r in group]):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(rows: list[dict]) -> list[str]:
    """How methods compare, seed by seed, one sentence each, with what the papers compare so."""
    names = {
        "accuracy": "accuracy",
        "response_rate": "answers with a lie",
        "mention_rate": "objects that are lies",
    }
    by_key, lines = groups(rows), []
    for scenes, method, baseline, field, claim in COMPARISONS:
        a, b = (by_key.get((m, scenes), []) for m in (method, baseline))
        if not a or not b:
            continue
        theirs = {r["seed"]: r[field] for r in b}
        gaps = [r[field] - theirs[r["seed"]] for r in a if r["seed"] in theirs]
        won = sum(gap > 0 if field == "accuracy" else gap < 0 for gap in gaps)
        lines.append(f"{claim}: {method} is {mean(gaps):+.1f} points in {names[field]} against {baseline} on "
                     f"{scenes:,} scenes (better in {won} of {len(gaps)} seeds).")  # fmt: skip
    return lines


# ---------------------------------------------------------------------------------- pictures


def draw_curves(rows: list[dict], path: Path) -> None:
    """Losses over the steps of all stages, and held-out accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = groups(rows)
    size = (12, max(4.4, 0.32 * len(shown) + 1))
    figure, (left, right) = plt.subplots(1, 2, figsize=size)
    for row in rows:
        if row["seed"] == 0 and row["scenes"] == 400 and row["method"] in CURVES:
            logs = [json.loads(line) for stage in row["stages"] for line in open(f"{stage}/log.jsonl")]
            nll = [next(line[k] for k in ("l_pt", "l_reg", "l_ar", "loss") if k in line) for line in logs]
            smooth = [mean(nll[max(0, k - 20) : k + 1]) for k in range(len(nll))]
            left.plot(smooth, label=row["method"], color=COLORS[row["method"]], linewidth=1.4)
    title = "Eq. (1) while training on 400 scenes, all stages"
    left.set(title=title, xlabel="step", ylabel="nats per token", yscale="log")
    left.legend(frameon=False)
    names = [m if is_teacher(m) else f"{m}, {n:,} scenes" for m, n in shown]
    heights = [mean([r["accuracy"] for r in g]) for g in shown.values()]
    bars = right.barh(range(len(shown)), heights, color=[COLORS[m] for m, _ in shown])
    right.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    for k, group in enumerate(shown.values()):
        right.plot([r["accuracy"] for r in group], [k] * len(group), ".", color="black", markersize=5)
    right.set_yticks(range(len(shown)), names, fontsize=8)
    right.invert_yaxis()
    right.set(title="accuracy on questions about 1,000 held-out scenes, %", xlim=(0, 100))
    for axis in left, right:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


CURVES = ("PT+SFT+SFT", "DPT+SFT+DFT", "D2D+D2S", "SFT+SFT, sparse")
ANSWERS = ("Teacher", "PT+SFT", *CURVES)


def draw_answers(
    rows: list[dict], out: Path, world: Path, folder: str, questions: list[dict], name: str, right: Callable
) -> None:
    """Eight questions with what the models answered."""
    answers = {}
    for row in rows:
        file = (
            out / folder / Path(row["stages"][-1]).relative_to(out) / f"{Path(row['stages'][-1]).name}.jsonl"
        )
        wanted = row["method"] in ANSWERS if folder == "eval" else "response_rate" in row
        if row["seed"] == 0 and (is_teacher(row["method"]) or row["scenes"] == 400) and wanted:
            answers[row["method"]] = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    if answers:
        evaluate.draw_sample(out / name, questions[:8], answers, str(world / "images"), right)


# ---------------------------------------------------------------------------------- the report


def write_report(out: Path, world: Path, new: list[dict]) -> str:
    """Add the rows to those of earlier calls and write report.json, report.md and the pictures."""
    path, key = out / "report.json", lambda r: (r["method"], r["scenes"], r["seed"])
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [r for r in old if key(r) not in map(key, new)] + new
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    draw_curves(rows, out / "curves.png")
    for folder, file, kind, name, metric in (
        ("eval", "questions", "exact", "sample.png", exact_match),
        ("hallucination", "describe", "hallucination", "descriptions.png", hallucination),
    ):
        questions, _ = evaluate.read_questions(world / f"{file}.jsonl", str(world / "images"), kind)
        if kind == "hallucination":
            read_vocabulary(questions, None)
        draw_answers(rows, out, world, folder, questions, name, metric)
    said = "\n".join(f"- {line}" for line in verdicts(rows))
    described = "\n![descriptions by every model](descriptions.png)\n" * (out / "descriptions.png").exists()
    (out / "report.md").write_text(f"""# The toy world

{table(rows)}

Accuracy in percent on held-out scenes, the mean over seeds and each seed's; steps and seconds are those of
all stages of a method together. PT+SFT+SFT is the control for training time: its last stage is longer, by
what the teacher costs the method. Lies: descriptions that name an object that is not there, and the share
of such among the objects named; recall: the share of the scene's objects that are named.

{said}

Teachers saw 4,000 scenes in every row. On 400 scenes one can teach the student what it knows of others; on
4,000 both saw the same, and the student is merely smaller.

![losses and accuracies](curves.png)

![questions with the answers of every model](sample.png)
{described}""")
    return table(rows) + "\n\n" + said
