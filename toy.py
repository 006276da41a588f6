"""The lab: LLaVA-KD from nothing to a scored student on two CPU cores, in minutes, with no download.

    python toy.py              draw the world, train the teacher, distil and score students, write a report
    python toy.py --seeds 3    the same with three students per method

The world and the pre-trained parts are those of toy_world.py. The stages are the real ones, called through
their command lines: what runs here is what runs on 8 GPUs. A second call reuses what is finished.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import dft
import dpt
import evaluate
import sft
from common import add_flags, cli, new_parser, positive
from toy_world import BASE, write_world

BATCH = 32
# Steps and peak learning rate of each stage. Teachers see 4,000 scenes; students 400 ("few") or 4,000.
TEACHER_PT, TEACHER_SFT = (400, 3e-3), (1500, 1e-3)
PT, FT = (400, 3e-3), (400, 2e-3)
FT_LONG = (
    650,
    2e-3,
)  # the control's last stage: as many seconds as the teacher costs the method in DPT and DFT


class Lab:
    """Runs stages in a folder, each at most once, and keeps score."""

    def __init__(self, out: Path):
        self.out, self.world, self.rows = out, out / "world", []
        if not (self.world / "questions.jsonl").exists():
            print(f"drawing the world in {self.world}")
            write_world(self.world)

    def stage(
        self, main: callable, name: str, data: str, plan: tuple[int, float], seed: int, **flags: str
    ) -> str:
        """Call a stage script's main with the toy's settings; returns the folder of its checkpoint."""
        steps, lr = plan
        flags |= {
            "data": self.world / f"{data}.json", "images": self.world / "images", "out": self.out / name,
            "lr": lr, "max_steps": steps, "epochs": 1000, "global_batch": BATCH, "micro_batch": BATCH,
            "seed": seed, "max_len": 128, "workers": 0,
        }  # fmt: skip
        argv = [item for flag, value in flags.items() for item in (f"--{flag}", str(value))]
        # The tiny language models know the chat template and the word "describe": captions are answers to it.
        main(argv + ["--no-caption_only"] * (main is dpt.main))
        return str(self.out / name)

    def score(self, method: str, seed: int, scenes: int, stages: list[str]) -> None:
        """Add a row: the held-out accuracy of the last stage's model, steps and seconds of all its stages."""
        folder = self.out / "eval" / Path(stages[-1]).relative_to(self.out)
        if not (folder / "scores.json").exists():
            evaluate.main(["--model", stages[-1], "--questions", str(self.world / "questions.jsonl"),
                           "--images", str(self.world / "images"), "--out", str(folder), "--batch", "200",
                           "--max_new_tokens", "6"])  # fmt: skip
        (scores,) = json.loads((folder / "scores.json").read_text()).values()
        logs = [[json.loads(line) for line in open(f"{s}/log.jsonl")] for s in stages]
        seconds = sum(json.loads(Path(s, "run.json").read_text())["seconds"] for s in stages)
        row = {"method": method, "seed": seed, "scenes": scenes, **scores, "steps": sum(map(len, logs))}
        self.rows.append(row | {"seconds": round(seconds, 1), "stages": stages})


def kd(lab: Lab, seeds: int) -> None:
    """LLaVA-KD: the teacher, the two baselines and the method, on few scenes; one line on many."""
    large = {"vision": BASE / "siglip", "llm": BASE / "qwen-large"}
    small = {"vision": BASE / "siglip", "llm": BASE / "qwen-small"}
    pt = lab.stage(dpt.main, "teacher/pt", "pretrain", TEACHER_PT, 0, **large)
    teacher = lab.stage(sft.main, "teacher/sft", "finetune", TEACHER_SFT, 0, student=pt)
    lab.score("Teacher", 0, 4000, [pt, teacher])
    for seed in range(seeds):
        for scenes, few in (400, "_few"), (4000, ""):
            if scenes == 4000 and seed > 0:
                continue
            at, captions, questions = f"seed{seed}/{scenes}", f"pretrain{few}", f"finetune{few}"
            pt = lab.stage(dpt.main, f"{at}/pt", captions, PT, seed, **small)
            ft = lab.stage(sft.main, f"{at}/pt-sft", questions, FT, seed, student=pt)
            ft2 = lab.stage(sft.main, f"{at}/pt-sft-sft", questions, FT_LONG, seed + 100, student=ft)
            d = lab.stage(dpt.main, f"{at}/dpt", captions, PT, seed, teacher=teacher, **small)
            ds = lab.stage(sft.main, f"{at}/dpt-sft", questions, FT, seed, student=d)
            df = lab.stage(
                dft.main, f"{at}/dpt-sft-dft", questions, FT, seed + 100, student=ds, teacher=teacher
            )
            lab.score("PT+SFT", seed, scenes, [pt, ft])
            lab.score("PT+SFT+SFT", seed, scenes, [pt, ft, ft2])
            lab.score("DPT+SFT+DFT", seed, scenes, [d, ds, df])


# ---------------------------------------------------------------------------------- the report

METHODS = ["Teacher", "PT+SFT", "PT+SFT+SFT", "DPT+SFT+DFT"]
COLORS = {"Teacher": "#6b7280", "PT+SFT": "#93c5fd", "PT+SFT+SFT": "#2563eb", "DPT+SFT+DFT": "#ea580c"}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def groups(rows: list[dict]) -> dict[tuple[int, str], list[dict]]:
    """Rows of one method on one number of scenes, the seeds together; scarce data first."""
    keys = sorted({(r["scenes"], METHODS.index(r["method"])) for r in rows if r["method"] != "Teacher"})
    keys = [(4000, 0), *keys]
    return {
        (n, METHODS[m]): [r for r in rows if (r["scenes"], r["method"]) == (n, METHODS[m])] for n, m in keys
    }


