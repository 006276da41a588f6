"""Training state on disk: what a run needs to go on exactly where it was. A file is whole or not there.

A state is one file, `state/step-00000100.<sha256 of its bytes>.pt`: written beside, flushed to the disk and
renamed, so that the one before it stays good until this one is complete, and any change of its bytes shows.
Weights and optimizer are in it; random numbers depend on seed, step and rank alone.
"""

import hashlib
import io
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, Optimizer

from support.flags import InputError, require
from support.ranks import STOPPED, Ranks
from support.run import Run


def make_optimizer(run: Run, trained: list[nn.Parameter], betas: tuple = (0.9, 0.999)) -> Optimizer:
    """AdamW; with --shard optimizer every rank keeps the moments of its share of the weights alone."""
    options = {"lr": run.args.lr, "weight_decay": run.args.weight_decay, "betas": betas}
    if run.args.shard == "none":
        return AdamW(trained, **options, fused=True)
    from torch.distributed.optim import ZeroRedundancyOptimizer as Sharded  # takes a second to import

    # Inside it, the fused AdamW may fail to load its state on CUDA (pytorch #124133).
    return Sharded(trained, AdamW, **options, fused=run.ranks.device.type != "cuda")


def load_state(run: Run, student: nn.Module, optimizer: Optimizer) -> int:
    """Set student and optimizer to the newest sound state in OUT. Returns the number of steps done."""
    path = None if run.args.resume is False else newest_sound(run.out / "state", run.ranks)
    if path is None:
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # not a copy for each rank
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    same = trained.keys() == state["parameters"].keys()
    require(same, "the training state is of another model: take another --out or delete this one")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(state["parameters"][name])
    for saved, group in zip(state["optimizer"]["param_groups"], optimizer.param_groups):
        saved["fused"] = group["fused"]  # this run's: device and --shard may have changed
    optimizer.load_state_dict(state["optimizer"])
    if run.args.shard == "optimizer":
        optimizer.state.clear()  # a second copy: it works with optimizer.optim.state
    run.bad, run.n_bad_steps = set(state["bad"]), state["n_bad_steps"]
    return state["step"]


def save_state_if_due(run: Run, step: int, student: nn.Module, optimizer: Optimizer) -> None:
    """Save the state after `step` if --save_every asks for it and there are more steps."""
    if run.args.save_every and (step + 1) % run.args.save_every == 0 and step + 1 < run.bar.total:
        save_state(run, step + 1, student, optimizer)


def stop_if_asked(run: Run, step: int, student: nn.Module, optimizer: Optimizer) -> None:
    """After SIGTERM or SIGINT: save the state after `step`, say how to go on, and end the process."""
    if run.ranks.stop_was_asked() and step + 1 < run.bar.total:
        save_state(run, step + 1, student, optimizer)
        run.bar.close()
        run.say(f"stopped after step {step + 1} of {run.bar.total}; the same command goes on from there")
        raise SystemExit(STOPPED)


def save_state(run: Run, done: int, student: nn.Module, optimizer: Optimizer) -> None:
    """Write the state after `done` steps, on rank 0, and remove all but the newest --keep."""
    folder, beside = run.out / "state", run.out / "state" / ".writing"
    trained = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}
    if run.args.shard == "optimizer":
        optimizer.consolidate_state_dict()  # on rank 0: what is saved is a plain AdamW's
    try:
        if run.ranks.rank == 0:
            state = {"step": done, "parameters": trained, "optimizer": optimizer.state_dict(),
                     "bad": sorted(run.bad), "n_bad_steps": run.n_bad_steps}
            folder.mkdir(parents=True, exist_ok=True)
            with Hashing(beside) as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, folder / f"step-{done:08d}.{file.sha256.hexdigest()}.pt")
            for old in states(folder)[run.args.keep :]:
                old.unlink()
    except (OSError, RuntimeError) as error:  # torch.save wraps some of the system's errors
        beside.unlink(missing_ok=True)
        left = "".join(f"; the last good one, {p.name[:13]}, is untouched" for p in states(folder)[:1])
        raise InputError(f"cannot write the state of step {done} to {folder}: {error}{left}") from None
    dist.barrier()


class Hashing(io.BufferedWriter):
    """A new file, and the hash of what is written to it: a large state need not be read again for it."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return super().write(data)


def states(folder: Path) -> list[Path]:
    """The states that are there, the newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def newest_sound(folder: Path, ranks: Ranks) -> Path | None:
    """The newest state whose bytes are as they were written, the same one on every rank."""
    found = torch.tensor(-1, device=ranks.device)
    for path in states(folder) if ranks.rank == 0 else []:
        if digest(path) == path.name.split(".")[1]:
            found.fill_(int(path.name[5:13]))
            break
        print(f"warning: {path} is damaged, the state before it is used", file=sys.stderr, flush=True)
    dist.broadcast(found, 0)
    same = [path for path in states(folder) if int(path.name[5:13]) == found]
    lost = found >= 0 and not same
    require(not lost, f"rank {ranks.rank} does not see step {found} in {folder}: nodes must share --out")
    return same[0] if same else None


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
