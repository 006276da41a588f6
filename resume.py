"""Training state on disk: what a run needs to go on exactly where it was. A file is whole or not there.

A state is one file, `state/step-00000100.<sha256 of its bytes>.pt`: written beside, flushed to the disk and
renamed, so that the one before it stays good until this one is complete, and any change of its bytes shows.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flags import InputError
from ranks import everywhere


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old one or the new one."""
    beside = path.with_name(f".{path.name}.writing")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_state(folder: Path, step: int, state: dict, keep: int) -> None:
    """Write the state after `step` steps and remove all but the newest `keep`."""
    beside = folder / ".writing"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, folder / f"step-{step:08d}.{_digest(beside)}.pt")
        _flush_folder(folder)
        for old in states(folder)[keep:]:
            old.unlink()
    except (OSError, RuntimeError) as error:  # torch.save wraps some of the system's errors
        beside.unlink(missing_ok=True)
        good = states(folder)
        left = f"; the last good one, {good[0].name.split('.')[0]}, is untouched" if good else ""
        raise InputError(
            f"cannot write the training state of step {step} to {folder}: {error}{left}"
        ) from None


def read_state(folder: Path, rank: int) -> dict | None:
    """The newest state whose bytes are as they were written, the same one on every rank; None without any."""
    found = torch.tensor(-1)
    if rank == 0:
        for path in states(folder):
            if _digest(path) == path.name.split(".")[1]:
                found.fill_(_step(path))
                break
            print(f"warning: {path} is damaged, the state before it is used", file=sys.stderr, flush=True)
    found = everywhere(found)
    for path in states(folder):
        if _step(path) == found.item():
            return torch.load(path, map_location="cpu", weights_only=True)
    if found.item() >= 0:
        raise InputError(
            f"rank {rank} does not see step {found.item()} in {folder}: all nodes must share --out"
        )
    return None


def states(folder: Path) -> list[Path]:
    """The states that are there, the newest first."""
    return sorted(folder.glob("step-*.pt"), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step-"))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ---------------------------------------------------------------------------------- what a state holds


def collect(
    student: nn.Module, optimizer: torch.optim.Optimizer, step: int, device: torch.device, **counts: int
) -> dict:
    """Weights that are trained, optimizer, random numbers of every rank; every rank must call this."""
    rng = torch.cat([part.flatten().view(torch.uint8) for part in _rng(device)]).to(device)
    every = [torch.empty_like(rng) for _ in range(dist.get_world_size())]
    dist.all_gather(every, rng)
    trained = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}
    return {"step": step, "parameters": trained, "optimizer": optimizer.state_dict(),
            "rng": torch.stack(every).cpu(), "counts": counts}  # fmt: skip


def restore(
    state: dict, student: nn.Module, optimizer: torch.optim.Optimizer, rank: int, device: torch.device
) -> None:
    """Put everything back. With another number of ranks, random numbers come from a rank that was there."""
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if parameters.keys() != state["parameters"].keys():
        raise InputError("the training state is of another model: take another --out or delete this one")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    rng, parts = state["rng"][rank % len(state["rng"])], _rng(device)
    sizes = [part.numel() * part.element_size() for part in parts]
    numbers, torch_state, *cuda = rng.split(sizes)
    version, gauss = random.getstate()[0], random.getstate()[2]
    random.setstate((version, tuple(numbers.clone().view(torch.int64).tolist()), gauss))
    torch.set_rng_state(torch_state.clone())
    if cuda:
        torch.cuda.set_rng_state(cuda[0].clone(), device)


def _rng(device: torch.device) -> list[Tensor]:
    parts = [torch.tensor(random.getstate()[1]), torch.get_rng_state()]
    return parts + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
