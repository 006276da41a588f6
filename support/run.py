"""A run and its folder OUT: whose the folder is, the log in it, the student that is left there at the end."""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from modulefinder import ModuleFinder
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from support.flags import InputError, require
from support.ranks import STOPPED, Ranks

ROOT = Path(__file__).resolve().parent.parent
# Flags that may change when an interrupted run goes on: they are about its speed and safety.
FREE = "out workers micro_batch gradient_checkpointing shard save_every keep resume skip_bad max_bad_steps"


@dataclass
class Run:
    """What belongs to one run and is not the stage's own business."""

    args: argparse.Namespace
    ranks: Ranks
    out: Path
    identity: dict  # stage, flags and code: what makes it this run
    dtype: torch.dtype  # precision of the arithmetic
    teacher_dtype: torch.dtype  # of the teacher's weights
    finished: bool = False  # whether OUT holds this very run, finished
    bad: set[str] = field(default_factory=set)  # what was wrong with each sample that was left out
    n_bad_steps: int = 0  # updates left out because they were not finite
    bar: tqdm | None = None
    started: float = 0.0
    clock: float = 0.0  # when the last step ended

    def say(self, message: str, file: TextIO | None = None) -> None:
        if self.ranks.rank == 0:
            tqdm.write(message, file=file)

    def autocast(self) -> torch.autocast:
        kind, on = self.ranks.device.type, self.dtype == torch.bfloat16
        # Without its cache: that would keep bf16 copies of all weights, also of layers computed again later.
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=on, cache_enabled=False)


def precision(name: str, auto: torch.dtype) -> torch.dtype:
    """The flag --dtype or --teacher_dtype, `auto` is what "auto" stands for."""
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def code_of(script: str | Path) -> dict[str, str]:
    """The files of this project that a script consists of, each with a hash of its text."""
    finder = ModuleFinder(path=[str(ROOT)])
    finder.run_script(str(script))
    files = sorted(Path(m.__file__).resolve() for m in finder.modules.values() if m.__file__)
    return {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


def open_run(args: argparse.Namespace, stage: str, ranks: Ranks, script: str) -> Run:
    """The run that `args` ask for. Looks into OUT and changes nothing there. Raises InputError if OUT holds
    another run, this run by other code, or something else, or if the global batch cannot be divided.
    """
    at_once = args.micro_batch * ranks.world_size
    parts = f"multiple of --micro_batch {args.micro_batch} x {ranks.world_size} ranks = {at_once}"
    require(args.global_batch % at_once == 0, f"--global_batch {args.global_batch} is not a {parts}")
    flags = {k: v for k, v in vars(args).items() if k not in FREE.split()}
    identity = json.loads(json.dumps({"stage": stage} | flags | {"code": code_of(script)}))
    dtype = precision(args.dtype, torch.bfloat16 if ranks.device.type == "cuda" else torch.float32)
    teacher_dtype = precision(getattr(args, "teacher_dtype", "auto"), dtype)
    run = Run(args, ranks, Path(args.out), identity, dtype, teacher_dtype)
    if (run.out / "run.json").exists():
        run.finished = is_finished(run.out, identity, args.resume) and args.resume is not False
    else:
        empty = not run.out.exists() or (run.out.is_dir() and not any(run.out.iterdir()))
        require(empty, f"--out {run.out} is no empty folder and holds no run of ours; take another folder")
    if run.finished:
        run.say(f"{run.out}: this run is finished already")
    return run


def is_finished(out: Path, now: dict, resume: bool | None) -> bool:
    """Whether the run in `out` is finished; an InputError if it is another run than `now`."""
    try:
        there = {"code": {}, "seconds": None} | json.loads((out / "run.json").read_text())
    except (ValueError, TypeError):
        raise InputError(f"{out}/run.json cannot be read; delete {out} or take another folder") from None
    finished, old, new = there.pop("seconds") is not None, there.pop("code"), now["code"]
    flags = [k for k in sorted(there.keys() | now.keys() - {"code"}) if there.get(k) != now.get(k)]
    differ = "; ".join(f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in flags)
    require(not flags, f"--out {out} holds a different run ({differ}); take another or delete it")
    changed = ", ".join(file for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file))
    kind, advice = "an interrupted", "go on with the new code by --resume"
    if finished:
        kind, advice = "a finished", "take another folder"
    refused = f"--out {out} holds {kind} run of other code; since then {changed} changed. Either {advice}, "
    require(not changed or resume is not None, refused + "or train again from the start by --no-resume")
    return finished


def start_run(run: Run, student: nn.Module, data, n_steps: int, first: int) -> None:
    """Take OUT for this run, of which `first` steps are done; say what will be trained; show a bar."""
    dist.barrier()  # every rank has looked into the folder before one writes
    if run.ranks.rank == 0:
        take_folder(run, first)
    leave_out(run, data.bad)
    describe(run, student, data, n_steps)
    if first:
        run.say(f"  goes on after step {first}")
    quiet, run.started, run.clock = run.ranks.rank != 0, time.perf_counter(), time.perf_counter()
    how = {"desc": run.identity["stage"], "disable": quiet, "mininterval": 1.0}
    run.bar = tqdm(total=n_steps, initial=first, **how)


def take_folder(run: Run, first: int) -> None:
    """Write whose OUT is, and cut its log to the `first` steps; without any, its states are removed."""
    log = run.out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)[:first] if first else []
    if not first:
        shutil.rmtree(run.out / "state", ignore_errors=True)
    run.out.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(lines))
    write_identity(run, seconds=None)


