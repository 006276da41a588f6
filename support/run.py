"""A run and its folder OUT: whose the folder is, the log in it, the student that is left there at the end."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from modulefinder import ModuleFinder
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from support.flags import InputError
from support.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
# Flags that may change when an interrupted run goes on: they are about its speed and safety.
FREE = {"out", "workers", "micro_batch", "gradient_checkpointing", "save_every", "keep", "resume",
        "max_bad_steps"}  # fmt: skip


@dataclass
class Run:
    """What belongs to one run and is not the stage's own business."""

    args: argparse.Namespace
    ranks: Ranks
    identity: dict  # stage, flags and code: what makes it this run
    dtype: torch.dtype  # precision of the arithmetic
    accumulation: int  # micro-batches per rank and step
    finished: bool = False  # whether OUT holds this very run, finished
    n_bad: int = 0  # samples left out because they could not be read
    n_bad_steps: int = 0  # updates left out because they were not finite
    n_steps: int = 0
    bar: tqdm | None = None
    started: float = 0.0
    clock: float = 0.0

    @property
    def out(self) -> Path:
        return Path(self.args.out)

    def say(self, message: str) -> None:
        if self.ranks.rank == 0:
            tqdm.write(message)

    def autocast(self) -> torch.autocast:
        on = self.dtype == torch.bfloat16
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=on)


def precision(name: str, auto: torch.dtype) -> torch.dtype:
    """The flag --dtype or --teacher_dtype, `auto` being what it calls auto."""
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


# ---------------------------------------------------------------------------------- whose folder it is


def open_run(args: argparse.Namespace, stage: str, ranks: Ranks, script: str) -> Run:
    """The run that `args` ask for. Looks into OUT and changes nothing there.

    Raises InputError if OUT holds another run, this run by other code, or something else, or if the global
    batch cannot be divided into micro-batches.
    """
    accumulation, rest = divmod(args.global_batch, args.micro_batch * ranks.world)
    if rest or not accumulation:
        raise InputError(
            f"--global_batch {args.global_batch} is not a multiple of --micro_batch {args.micro_batch} x "
            f"{ranks.world} ranks = {args.micro_batch * ranks.world}"
        )
    flags = {k: v for k, v in vars(args).items() if k not in FREE}
    identity = json.loads(json.dumps({"stage": stage} | flags | {"code": code_of(script)}))
    dtype = precision(args.dtype, torch.bfloat16 if ranks.device.type == "cuda" else torch.float32)
    run = Run(args, ranks, identity, dtype, accumulation)
    if (run.out / "run.json").exists():
        finished = _there_is_finished(run.out, identity, args.resume)
        run.finished = finished and args.resume is not False
        if run.finished:
            run.say(f"{run.out}: this run is finished already")
    elif run.out.exists() and (not run.out.is_dir() or any(run.out.iterdir())):
        raise InputError(f"--out {run.out} is no empty folder and holds no run of ours; take another folder")
    return run


def _there_is_finished(out: Path, now: dict, resume: bool | None) -> bool:
    """Whether the run in `out` is finished; an InputError if it is another run than `now`."""
    try:
        there = dict(json.loads((out / "run.json").read_text()))
    except ValueError:
        raise InputError(f"{out}/run.json cannot be read; delete {out} or take another folder") from None
    finished = there.pop("seconds", None) is not None
    old, new = there.pop("code", {}), now["code"]
    flags = [k for k in sorted(there.keys() | now.keys() - {"code"}) if there.get(k) != now.get(k)]
    if flags:
        differ = "; ".join(f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in flags)
        raise InputError(f"--out {out} holds a different run ({differ}); take another or delete it")
    changed = ", ".join(file for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file))
    if changed and resume is None:
        kind, advice = ("an interrupted", "go on with the new code by --resume")
        if finished:
            kind, advice = ("a finished", "take another folder")
        raise InputError(
            f"--out {out} holds {kind} run of other code; since then {changed} changed. Either {advice}, or "
            "train again from the start by --no-resume"
        )
    return finished


