"""The papers' methods in a toy world: from nothing to scored students on two CPU cores, without a download.

    python toy.py                 draw the world, train a teacher, distil and score students, write a report
    python toy.py --method mod    the same for LLaVA-MoD; its rows join the report that is there
    python toy.py --method ckd    the same for LLaVA-CKD
    python toy.py --seeds 3       train every student three times, from three random starts

The stages are the real ones, called by their command lines. A second call keeps what is finished and was made
by the same code.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from pathlib import Path
from types import ModuleType

import ckd
import dft
import dpt
import evaluate
import mod_distill
import sft
from lab import world
from lab.report import write_report
from support.flags import add_flags, cli, new_parser, positive, to_argv
from support.run import code_of

BATCH = 32
# Steps and peak learning rate of each stage. Teachers see 4,000 scenes; students 400 ("few") or 4,000.
TEACHER_PT, TEACHER_SFT = (400, 3e-3), (1500, 1e-3)
PT, FT, PD = (400, 3e-3), (400, 2e-3), (100, 5e-4)
FT_LONG = (650, 2e-3)  # the control's last stage: as many seconds as the teacher costs the method
SETTINGS = {"epochs": 1000, "micro_batch": BATCH, "max_len": 128, "workers": 0}
LARGE, MIDDLE, SMALL = ({"vision": world.BASE / "siglip", "llm": world.BASE / f"qwen-{size}"}
                        for size in ("large", "middle", "small"))  # fmt: skip


code = functools.cache(code_of)


def is_fresh(record: Path, script: str, inputs: list[Path]) -> bool:
    """Whether a JSON record says that it was made by the code that `script` has now, after all `inputs`."""
    if not record.exists() or json.loads(record.read_text()).get("code") != code(script):
        return False
    return all(record.stat().st_mtime_ns >= i.stat().st_mtime_ns for i in inputs if i.exists())


class Lab:
    """Runs stages in a folder, again if their code or what they start from has changed, and keeps score."""

    def __init__(self, out: Path):
        self.out, self.world, self.rows = out, out / "world", []
        if not is_fresh(self.world / "made.json", world.__file__, []):
            print(f"drawing the world in {self.world}")
            shutil.rmtree(self.world, ignore_errors=True)
            world.write_world(self.world)
            (self.world / "made.json").write_text(json.dumps({"code": code(world.__file__)}))

    def stage(self, script: ModuleType, name: str, data: str, plan: tuple[int, float], seed: int,
              **flags: object) -> str:  # fmt: skip
        """Call a stage script's main with the toy's settings; returns the folder of its checkpoint."""
        out, (steps, lr) = self.out / name, plan
        inputs = [Path(flags[k]) / "run.json" for k in ("student", "teacher") if k in flags]
        if not is_fresh(out / "run.json", script.__file__, [*inputs, self.world / "made.json"]):
            shutil.rmtree(out, ignore_errors=True)
        flags |= SETTINGS | {"data": self.world / f"{data}.json", "images": self.world / "images", "out": out}
        flags |= {"lr": lr, "max_steps": steps, "global_batch": BATCH, "seed": seed}
        if script is dpt:  # the tiny language models know "describe" as a question, which captions answer
            flags["caption_only"] = False
        script.main(to_argv(**flags))
        return str(out)

    def cascade(self, name: str, seed: int, *teachers: str, **flags: object) -> list[str]:
        """A whole cascade on few scenes through ckd.py; returns the folders of its stages."""
        out = self.out / f"seed{seed}/400/{name}"
        inputs = [*(Path(t) / "run.json" for t in teachers), self.world / "made.json"]
        for record in out.glob("*/*/run.json"):
            if not is_fresh(record, f"{record.parent.name}.py", inputs):
                shutil.rmtree(out)
                break
        flags |= SETTINGS | SMALL | {"teachers": list(teachers), "images": self.world / "images", "out": out}
        for stage, lr in ("pretrain", PT[1]), ("finetune", FT[1]):
            data = self.world / f"{stage}_few.json"
            flags |= {f"{stage}_data": data, f"{stage}_lr": lr, f"{stage}_batch": BATCH}
        argv = to_argv(**flags, caption_only=False, max_steps=PT[0], seed=seed)
        ckd.main(argv)
        return [argv[-1] for _, argv in ckd.plan(*ckd.parse_args(argv))]

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
        if not is_fresh(folder / "made.json", evaluate.__file__, [Path(model, "run.json")]):
            evaluate.main(to_argv(
                model=model, questions=self.world / f"{questions}.jsonl", images=self.world / "images",
                out=folder, batch=200, metric=metric, max_new_tokens=6 if metric == "exact" else 18,
            ))  # fmt: skip
            (folder / "made.json").write_text(json.dumps({"code": code(evaluate.__file__)}))
        (scores,) = json.loads((folder / "scores.json").read_text()).values()
        return scores


def teacher_of(lab: Lab) -> list[str]:
    """The stages of the teacher that answers questions."""
    pt = lab.stage(dpt, "teacher/pt", "pretrain", TEACHER_PT, 0, **LARGE)
    return [pt, lab.stage(sft, "teacher/sft", "finetune", TEACHER_SFT, 0, student=pt)]


def kd(lab: Lab, seeds: int) -> None:
    """LLaVA-KD: the teacher, the two baselines and the method, on few scenes; one line on many."""
    pt, teacher = teacher_of(lab)
    lab.score("Teacher", 0, 4000, [pt, teacher])
    for seed in range(seeds):
        for scenes, few in ((400, "_few"), (4000, ""))[: 2 if seed == 0 else 1]:
            at, captions, questions = f"seed{seed}/{scenes}", f"pretrain{few}", f"finetune{few}"
            pt = lab.stage(dpt, f"{at}/pt", captions, PT, seed, **SMALL)
            ft = lab.stage(sft, f"{at}/pt-sft", questions, FT, seed, student=pt)
            ft2 = lab.stage(sft, f"{at}/pt-sft-sft", questions, FT_LONG, seed + 100, student=ft)
            d = lab.stage(dpt, f"{at}/dpt", captions, PT, seed, teacher=teacher, **SMALL)
            ds = lab.stage(sft, f"{at}/dpt-sft", questions, FT, seed, student=d)
            df = lab.stage(dft, f"{at}/dpt-sft-dft", questions, FT, seed + 100, student=ds, teacher=teacher)
            lab.score("PT+SFT", seed, scenes, [pt, ft])
            lab.score("PT+SFT+SFT", seed, scenes, [pt, ft, ft2])
            lab.score("DPT+SFT+DFT", seed, scenes, [d, ds, df])


def mod(lab: Lab, seeds: int) -> None:
    """LLaVA-MoD on few scenes: initialisation, D2D, D2S, PD, and the controls of its Tables 4, 5, 8 and 15.

    Its teacher is one that describes as well as it answers; preferences are about descriptions.
    """
    pt = lab.stage(dpt, "teacher/pt", "pretrain", TEACHER_PT, 0, **LARGE)
    teacher = lab.stage(sft, "teacher/mixed", "mixed", TEACHER_SFT, 0, student=pt)
    lab.score("MoD's teacher", 0, 4000, [pt, teacher], describe=True)
    for seed in range(seeds):
        at, again = f"seed{seed}/400", seed + 100
        pt = lab.stage(dpt, f"{at}/pt", "pretrain_few", PT, seed, **SMALL)

        def mimic(name: str, seed: int, student: str, step: str, at: str = at, **flags: str) -> str:
            teaches = {} if flags.get("kl") == 0 else {"teacher": teacher}
            return lab.stage(mod_distill, f"{at}/{name}", "mixed_few", FT, seed, student=student,
                             step=step, **teaches, **flags)  # fmt: skip

        def prefer(po: str, student: str, at: str = at, seed: int = seed) -> str:
            return lab.stage(mod_distill, f"{at}/{po}", "preference_few", PD, seed, student=student,
                             step="pd", teacher=teacher, po=po)  # fmt: skip

        dense = mimic("d2d", seed, pt, "d2d")
        sparse = mimic("d2s", again, dense, "d2s")
        sparse1 = mimic("d2s-e4t1", again, dense, "d2s", top_k=1)
        dense2 = mimic("d2d-d2d", again, dense, "d2d", ar=1)
        plain = lab.stage(sft, f"{at}/mixed-sft", "mixed_few", FT, seed, student=pt)
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
    ta_pt = lab.stage(dpt, "assistant/pt", "pretrain", TEACHER_PT, 0, **MIDDLE)
    assistant = lab.stage(sft, "assistant/sft", "finetune", TEACHER_SFT, 0, student=ta_pt)
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
    add_flags(parser, "the experiment", [
        ("--method", tuple(METHODS), "kd", "the paper: LLaVA-KD, LLaVA-MoD (mod) or LLaVA-CKD (ckd)"),
        ("--out", str, "out/toy", "folder for the world, all runs and the report"),
        ("--seeds", positive, 1, "how often each student is trained, each time from another random start"),
    ])  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    lab = Lab(Path(args.out))
    METHODS[args.method](lab, args.seeds)
    print(f"\n{write_report(lab.out, lab.world, lab.rows)}\n\nreport: {lab.out / 'report.md'}")


if __name__ == "__main__":
    cli(main)