def describe(run: Run, student: nn.Module, data, n_steps: int) -> None:
    """Say what is trained, on what and where."""
    args, stage = run.args, run.identity["stage"]
    left_out = f", {data.n_too_long} more have prompts longer than --max_len" if data.n_too_long else ""
    run.say(f"{stage}: {n_steps} steps of {args.global_batch} of {len(data)} samples{left_out}")
    if data.n_unmarked:
        run.say(f"  {data.n_unmarked} samples have images but no <image>: they go first in the question")
    where = f"{run.ranks.world_size} rank(s) on {run.ranks.device.type}, {args.micro_batch} samples at a time"
    run.say(f"  {where}, {str(run.dtype)[6:]}")
    seen = set()  # a tied head is the embedding's weight
    for name, part in student.named_children():
        mine = [p for p in part.parameters() if p not in seen]
        seen.update(mine)
        n = [sum(p.numel() for p in mine if p.requires_grad == on) for on in (True, False)]
        run.say(f"  {name:22s} trained {n[0]:>13,d}   frozen {n[1]:>13,d}")


def write_identity(run: Run, seconds: float | None) -> None:
    """Write run.json so that a crash leaves the old one or the new one; `seconds` mark a finished run."""
    (run.out / ".run.json").write_text(json.dumps(run.identity | {"seconds": seconds}, indent=1) + "\n")
    os.replace(run.out / ".run.json", run.out / "run.json")


def check_samples(run: Run, micros: list, n_bad: float) -> None:
    """Name the step's samples that cannot be read, each once in a run; more than --skip_bad end the run."""
    if n_bad:
        everyone = run.ranks.gather([message for batch in micros for message in batch.bad])
        leave_out(run, [message for mine in everyone for message in mine])


def leave_out(run: Run, messages: list[str]) -> None:
    """Count and name bad samples, the same on all ranks."""
    for message in sorted(set(messages) - run.bad):
        run.bad.add(message)
        counts = f"{len(run.bad)} bad so far, --skip_bad allows {run.args.skip_bad}"
        require(len(run.bad) <= run.args.skip_bad, f"{message}; {counts}: repair it or allow more")
        run.say(f"left out ({counts}): {message}", sys.stderr)


def may_update(run: Run, step: int, losses: list[dict[str, Tensor]], grad_norm: Tensor, micros: list) -> bool:
    """Whether the gradient and the losses of all ranks are finite. If not, it is said and counted, and an
    InputError after too many.
    """
    rank, bad = run.ranks.rank, torch.zeros(run.ranks.world_size + 1, device=run.ranks.device)
    bad[rank] = not math.isfinite(sum(terms["loss"].item() for terms in losses))  # of each rank
    bad[-1] = not math.isfinite(grad_norm.item())
    bad = run.ranks.sum(bad).tolist()
    if not any(bad):
        return True
    which = [str(k) for k in range(run.ranks.world_size) if bad[k]]
    what = f"step {step}: the {'loss of rank ' + ', '.join(which) if which else 'gradient'} is not finite"
    if bad[rank] or not which:
        what += f"; rank {rank} had {', '.join(name for batch in micros for name in batch.names)}"
    run.n_bad_steps += 1
    limit = f"see {run.out}/log.jsonl (--max_bad_steps {run.args.max_bad_steps})"
    require(run.n_bad_steps <= run.args.max_bad_steps, f"{what}; {limit}")
    tqdm.write(f"{what}; update left out, {run.n_bad_steps} so far", file=sys.stderr)
    return False


def seed_step(run: Run, step: int) -> None:
    """Seed what is random in a step (router noise; a fork's own draws): the same after an interruption, and
    other numbers on every rank. Python's hash of integers is the same in every process.
    """
    torch.manual_seed(hash((run.args.seed, step, run.ranks.rank)))


def write_log(run: Run, step: int, lr: float, losses: list, grad_norm: Tensor, tokens: float) -> None:
    """A line in log.jsonl: every term summed over micro-batches and ranks, each of which holds its share."""
    shares = [torch.stack([value.detach().double() for value in terms.values()]) for terms in losses]
    terms = dict(zip(losses[0], run.ranks.sum(sum(shares)).tolist()))
    speed, run.clock = round(tokens / (time.perf_counter() - run.clock)), time.perf_counter()
    if run.ranks.rank == 0:
        line = {"step": step, "lr": lr, "tokens_per_s": speed} | terms | {"grad_norm": grad_norm.item()}
        line = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
        with open(run.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        run.bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
        run.bar.update()


def save_student(run: Run, student: nn.Module) -> None:
    """Write the checkpoint into OUT, mark the run as finished, remove its states. Then heed a late signal."""
    run.bar.close()
    if run.ranks.rank == 0:
        beside = run.out / ".saving"  # nobody may find half of a model
        shutil.rmtree(beside, ignore_errors=True)
        student.save(beside)
        for file in beside.iterdir():
            os.replace(file, run.out / file.name)
        beside.rmdir()
        write_identity(run, seconds=round(time.perf_counter() - run.started, 1))
        shutil.rmtree(run.out / "state", ignore_errors=True)
        run.say(f"saved {run.out}" + (f"; {len(run.bad)} bad samples left out" if run.bad else ""))
    if run.ranks.stop_was_asked():  # in the last step or since; more stages may follow
        run.say("stopped by a signal; the same command goes on from there")
        raise SystemExit(STOPPED)
