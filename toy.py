"""The lab: the papers' methods from nothing to scored students on two CPU cores, with no download.

    python toy.py                 draw the world, train the teacher, distil and score students, write a report
    python toy.py --method mod    LLaVA-MoD's steps; its rows join the report that is there
    python toy.py --method ckd    LLaVA-CKD's cascade, likewise
    python toy.py --seeds 3       the same with three students per method

The world and the pre-trained parts are those of toy_world.py. The stages are the real ones, called through
their command lines: what runs here is what runs on 8 GPUs. A second call reuses what is finished.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ckd
import dft
import dpt
import evaluate
import mod_distill
import sft
from flags import add_flags, cli, new_parser, positive
from toy_report import write_report
from toy_world import BASE, write_world

BATCH = 32
# Steps and peak learning rate of each stage. Teachers see 4,000 scenes; students 400 ("few") or 4,000.
TEACHER_PT, TEACHER_SFT = (400, 3e-3), (1500, 1e-3)
PT, FT, PD = (400, 3e-3), (400, 2e-3), (100, 5e-4)
FT_LONG = (650, 2e-3)  # the control's last stage: as many seconds as the teacher costs the method


class Lab:
    """Runs stages in a folder, each at most once, and keeps score."""

    def __init__(self, out: Path):
        self.out, self.world, self.rows = out, out / "world", []
        if not (self.world / "describe.jsonl").exists():
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

    def cascade(self, name: str, seed: int, *teachers: str, **flags: str) -> list[str]:
        """A whole cascade on few scenes through ckd.py; returns the folders of its stages."""
        out = self.out / f"seed{seed}/400/{name}"
        flags |= SMALL | {
            "pretrain_data": self.world / "pretrain_few.json", "pretrain_lr": PT[1], "pretrain_batch": BATCH,
            "finetune_data": self.world / "finetune_few.json", "finetune_lr": FT[1], "finetune_batch": BATCH,
            "images": self.world / "images", "out": out, "max_steps": PT[0], "epochs": 1000, "seed": seed,
            "micro_batch": BATCH, "max_len": 128, "workers": 0,
        }  # fmt: skip
        argv = [item for flag, value in flags.items() for item in (f"--{flag}", str(value))]
        ckd.main(["--teachers", *teachers, "--no-caption_only", *argv])
        return [str(out / folder) for folder in json.loads((out / "cascade.json").read_text())["done"]]

    def score(self, method: str, seed: int, scenes: int, stages: list[str], describe: bool = False) -> None:
        """Add a row: the held-out accuracy of the last stage's model, steps and seconds of all its stages,
        and where asked how it describes the held-out scenes.
        """
        row = {
            "method": method,
            "seed": seed,
            "scenes": scenes,
            **self._ask(stages[-1], "questions", "exact"),
        }
        if describe:
            said = self._ask(stages[-1], "describe", "hallucination")
            row |= {key: said[key] for key in ("response_rate", "mention_rate", "recall")}
        row["steps"] = sum(len(open(f"{s}/log.jsonl").readlines()) for s in stages)
        seconds = sum(json.loads(Path(s, "run.json").read_text())["seconds"] for s in stages)
        self.rows.append(row | {"seconds": round(seconds, 1), "stages": stages})

    def _ask(self, model: str, questions: str, metric: str) -> dict:
        folder = self.out / ("eval" if metric == "exact" else metric) / Path(model).relative_to(self.out)
        if not (folder / "scores.json").exists():
            longest = "6" if metric == "exact" else "18"
            evaluate.main(["--model", model, "--questions", str(self.world / f"{questions}.jsonl"),
                           "--images", str(self.world / "images"), "--out", str(folder), "--batch", "200",
                           "--metric", metric, "--max_new_tokens", longest])  # fmt: skip
        (scores,) = json.loads((folder / "scores.json").read_text()).values()
        return scores


LARGE = {"vision": BASE / "siglip", "llm": BASE / "qwen-large"}
MIDDLE = {"vision": BASE / "siglip", "llm": BASE / "qwen-middle"}
SMALL = {"vision": BASE / "siglip", "llm": BASE / "qwen-small"}


def teacher_of(lab: Lab) -> list[str]:
    """The stages of the teacher that answers questions."""
    pt = lab.stage(dpt.main, "teacher/pt", "pretrain", TEACHER_PT, 0, **LARGE)
    return [pt, lab.stage(sft.main, "teacher/sft", "finetune", TEACHER_SFT, 0, student=pt)]


def kd(lab: Lab, seeds: int) -> None:
    """LLaVA-KD: the teacher, the two baselines and the method, on few scenes; one line on many."""
    pt, teacher = teacher_of(lab)
    lab.score("Teacher", 0, 4000, [pt, teacher])
    for seed in range(seeds):
        for scenes, few in (400, "_few"), (4000, ""):
            if scenes == 4000 and seed > 0:
                continue
            at, captions, questions = f"seed{seed}/{scenes}", f"pretrain{few}", f"finetune{few}"
            pt = lab.stage(dpt.main, f"{at}/pt", captions, PT, seed, **SMALL)
            ft = lab.stage(sft.main, f"{at}/pt-sft", questions, FT, seed, student=pt)
            ft2 = lab.stage(sft.main, f"{at}/pt-sft-sft", questions, FT_LONG, seed + 100, student=ft)
            d = lab.stage(dpt.main, f"{at}/dpt", captions, PT, seed, teacher=teacher, **SMALL)
            ds = lab.stage(sft.main, f"{at}/dpt-sft", questions, FT, seed, student=d)
            df = lab.stage(
                dft.main, f"{at}/dpt-sft-dft", questions, FT, seed + 100, student=ds, teacher=teacher
            )
            lab.score("PT+SFT", seed, scenes, [pt, ft])
            lab.score("PT+SFT+SFT", seed, scenes, [pt, ft, ft2])
            lab.score("DPT+SFT+DFT", seed, scenes, [d, ds, df])


def mod(lab: Lab, seeds: int) -> None:
    """LLaVA-MoD on few scenes: initialisation, D2D, D2S, PD, and the controls of its Tables 4, 5, 8 and 15.

    Its teacher is one that describes as well as it answers; preferences are about descriptions.
    """
    pt = lab.stage(dpt.main, "teacher/pt", "pretrain", TEACHER_PT, 0, **LARGE)
    teacher = lab.stage(sft.main, "teacher/mixed", "mixed", TEACHER_SFT, 0, student=pt)
    lab.score("MoD's teacher", 0, 4000, [pt, teacher], describe=True)
    for seed in range(seeds):
        at, again = f"seed{seed}/400", seed + 100
        pt = lab.stage(dpt.main, f"{at}/pt", "pretrain_few", PT, seed, **SMALL)

        def mimic(name: str, seed: int, student: str, step: str, at: str = at, **flags: str) -> str:
            teaches = {} if flags.get("kl") == 0 else {"teacher": teacher}
            return lab.stage(mod_distill.main, f"{at}/{name}", "mixed_few", FT, seed, student=student,
                             step=step, **teaches, **flags)  # fmt: skip

        def prefer(po: str, student: str, at: str = at, seed: int = seed) -> str:
            return lab.stage(mod_distill.main, f"{at}/{po}", "preference_few", PD, seed, student=student,
                             step="pd", teacher=teacher, po=po)  # fmt: skip

        dense = mimic("d2d", seed, pt, "d2d")
        sparse = mimic("d2s", again, dense, "d2s")
        sparse1 = mimic("d2s-e4t1", again, dense, "d2s", top_k=1)
        dense2 = mimic("d2d-d2d", again, dense, "d2d", ar=1)
        plain = lab.stage(sft.main, f"{at}/mixed-sft", "mixed_few", FT, seed, student=pt)
        plain2 = mimic("sparse-sft", again, plain, "d2s", kl=0)
        kto, dpo = prefer("kto", sparse), prefer("dpo", sparse)
        for method, stages in {
            "D2D": [pt, dense], "D2D+D2S": [pt, dense, sparse], "D2D+D2S, E4T1": [pt, dense, sparse1],
            "D2D+D2D, dense": [pt, dense, dense2], "SFT+SFT, sparse": [pt, plain, plain2],
            "D2D+D2S+KTO": [pt, dense, sparse, kto], "D2D+D2S+DPO": [pt, dense, sparse, dpo],
        }.items():  # fmt: skip
            lab.score(method, seed, 400, stages, describe=True)


def cascade(lab: Lab, seeds: int) -> None:
    """LLaVA-CKD on few scenes: bottom-up, top-down (Table 3), and LLaVA-KD from each teacher alone.

    A cascade's first round is LLaVA-KD from its first teacher; the teacher twice is the control for time.
    """
    pt, teacher = teacher_of(lab)
    ta_pt = lab.stage(dpt.main, "assistant/pt", "pretrain", TEACHER_PT, 0, **MIDDLE)
    assistant = lab.stage(sft.main, "assistant/sft", "finetune", TEACHER_SFT, 0, student=ta_pt)
    lab.score("Teacher", 0, 4000, [pt, teacher])
    lab.score("CKD's assistant", 0, 4000, [ta_pt, assistant])
    for seed in range(seeds):
        bottom_up = lab.cascade("bottom-up", seed, assistant, teacher)
        top_down = lab.cascade("top-down", seed, assistant, teacher, strategy="top-down",
                               assistant_llms=MIDDLE["llm"])  # fmt: skip
        twice = lab.cascade("teacher-twice", seed, teacher, teacher)
        for method, stages in {
            "KD by the assistant": bottom_up[:3], "KD by the teacher": twice[:3],
            "KD by the teacher, twice": twice, "CKD, top-down": top_down, "CKD, bottom-up": bottom_up,
        }.items():  # fmt: skip
            lab.score(method, seed, 400, stages)


METHODS = {"kd": kd, "mod": mod, "ckd": cascade}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "lab", [("--method", tuple(METHODS), "kd", "whose steps to run"),
                              ("--out", str, "out/toy", "folder for everything"),
                              ("--seeds", positive, 1, "students per method")])  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    lab = Lab(Path(args.out))
    METHODS[args.method](lab, args.seeds)
    print(f"\n{write_report(lab.out, lab.world, lab.rows)}\n\nreport: {lab.out / 'report.md'}")


if __name__ == "__main__":
    cli(main)
