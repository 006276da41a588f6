"""A run and its folder OUT: whose the folder is, the log in it, the student that is left there at the end."""

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from modulefinder import ModuleFinder
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from support.flags import InputError, require
from support.ranks import STOPPED, Ranks

ROOT = Path(__file__).resolve().parent.parent
# Flags that may change when an interrupted run goes on: they are about its speed and safety.
FREE = "out workers micro_batch gradient_checkpointing shard save_every keep resume skip_bad max_bad_steps"
INPUTS = "student", "teacher", "vision", "llm", "data"  # flags that name files and folders that a run reads


@dataclass
class Run:
    """What belongs to one run and is not the stage's own business."""

    args: argparse.Namespace
    ranks: Ranks
    out: Path
    identity: dict  # stage, flags, and hashes of code and inputs: what makes it this run
    dtype: torch.dtype  # precision of the arithmetic
    teacher_dtype: torch.dtype  # of the teacher's weights
    finished: bool  # whether OUT holds this very run, finished
    bad: set[str] = field(default_factory=set)  # what was wrong with each sample that was left out
    n_bad_steps: int = 0  # updates left out because they were not finite
    trained: dict[str, Tensor] = field(default_factory=dict)  # the student's, until one step has gradients
    bar: tqdm | None = None
    started: float = 0.0
    clock: float = 0.0  # when the last step ended

    def say(self, message: str, file: TextIO | None = None) -> None:
        if self.ranks.rank == 0:
            tqdm.write(message, file=file)

    def autocast(self) -> torch.autocast:
        # Without its cache: that would keep bf16 copies of all weights, also of layers computed again later.
        on = self.dtype == torch.bfloat16
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=on, cache_enabled=False)


