"""The papers' tables in a toy world: what distillation gains, with error bars, on two CPU cores.

    python toy.py                     LLaVA-KD and its controls, once: world, teacher, students, scores, page
    python toy.py --seeds 5           five times, each with other scenes, starts and orders: verdicts
    python toy.py --world letters     in a second world, on which nothing was tuned
    python toy.py --table mod4 ckd3   other tables; `lab/tables.py` has them all, a row is a list of stages

The stages are the real ones, called with the flags of their command lines. Whatever rows share is trained
once. The same command goes on where it was stopped, and keeps what was made by the same code and flags.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from lab import letters, world
from lab.figures import draw_experts
from lab.results import write_page
from lab.tables import DEFAULTS, TABLES, TEACHERS, Table
from lab.tasks import Task, compare, count, do, note, score, stage_of, train
from support.flags import add_flags, cli, natural, new_parser, positive, require, to_argv
from support.run import ROOT, code_of

BATCH = 32
SETTINGS = {"global_batch": BATCH, "micro_batch": BATCH, "max_len": 128, "workers": 0}
SCRIPTS = {"pt": "dpt", "dpt": "dpt", "sft": "sft", "dft": "dft"}  # all others: steps of mod_distill
DATA = {"pt": "pretrain", "dpt": "pretrain", "pd": "preference"}  # all others: as the table says
OWN = argparse.ArgumentParser(allow_abbrev=False)  # flags of a stage that are the lab's own
OWN.add_argument("--llm", choices=sorted(p.name[5:] for p in world.BASE.glob("qwen-*")), default="small")
OWN.add_argument("--teacher", choices=list(TEACHERS), default="teacher")
OWN.add_argument("--fork", choices=sorted(p.stem for p in (ROOT / "docs/forks").glob("*.diff")))
OWN.add_argument("--teacher2", choices=list(TEACHERS))
WORLDS = {"shapes": (world, "out/toy"), "letters": (letters, "out/letters")}
code = functools.cache(code_of)


class Lab:
    """The world, and a plan of what is to be done in it: the stages and scores of rows."""

    def __init__(self, out: Path, source: ModuleType = world, own_teachers: bool = False):
        self.out, self.world, self.own_teachers, self.tasks = out, out / "world", own_teachers, {}
        parts = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(world.BASE.rglob("*.safetensors"))))
        made = {"code": code(source.__file__), "parts": parts.hexdigest()}
        drawn = Task(source.write_world, "", [], self.world, [], made)
        if not (drawn.is_made() and (self.world / "objects.txt").exists()):  # the last file
            known = note(self.world)["code"].keys() if Path(f"{self.world}.json").exists() else None
            ours = known == made["code"].keys() or not (known or self.world.exists())
            require(ours, f"{self.world} is there and no toy world of {source.__name__}: take another --out")
            print(f"drawing the world in {self.world}")
            drawn.record()
            shutil.rmtree(self.world, ignore_errors=True)
            source.write_world(self.world)

    def plan(self, call: Callable, script: Path, argv: list[str], out: Path, inputs: list[Path]) -> None:
        """Plan a task; what a kind of stage costs does not depend on the flags of one run of it."""
        made = {"code": code(script)} | ({"argv": argv} if call is not count else {})
        self.tasks.setdefault(out, Task(call, script, argv, out, inputs, made))

    def fork(self, name: str) -> Path:
        """The script of dft.py as a diff in docs/forks makes it, beside its losses.py."""
        folder = self.out / "forks" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in "dft.py", "losses.py":
            shutil.copy(ROOT / file, folder)
        alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent.resolve())}  # of no repository
        diff = ROOT / f"docs/forks/{name}.diff"
        told = subprocess.run(["git", "apply", diff], cwd=folder, env=alone, capture_output=True, text=True)
        require(not told.returncode, f"{diff} does not apply to dft.py and losses.py alone: {told.stderr}")
        return folder.resolve() / "dft.py"

    def chain(self, recipe: str, data: str, scenes: int, seed: int, folder: Path | None = None) -> list[Path]:
        """Plan the stages of a recipe, each from the one before; returns their folders."""
        folder, folders = folder or self.out / f"seed{seed}/{scenes}", []
        for k, text in enumerate(recipe.split(" | ")):
            name, *words = text.split()
            require(name in DEFAULTS, f"'{text}' is no stage: its name is one of {', '.join(DEFAULTS)}")
            kind, (steps, lr) = DATA.get(name, data), DEFAULTS[name]
            own, words = OWN.parse_known_args(words)
            script = self.fork(own.fork) if own.fork else ROOT / f"{SCRIPTS.get(name, 'mod_distill')}.py"
            flags = {"data": world.write_subset(self.world, kind, scenes, seed), "seed": seed + 100 * k}
            flags |= {"images": self.world / "images", "max_steps": steps, "lr": lr}
            new = {"vision": world.BASE / "siglip", "llm": world.BASE / f"qwen-{own.llm}"}
            flags |= {"student": folders[-1]} if folders else new
            if name not in ("pt", "sft") and " --kl 0 " not in f"{text} ":
                flags["teacher"] = self.teacher(own.teacher, seed)[-1]
            if own.teacher2:
                flags["teacher2"] = self.teacher(own.teacher2, seed)[-1]
            inputs = [flags[model] for model in ("student", "teacher", "teacher2") if model in flags]
            if script.stem == "mod_distill":
                flags["step"] = name
            if script.stem == "dpt":  # captions answer a question here, which the tiny language models know
                flags["caption_only"] = False
            usual = DATA.get(name, "mixed" if script.stem == "mod_distill" else "finetune")
            name = text.replace(" --", ".").replace(" ", "=")  # "dft --gamma 0" becomes dft.gamma=0
            name += f".{kind}" * (kind != usual)
            name += ".own" * (self.own_teachers and seed > 0 and "teacher" in flags)  # seed 0: the usual
            out = folders[-1].with_name(f"{folders[-1].name}-{name}") if folders else folder / name
            flags = {k: v for k, v in (SETTINGS | flags).items() if f"--{k}" not in words}
            argv = to_argv(**flags, out=out) + words
            with stage_of(script) as stage:
                args = stage.parse_args(argv)  # also refuses what it does not know
            argv += ["--epochs", str(args.max_steps // max(scenes // BATCH, 1) + 1)]  # enough
            self.plan(train, script, argv, out, [self.world, *inputs])
            self.plan(count, script, argv, self.out / "flops" / out.name, [out])
            folders.append(out)
        return folders

    def teacher(self, name: str, seed: int) -> list[Path]:
        """Plan a teacher, the seed's own or the one of all seeds; returns the folders of its stages."""
        seed = seed if self.own_teachers else 0
        folder = self.out / f"seed{seed}" / name if seed else self.out / name
        return self.chain(TEACHERS[name], "mixed", world.N_TRAIN, seed, folder)

    def ask(self, table: Table, model: Path, seed: int) -> None:
        """Plan what a model is asked: the questions, and to describe where it has learned to."""
        for file in (table.questions, "describe")[: 2 if table.data == "mixed" else 1]:
            out = self.place("answers", file, model)
            how = {"metric": "exact", "max_new_tokens": 6}
            if file == "describe":
                how = {"metric": "hallucination", "max_new_tokens": 18, "objects": self.world / "objects.txt"}
            argv = to_argv(model=model, questions=self.world / f"{file}.jsonl", images=self.world / "images",
                           out=out, batch=250, **how)
            self.plan(score, ROOT / "evaluate.py", argv, out, [self.world, model])
        teacher, out = self.teacher("teacher", seed)[-1], self.place("nearness", table.questions, model)
        argv = [*map(str, (model, teacher, self.world / f"{table.questions}.jsonl", self.world / "images"))]
        self.plan(compare, ROOT / "lab/tasks.py", argv, out, [self.world, model, teacher])

    def place(self, kind: str, questions: str, model: Path) -> Path:
        """Where it is kept what a model answers, or how near it is to the teacher."""
        return self.out / kind / questions / model.relative_to(self.out)

    def row(self, table: Table, method: str, scenes: int, seed: int, stages: list[Path]) -> dict:
        """A row of the report: scores of the last stage's model, and what all stages took together."""
        asked = (self.world / f"{table.questions}.jsonl").read_text().splitlines()
        n = Counter(json.loads(line)["category"] for line in asked)
        scores = self.scores(table.questions, stages[-1])["by_category"]
        row = {"method": method, "seed": seed, "scenes": scenes}
        row["accuracy"] = sum(scores[k] * n[k] for k in world.SKILLS) / sum(n[k] for k in world.SKILLS)
        row |= scores
        if table.data == "mixed":
            said = self.scores("describe", stages[-1])
            row |= {key: said[key] for key in ("response_rate", "mention_rate", "recall")}
        near = note(self.place("nearness", table.questions, stages[-1]))
        row |= {key: value for key, value in near.items() if key.startswith(("agree", "KL"))}
        row["steps"] = sum(len((stage / "log.jsonl").read_text().splitlines()) for stage in stages)
        row["seconds"] = sum(note(stage)["seconds"] for stage in stages)
        row["tflop"] = sum(note(self.out / "flops" / stage.name)["tflop"] for stage in stages)
        return row

    def scores(self, questions: str, model: Path) -> dict:
        (scores,) = json.loads((self.place("answers", questions, model) / "scores.json").read_text()).values()
        return scores


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "the experiment", [
        ("--table", list(TABLES), ["ends"], "tables to fill"),
        ("--world", tuple(WORLDS), "shapes", "what the pictures show"),
        ("--out", str, None, "folder for the world, all runs and the report; default: out/toy; of letters: "
         "out/letters"),
        ("--seeds", positive, 1, "how often each student is trained; at least 3 for a verdict"),
        ("--first_seed", natural, 0, "the first of the seeds"),
        ("--own_teachers", bool, False, "each seed trains its own teachers, so intervals cover these too; "
         "else all have those of seed 0"),
        ("--jobs", positive, 2, "stages at a time, one thread each"),
    ])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, start = parse_args(argv), time.time()
    require(args.table, f"--table names no table; there are {', '.join(TABLES)}")
    source, usual = WORLDS[args.world]
    lab, planned = Lab(Path(args.out or usual), source, args.own_teachers), []
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for name in dict.fromkeys(args.table):
        table = TABLES[name]
        known = all({better, worse} <= table.rows.keys() for better, worse, *_ in table.claims)
        require(known, f"a claim of {name} is about a row that the table has not")
        for seed, scenes, (method, recipe) in itertools.product(seeds, table.scenes, table.rows.items()):
            stages = lab.chain(recipe, table.data, scenes, seed)
            lab.ask(table, stages[-1], seed)
            planned.append((name, method, scenes, seed, stages))
        for teacher, seed in itertools.product(TEACHERS, seeds if args.own_teachers else [0]):
            if teacher == "teacher" or f"--teacher {teacher}" in " ".join(table.rows.values()):
                stages = lab.teacher(teacher, seed)
                lab.ask(table, stages[-1], seed)
                planned.append((name, teacher.capitalize(), world.N_TRAIN, seed, stages))
    do(lab.tasks, args.jobs, lab.out)
    command, seconds = argv or sys.argv[1:], time.time() - start
    for name, group in itertools.groupby(planned, key=lambda plan: plan[0]):
        page = "letters-" * (args.world == "letters") + name + "-teachers" * args.own_teachers
        plans, pictures = [rest for _, *rest in group], {}
        if TABLES[name].figure == "experts":
            models = {method: stages[-1] for method, _, seed, stages in plans if seed == args.first_seed}
            pictures[f"{page}-experts.png"] = f"experts, seed {args.first_seed}"
            draw_experts(models, lab.world, lab.out / f"{page}-experts.png")
        rows = [lab.row(TABLES[name], *plan) for plan in plans]
        print(write_page(lab.out, page, rows, command, seconds, pictures), end="\n\n")
    print(f"The pages, with a legend, and their rows are in {lab.out}.")


if __name__ == "__main__":
    cli(main)