def code_of(script: str | Path) -> dict[str, str]:
    """The files of this project that a script consists of, each with a hash of its text."""
    finder = ModuleFinder(path=[str(ROOT)])
    finder.run_script(str(script))
    files = sorted(Path(m.__file__).resolve() for m in finder.modules.values() if m.__file__)
    return {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


# ---------------------------------------------------------------------------------- from its begin to its end


def begin(run: Run, student: nn.Module, data, n_steps: int, first: int) -> None:
    """Take OUT for this run, cut its log to the `first` steps that are done, say what will be trained."""
    dist.barrier()  # every rank has looked into the folder before one writes
    if run.ranks.rank == 0:
        run.out.mkdir(parents=True, exist_ok=True)
        if first == 0:
            shutil.rmtree(run.out / "state", ignore_errors=True)
        log = run.out / "log.jsonl"
        lines = log.read_text().split("\n")[:first] if first else []
        write_whole(log, "".join(f"{line}\n" for line in lines))
        _write_identity(run, seconds=None)
    batch, micro, world = run.args.global_batch, run.args.micro_batch, run.ranks.world
    split = f"{run.accumulation} x {micro} x {world} rank(s)"
    run.say(f"{run.identity['stage']}: {n_steps} steps of {batch} samples = {split}")
    drawn = f"{len(data)} samples, {n_steps * batch} drawn"
    run.say(f"  {str(run.dtype)[6:]} on {run.ranks.device.type}; {drawn}")
    if data.n_too_long:
        run.say(f"  {data.n_too_long} samples left out: their prompts are longer than --max_len")
    for name, part in student.named_children():
        n = [sum(p.numel() for p in part.parameters() if p.requires_grad == on) for on in (True, False)]
        run.say(f"  {name:22s} trained {n[0]:>13,d}   frozen {n[1]:>13,d}")
    if first:
        run.say(f"  goes on after step {first}")
    run.n_steps, run.started = n_steps, time.perf_counter()
    run.clock = run.started
    quiet = run.ranks.rank != 0
    run.bar = tqdm(total=n_steps, initial=first, desc=run.identity["stage"], disable=quiet, mininterval=1.0)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old one or the new one."""
    beside = path.with_name(f".{path.name}.writing")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _write_identity(run: Run, seconds: float | None) -> None:
    write_whole(run.out / "run.json", json.dumps(run.identity | {"seconds": seconds}, indent=1) + "\n")


def set_lr(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over ceil(warmup x steps) steps, then a cosine to zero; `step` counts from 0."""
    n_warm = math.ceil(warmup * steps)
    if step < n_warm:
        lr = peak * (step + 1) / n_warm
    else:
        lr = peak * 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(steps - n_warm, 1)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def check_samples(run: Run, micros: list, n_bad: float) -> None:
    """Name this rank's unreadable samples; end the run if all ranks together had more than --skip_bad."""
    run.n_bad += int(n_bad)
    mine = [message for batch in micros for message in batch.bad]
    for message in mine:
        tqdm.write(f"unreadable, {run.n_bad} so far: {message}", file=sys.stderr)
    if run.n_bad > run.args.skip_bad:
        what = mine[0] if mine else f"{int(n_bad)} sample(s) of other ranks cannot be read"
        raise InputError(f"{what}; repair it or allow more with --skip_bad (now {run.args.skip_bad})")


def all_finite(run: Run, step: int, losses: list[dict[str, Tensor]], grad_norm: Tensor, micros: list) -> bool:
    """Whether gradient and losses of all ranks are finite. More than --max_bad_steps others end the run."""
    ranks = run.ranks
    bad = torch.zeros(ranks.world + 1, device=ranks.device)
    bad[ranks.rank] = not math.isfinite(sum(terms["loss"].item() for terms in losses))
    bad[-1] = not math.isfinite(grad_norm.item())
    *bad_losses, bad_gradient = ranks.sum(bad).tolist()
    if not any(bad_losses) and not bad_gradient:
        return True
    which = [rank for rank in range(ranks.world) if bad_losses[rank]]
    what = f"loss of rank {', '.join(map(str, which))}" if which else "gradient"
    message = f"step {step}: the {what} is not finite"
    if ranks.rank in which or not which:
        message += f"; rank {ranks.rank} had {', '.join(name for batch in micros for name in batch.names)}"
    run.n_bad_steps += 1
    if run.n_bad_steps > run.args.max_bad_steps:
        limit = f"--max_bad_steps {run.args.max_bad_steps}"
        raise InputError(f"{message}; see {run.out / 'log.jsonl'} ({limit})")
    tqdm.write(f"{message}; update left out, {run.n_bad_steps} so far", file=sys.stderr)
    return False


def write_log(
    run: Run, step: int, lr: float, losses: list[dict[str, Tensor]], grad_norm: Tensor, tokens: float
) -> None:
    """A line in log.jsonl: every term summed over micro-batches and ranks, each of which holds its share."""
    stacked = [torch.stack([value.detach().double() for value in terms.values()]) for terms in losses]
    values = run.ranks.sum(torch.stack(stacked).sum(0)).tolist()
    now = time.perf_counter()
    speed, run.clock = tokens / (now - run.clock), now
    if run.ranks.rank == 0:
        terms = dict(zip(losses[0], values))
        line = {"step": step, "lr": lr} | terms
        line |= {"tokens_per_s": round(speed), "grad_norm": grad_norm.item()}
        line = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
        with open(run.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        run.bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
        run.bar.update()


def save_student(run: Run, student: nn.Module) -> None:
    """Write the checkpoint into OUT, mark the run as finished and remove its training states."""
    run.bar.close()
    if run.ranks.rank == 0:
        beside = run.out / ".saving"  # nobody may find half of a model
        shutil.rmtree(beside, ignore_errors=True)
        student.save(beside)
        for file in beside.iterdir():
            os.replace(file, run.out / file.name)
        beside.rmdir()
        _write_identity(run, seconds=round(time.perf_counter() - run.started, 1))
        shutil.rmtree(run.out / "state", ignore_errors=True)
        run.say(f"saved {run.out}" + f"; {run.n_bad} unreadable samples left out" * bool(run.n_bad))
    dist.barrier()