def precision(name: str, auto: torch.dtype) -> torch.dtype:
    """The flag --dtype or --teacher_dtype, `auto` is what "auto" stands for."""
    return {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def best_dtype(device: torch.device) -> torch.dtype:
    """What --dtype auto is: bf16 on a GPU that computes in it, and does not only imitate it."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if able else torch.float32


def code_of(script: str | Path) -> dict[str, str]:
    """The files of this project and of the script's folder that it consists of, each with a hash."""
    finder = ModuleFinder(path=[str(Path(script).resolve().parent), str(ROOT)])
    finder.run_script(str(script))
    files = sorted(Path(m.__file__).resolve() for m in finder.modules.values() if m.__file__)
    return {os.path.relpath(f, ROOT): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


def fingerprint(path: str) -> str:
    """A hash of what a file or a checkpoint's folder holds, "" if there is nothing: of names, sizes, and 64
    blocks of each file, spread evenly. Of a file below 16 MiB that is all; in a larger one an edit between
    the blocks that keeps the size is not seen. Times are not looked at: a copy has its own.
    """
    notes, digest, block = ("run.json", "log.jsonl"), hashlib.sha256(), 2**18  # notes: not of the model
    files = [f for f in (Path(path), *Path(path).glob("[!.]*")) if f.is_file() and os.access(f, os.R_OK)]
    for file in sorted(f for f in files if f.name not in notes):
        with open(file, "rb") as data:
            size = data.seek(0, os.SEEK_END)
            digest.update(f"{file.name} {size} ".encode())
            for start in sorted({max(size - block, 0) * k // 63 for k in range(64)}):
                data.seek(start)
                digest.update(data.read(block))
    return digest.hexdigest()[:16] if files else ""


def inputs_of(args: argparse.Namespace) -> dict[str, str]:
    """The files and folders that a run reads, each with its fingerprint; a name on the hub has none."""
    given = {flag: getattr(args, flag, None) or [] for flag in INPUTS}
    named = [(k, path) for k, v in given.items() for path in ([v] if isinstance(v, str) else v)]
    return {f"--{k} {path}": mark for k, path in named if (mark := fingerprint(path))}


@contextlib.contextmanager
def writing(what: object, *half: Path) -> Iterator[None]:
    """An error while `what` is written becomes one sentence; what is there of it in `half` is removed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's own
        for path in half:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise InputError(f"cannot write {what}: {error}; mend that, then the same command goes on") from None


def own(out: Path, at_end: contextlib.ExitStack) -> None:
    """Make a folder this process's alone, until `at_end` or its death; if new and empty then, it goes."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    at_end.callback(lambda: [f.rmdir() for f in made if f.is_dir() and not any(f.iterdir())])
    require(out.is_dir() or not os.path.lexists(out), f"--out {out} is a file or leads nowhere; take another")
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        lock = at_end.enter_context(open(out / ".lock", "w"))
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not data processes' as well
            free = os.fstat(lock.fileno()).st_nlink  # 0: whoever had it has just removed it
        except BlockingIOError:
            free = False
    require(free, f"--out {out} is in use by another run; wait for its end or take another folder")
    at_end.callback((out / ".lock").unlink, missing_ok=True)


def open_run(args: argparse.Namespace, stage: str, ranks: Ranks, script: str) -> Run:
    """The run that `args` ask for. OUT is its alone from here on; nothing in it is changed yet."""
    at_once = args.micro_batch * ranks.world_size
    parts = f"multiple of --micro_batch {args.micro_batch} x {ranks.world_size} ranks = {at_once}"
    require(args.global_batch % at_once == 0, f"--global_batch {args.global_batch} is not a {parts}")
    out, judged = Path(args.out), None
    if ranks.rank == 0:
        own(out, ranks.at_end)
        flags = {k: v for k, v in vars(args).items() if k not in FREE.split()}
        identity = {"stage": stage} | flags | {"files": code_of(script) | inputs_of(args)}
        judged = identity, is_finished(out, json.loads(json.dumps(identity)), args.resume)
    identity, finished = ranks.gather(judged)[0]
    dtype = precision(args.dtype, best_dtype(ranks.device))
    teacher_dtype = precision(getattr(args, "teacher_dtype", "auto"), dtype)
    run = Run(args, ranks, out, identity, dtype, teacher_dtype, finished)
    if finished:
        run.say(f"{run.out}: this run is finished already")
    return run


def is_finished(out: Path, now: dict, resume: bool | None) -> bool:
    """Whether `out` holds the run `now`, finished; an InputError if it holds anything but this run."""
    if not (out / "run.json").exists():
        empty = {".lock", ".run.json"}.issuperset(os.listdir(out))
        require(empty, f"--out {out} is no empty folder and holds no run of ours; take another folder")
        return False
    try:
        there = {"files": {}, "seconds": None} | json.loads((out / "run.json").read_text())
    except (OSError, ValueError, TypeError):
        raise InputError(f"{out}/run.json cannot be read; delete {out} or take another folder") from None
    finished, old, new = there.pop("seconds") is not None, there.pop("files"), now["files"]
    differ = [f"{k}: {there.get(k)!r} there, {now.get(k)!r} now"
              for k in sorted(there.keys() | now.keys() - {"files"}) if there.get(k) != now.get(k)]
    require(not differ, f"--out {out} holds a different run ({'; '.join(differ)}); take another or delete it")
    both = old.keys() & new.keys()  # what was read may be gone, when it is not needed any more
    changed = [k for k in sorted(dict(old.items() ^ new.items())) if k in both or not k.startswith("--")]
    kind = "a finished" if finished else "an interrupted"
    advice = "Accept that by --resume, or train again from the start by --no-resume, which removes its model"
    refused = f"--out {out} holds {kind} run; since then {', '.join(changed)} changed. {advice}"
    require(not changed or resume is not None, refused)
    return finished and resume is not False


def start_run(run: Run, student: nn.Module, data, n_steps: int, first: int) -> None:
    """Begin to write into OUT; `first` steps are done already. Say what is trained, and show a bar."""
    args, ranks, stage = run.args, run.ranks, run.identity["stage"]
    if ranks.rank == 0:
        with writing(run.out):
            if not first:
                shutil.rmtree(run.out / "state", ignore_errors=True)
            write_identity(run, seconds=None)
            for name in "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json":
                for old in run.out.glob(name):  # nobody may take it for this run's
                    old.unlink()
            log = run.out / "log.jsonl"
            log.touch()
            log.write_text("".join(log.read_text().splitlines(keepends=True)[:first]))
    check_samples(run, [data], len(data.bad))
    where = f"{args.micro_batch} at a time on {ranks.world_size} {ranks.device.type} rank(s), {run.dtype}"
    run.say(f"{stage}: {n_steps} steps of {args.global_batch} of {len(data)} samples, {where}")
    run.say(f"  {data.n_too_long} more are left out: too little of them fits into --max_len")
    run.say(f"  {data.n_unmarked} samples have images but no <image>: they go first in the question")
    if data.n_joined:
        run.say(f"  of {data.n_joined} conversations the answers alone are read: --no-caption_only reads all")
    n, run.trained = Counter(), {name: p for name, p in student.named_parameters() if p.requires_grad}
    for name, p in student.named_parameters():  # a tied head is the embedding's weight, and named once
        n[name.split(".")[0], p.requires_grad] += p.numel()
    for part, _ in student.named_children():
        run.say(f"  {part:22s} trained {n[part, True]:>13,d}   frozen {n[part, False]:>13,d}")
    if first:
        run.say(f"  goes on after step {first}")
    run.bar = tqdm(total=n_steps, initial=first, desc=stage, disable=ranks.rank != 0, mininterval=1.0)
    run.started = run.clock = time.perf_counter()


def write_identity(run: Run, seconds: float | None) -> None:
    """Write run.json so that a crash leaves the old one or the new one; `seconds` mark a finished run."""
    (run.out / ".run.json").write_text(json.dumps(run.identity | {"seconds": seconds}, indent=1) + "\n")
    os.replace(run.out / ".run.json", run.out / "run.json")


def check_samples(run: Run, parts: list, n_bad: float) -> None:
    """Name the bad samples of micro-batches or of data, each once in a run; more than --skip_bad end it."""
    everyone = run.ranks.gather([message for part in parts for message in part.bad]) if n_bad else []
    for message in sorted({message for mine in everyone for message in mine} - run.bad):
        run.bad.add(message)
        counts = f"{len(run.bad)} bad so far, --skip_bad allows {run.args.skip_bad}"
        require(len(run.bad) <= run.args.skip_bad, f"{message}; {counts}: repair it or allow more")
        run.say(f"left out ({counts}): {message}", sys.stderr)


def may_update(run: Run, step: int, losses: list[dict[str, Tensor]], grad_norm: Tensor, micros: list) -> bool:
    """Whether the gradient and all ranks' losses are finite; if not, it is said, and too often an error. So
    is a trained weight that has no gradient in the first step.
    """
    idle, run.trained = [name for name, p in run.trained.items() if p.grad is None][:3], {}
    why = "the loss does not depend on them, or they are used under torch.no_grad, as `encode_images` is"
    require(not idle, f"the student's {idle} are trained but get no gradient: {why}")
    mine = math.isfinite(sum(terms["loss"].item() for terms in losses))
    bad = torch.tensor(float(not (mine and grad_norm.isfinite())), device=run.ranks.device)
    if not run.ranks.sum(bad):
        return True
    where = [str(rank) for rank, finite in enumerate(run.ranks.gather(mine)) if not finite]
    what = f"step {step}: the {'loss of rank ' + ', '.join(where) if where else 'gradient'} is not finite"
    if not (mine and where):
        what += f"; rank {run.ranks.rank} had {', '.join(name for batch in micros for name in batch.names)}"
    run.n_bad_steps += 1
    counts = f"{run.n_bad_steps} so far, --max_bad_steps allows {run.args.max_bad_steps}"
    require(run.n_bad_steps <= run.args.max_bad_steps, f"{what}; {counts}: see {run.out}/log.jsonl")
    tqdm.write(f"{what}; update left out ({counts})", file=sys.stderr)
    return False


def seed_step(run: Run, step: int) -> None:
    """Seed what is random in a step, as router noise: by rank, and the same after an interruption."""
    torch.manual_seed(hash((run.args.seed, step, run.ranks.rank)))  # of integers: the same in every process


def write_log(run: Run, step: int, lr: float, losses: list, grad_norm: Tensor, tokens: float) -> None:
    """A line in log.jsonl: every term summed over micro-batches and ranks, each of which holds its share."""
    shares = [torch.stack([value.detach().double() for value in terms.values()]) for terms in losses]
    terms = dict(zip(losses[0], run.ranks.sum(sum(shares)).tolist()))
    speed, run.clock = round(tokens / (time.perf_counter() - run.clock)), time.perf_counter()
    if run.ranks.rank == 0:
        line = {"step": step, "lr": lr, "tokens_per_s": speed} | terms | {"grad_norm": grad_norm.item()}
        line = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
        with writing(f"{run.out}/log.jsonl"), open(run.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        run.bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
        run.bar.update()


def save_student(run: Run, student: nn.Module) -> None:
    """Write the checkpoint into OUT, mark the run as finished, remove its states. Then heed a late signal."""
    run.bar.close()
    if run.ranks.rank == 0:
        beside = run.out / ".saving"  # nobody may find half of a model
        shutil.rmtree(beside, ignore_errors=True)
        with writing(run.out, beside):
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
