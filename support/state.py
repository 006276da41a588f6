"""Training state on disk: what a run needs to go on exactly where it was. A file is whole or not there.

A state is one file, `state/step-00000100.<sha256 of its bytes>.pt`: written beside, flushed to the disk and
renamed, so that the one before it stays good until this one is complete, and any change of its bytes shows.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from support.flags import InputError
from support.ranks import Ranks
from support.run import Run

STOPPED = 75  # exit code of a run that a signal has stopped: its state is saved, the same command goes on


def load_state(run: Run, student: nn.Module, optimizer: Optimizer) -> int:
    """Set student, optimizer and random numbers to the newest sound state in OUT. Returns the steps done."""
    path = None if run.args.resume is False else _newest_sound(run.out / "state", run.ranks)
    if path is None:
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if parameters.keys() != state["parameters"].keys():
        raise InputError("the training state is of another model: take another --out or delete this one")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    numbers = state["rng"][run.ranks.rank % len(state["rng"])]  # of another rank, if there are more now
    _set_rng(numbers, run.ranks.device)
    run.n_bad, run.n_bad_steps = state["n_bad"], state["n_bad_steps"]
    return state["step"]


def save_state_if_due(run: Run, step: int, student: nn.Module, optimizer: Optimizer) -> None:
    """Save the state after `step` if --save_every asks for it and there are more steps."""
    due = run.args.save_every and (step + 1) % run.args.save_every == 0
    if due and step + 1 < run.n_steps:
        save_state(run, step, student, optimizer)


def stop_if_asked(run: Run, step: int, student: nn.Module, optimizer: Optimizer) -> None:
    """After SIGTERM or SIGINT: save the state after `step`, say how to go on, and end the process."""
    if not run.ranks.stop_was_asked() or step + 1 == run.n_steps:
        return
    save_state(run, step, student, optimizer)
    dist.barrier()  # the state is written before any rank ends
    run.bar.close()
    run.say(f"stopped after step {step + 1} of {run.n_steps}; the same command goes on from there")
    raise SystemExit(STOPPED)


def save_state(run: Run, step: int, student: nn.Module, optimizer: Optimizer) -> None:
    """Write the state after `step` and remove all but the newest --keep. Every rank must call this."""
    rng = _rng(run.ranks.device)
    every = [torch.empty_like(rng) for _ in range(run.ranks.world)]
    dist.all_gather(every, rng)
    if run.ranks.rank != 0:
        return
    trained = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}
    state = {"step": step + 1, "parameters": trained, "optimizer": optimizer.state_dict(),
             "rng": torch.stack(every).cpu(), "n_bad": run.n_bad, "n_bad_steps": run.n_bad_steps}  # fmt: skip
    folder = run.out / "state"
    beside = folder / ".writing"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, folder / f"step-{step + 1:08d}.{_digest(beside)}.pt")
        flush_folder(folder)
        for old in states(folder)[run.args.keep :]:
            old.unlink()
    except (OSError, RuntimeError) as error:  # torch.save wraps some of the system's errors
        beside.unlink(missing_ok=True)
        good = states(folder)
        left = f"; the last good one, {good[0].name.split('.')[0]}, is untouched" if good else ""
        raise InputError(
            f"cannot write the training state of step {step + 1} to {folder}: {error}{left}"
        ) from None


def states(folder: Path) -> list[Path]:
    """The states that are there, the newest first."""
    return sorted(folder.glob("step-*.pt"), key=_step, reverse=True)


def _newest_sound(folder: Path, ranks: Ranks) -> Path | None:
    """The newest state whose bytes are as they were written, the same one on every rank."""
    found = torch.tensor(-1, device=ranks.device)
    if ranks.rank == 0:
        for path in states(folder):
            if _digest(path) == path.name.split(".")[1]:
                found.fill_(_step(path))
                break
            print(f"warning: {path} is damaged, the state before it is used", file=sys.stderr, flush=True)
    dist.broadcast(found, 0)
    same = [path for path in states(folder) if _step(path) == found]
    if found >= 0 and not same:
        raise InputError(
            f"rank {ranks.rank} does not see step {found} in {folder}: all nodes must share --out"
        )
    return same[0] if same else None


def _step(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step-"))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------- random numbers


def _rng(device: torch.device) -> Tensor:
    """The state of torch's generators as bytes, on `device`."""
    parts = [torch.get_rng_state()]
    if device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(device))
    return torch.cat(parts).to(device)


def _set_rng(numbers: Tensor, device: torch.device) -> None:
    n = len(torch.get_rng_state())
    torch.set_rng_state(numbers[:n].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(numbers[n:].clone(), device)


def flush_folder(folder: Path) -> None:
    """Put the names in a folder onto the disk, as fsync does with a file's bytes."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