def table(rows: list[dict]) -> str:
    kinds = list(rows[0]["by_category"])
    lines = [
        f"| method | scenes | accuracy | {' | '.join(kinds)} | steps | seconds |",
        "|---" * (len(kinds) + 5) + "|",
    ]
    for (scenes, method), group in groups(rows).items():
        accuracy = f"**{mean([r['accuracy'] for r in group]):.1f}**"
        if len(group) > 1:
            accuracy += " (" + ", ".join(f"{r['accuracy']:.1f}" for r in group) + ")"
        scores = " | ".join(f"{mean([r['by_category'][k] for r in group]):.0f}" for k in kinds)
        seconds = mean([r["seconds"] for r in group])
        lines.append(
            f"| {method} | {scenes:,} | {accuracy} | {scores} | {group[0]['steps']} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def verdict(rows: list[dict], scenes: int) -> str:
    """How the method compares with each baseline, seed by seed, in one sentence."""
    by_method = {
        m: [r["accuracy"] for r in g] for (n, m), g in groups(rows).items() if n == scenes or m == "Teacher"
    }
    parts = []
    for baseline in "PT+SFT", "PT+SFT+SFT":
        gaps = [a - b for a, b in zip(by_method["DPT+SFT+DFT"], by_method[baseline])]
        won = sum(gap > 0 for gap in gaps)
        parts.append(f"{mean(gaps):+.1f} points against {baseline} (better in {won} of {len(gaps)} seeds)")
    return f"With {scenes:,} scenes for the student, DPT+SFT+DFT is {' and '.join(parts)}."


def draw_curves(rows: list[dict], path: Path) -> None:
    """Losses over the steps of all stages, and held-out accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    for row in rows:
        if row["seed"] == 0 and row["scenes"] == 400 and row["method"] != "PT+SFT":  # the start of PT+SFT+SFT
            logs = [json.loads(line) for stage in row["stages"] for line in open(f"{stage}/log.jsonl")]
            nll = [
                line.get("l_pt", line.get("l_reg", line["loss"])) for line in logs
            ]  # Eq. (1) in every stage
            smooth = [mean(nll[max(0, k - 20) : k + 1]) for k in range(len(nll))]
            left.plot(smooth, label=row["method"], color=COLORS[row["method"]], linewidth=1.4)
    left.set(
        title="Eq. (1) while training on 400 scenes (PT, SFT, last stage)",
        xlabel="step",
        ylabel="nats per token",
    )
    left.set_yscale("log")
    left.legend(frameon=False)
    shown = groups(rows)
    names = ["Teacher" if m == "Teacher" else m.replace("+", "\n+") + f"\n{n:,} scenes" for n, m in shown]
    heights = [mean([r["accuracy"] for r in g]) for g in shown.values()]
    bars = right.bar(range(len(shown)), heights, color=[COLORS[m] for _, m in shown])
    right.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    for k, group in enumerate(shown.values()):
        right.plot([k] * len(group), [r["accuracy"] for r in group], ".", color="black", markersize=5)
    right.set_xticks(range(len(shown)), names, fontsize=7)
    right.set(title="accuracy on questions about 1,000 held-out scenes, %", ylim=(0, 100))
    for axis in left, right:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(lab: Lab) -> str:
    out, rows = lab.out, lab.rows
    (out / "report.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    draw_curves(rows, out / "curves.png")
    picked = evaluate.read_questions(lab.world / "questions.jsonl", str(lab.world / "images"), "label")[:8]
    answers = {}
    for row in rows:
        if row["seed"] == 0 and (row["method"] == "Teacher" or row["scenes"] == 400):
            folder = out / "eval" / Path(row["stages"][-1]).relative_to(out)
            lines = (folder / f"{Path(row['stages'][-1]).name}.jsonl").read_text().splitlines()
            answers[row["method"]] = [json.loads(line)["text"] for line in lines]
    evaluate.draw_sample(out / "sample.png", picked, answers, str(lab.world / "images"), evaluate.exact_match)
    text = f"""# The toy world

{table(rows)}

Accuracy in percent on held-out scenes, the mean over seeds and each seed's; steps and seconds are those of
all stages of a method together.
PT+SFT+SFT is the control for training time: its last stage is longer, by what the teacher costs the method.

{verdict(rows, 400)}
{verdict(rows, 4000)}

The teacher saw 4,000 scenes in every row. On 400 scenes it can teach the student what it knows of others; on
4,000 both saw the same, and the student is merely smaller.

![losses and accuracies](curves.png)

![questions with the answers of every model](sample.png)
"""
    (out / "report.md").write_text(text)
    return table(rows) + "\n\n" + verdict(rows, 400) + "\n" + verdict(rows, 4000)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "lab", [("--out", str, "out/toy", "folder for everything"),
                              ("--seeds", positive, 1, "students per method")])  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    lab = Lab(Path(args.out))
    kd(lab, args.seeds)
    print(f"\n{write_report(lab)}\n\nreport: {lab.out / 'report.md'}")


if __name__ == "__main__":
    cli(main)
