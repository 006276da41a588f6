"""Training state on disk: what a run needs to go on exactly where it was.

A state is one file, `state/step-00000100.pt`: the optimizer, what is trained, and what a stage has hung on
the student beside its four parts (an adapter, a number in a buffer). It is written beside, flushed to disk
and renamed, so it is whole or not there; it is a zip file, whose checksums tell a damaged one.
"""

import math
import os
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, Optimizer

from support.flags import require
from support.ranks import STOPPED, Ranks
from support.run import Run, writing

PARTS = "vision_tower", "language_model", "multi_modal_projector", "lm_head"  # of a Llava
ATTRIBUTES = *vars(nn.Module()), "config", "processor", "chat"  # that it has besides: none of them changes


def make_optimizer(run: Run, trained: list[nn.Parameter], betas: tuple = (0.9, 0.999)) -> Optimizer:
    """AdamW; with --shard optimizer every rank keeps the moments of its share of the weights alone."""
    options = {"lr": run.args.lr, "weight_decay": run.args.weight_decay, "betas": betas}
    if run.args.shard == "none":
        return AdamW(trained, **options, fused=True)
    from torch.distributed.optim import ZeroRedundancyOptimizer as Sharded  # takes a second to import

    return Sharded(trained, AdamW, **options, fused=True)


def set_lr(optimizer: Optimizer, step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over ceil(warmup x steps) steps, then a cosine to zero; times a group's own "scale"."""
    n_warm = math.ceil(warmup * steps)
    lr = peak * (step + 1) / max(n_warm, 1)
    if step >= n_warm:
        lr = peak * 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(steps - n_warm, 1)))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
    return lr


def kept(student: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The student's tensors that a state holds: all but the frozen weights of its four parts."""
    mine = {k: p for k, p in student.named_parameters() if p.requires_grad or k.split(".")[0] not in PARTS}
    mine |= dict(student.named_buffers())
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    idle = [name for name, p in mine.items() if p.requires_grad and id(p) not in updated][:3]
    foreign = len(updated - {id(p) for p in mine.values()})
    advice = "before `trained` is listed, hang what is learned on it (student.adapter = nn.Linear(8, 8))"
    require(not idle, f"the optimizer lacks the student's {idle}: {advice}, or set requires_grad_(False)")
    require(not foreign, f"{foreign} tensors in the optimizer are not the student's, so not saved: {advice}")
    loose = [name for name in vars(student) if name not in ATTRIBUTES]
    advice = "make it a module, an nn.Parameter, or a buffer by register_buffer(name, torch.tensor(value))"
    require(not loose, f"the student's {loose} would not survive an interruption: {advice}")
    broken = [name for name, x in mine.items() if not x.sum().isfinite()][:3]
    require(not broken, f"the student's {broken} are not finite, so not saved: a lower --lr may help")
    return mine


def load_state(run: Run, student: nn.Module, optimizer: Optimizer) -> int:
    """Set student and optimizer to the newest sound state in OUT. Returns the number of steps done."""
    mine = kept(student, optimizer)  # what cannot be kept is refused before the first step
    path = None if run.args.resume is False else newest_sound(run.out / "state", run.ranks)
    if path is None:
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # not a copy for each rank
    same = mine.keys() == state["student"].keys()
    require(same, f"{path} is of another model: take another --out or delete this one")
    with torch.no_grad():
        for name, x in mine.items():
            x.copy_(state["student"][name])
    optimizer.load_state_dict(state["optimizer"])
    if run.args.shard == "optimizer":
        optimizer.state.clear()  # a second copy: it works with optimizer.optim.state
        for moments in optimizer.optim.state.values():  # it loads the count of steps onto the CPU
            moments["step"] = moments["step"].to(run.ranks.device)
    run.bad, run.n_bad_steps = set(state["bad"]), state["n_bad_steps"]
    return state["step"]


def save_state_if_due(run: Run, step: int, student: nn.Module, optimizer: Optimizer) -> None:
    """Save the state after `step` if --save_every asks for it, or the last: the checkpoint may not fit."""
    every = run.args.save_every
    if step + 1 == run.bar.total or (every and (step + 1) % every == 0):
        save_state(run, step + 1, student, optimizer)


def stop_if_asked(run: Run, step: int, student: nn.Module, optimizer: Optimizer) -> None:
    """After a signal: save the state after `step`, say how to go on, and end the process."""
    if run.ranks.stop_was_asked() and step + 1 < run.bar.total:
        save_state(run, step + 1, student, optimizer)
        run.bar.close()
        run.say(f"stopped after step {step + 1} of {run.bar.total}; the same command goes on from there")
        raise SystemExit(STOPPED)


def save_state(run: Run, done: int, student: nn.Module, optimizer: Optimizer) -> None:
    """Write the state after `done` steps, on rank 0. The newest --keep stay; others make room beforehand."""
    folder, beside = run.out / "state", run.out / "state" / ".writing"
    mine = {name: x.detach() for name, x in kept(student, optimizer).items()}
    if run.args.shard == "optimizer":
        optimizer.consolidate_state_dict()  # on rank 0: what is saved is a plain AdamW's
        if run.ranks.device.type == "cuda":
            torch.cuda.synchronize()  # its copies to the CPU may still be under way
    if run.ranks.rank == 0:
        state = {"step": done, "student": mine, "optimizer": optimizer.state_dict(),
                 "bad": sorted(run.bad), "n_bad_steps": run.n_bad_steps}
        for old in states(folder)[max(run.args.keep - 1, 1) :]:
            old.unlink()
        with writing(f"step {done} into {folder}, beside {[x.name for x in states(folder)]}", beside):
            folder.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, folder / f"step-{done:08d}.pt")
        for old in states(folder)[run.args.keep :]:
            old.unlink()
    dist.barrier()


def states(folder: Path) -> list[Path]:
    """The states that are there, the newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def newest_sound(folder: Path, ranks: Ranks) -> Path | None:
    """The newest state that is as it was written, the same one on every rank."""
    sound = next((p.name for p in states(folder) if is_sound(p)), "") if ranks.rank == 0 else ""
    sound = ranks.gather(sound)[0]
    lost = sound and not (folder / sound).exists()
    require(not lost, f"rank {ranks.rank} does not see {folder / sound}: nodes must share --out")
    return folder / sound if sound else None


def is_sound(path: Path) -> bool:
    """Whether the bytes of a state have the checksums that were written with them; if not, it is said."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is None:
                return True
    except (zipfile.BadZipFile, OSError):
        pass
    print(f"warning: {path} is damaged, the state before it is used", file=sys.stderr, flush=True)
    return False
