"""The processes of a run: torchrun's, or one alone."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util  # its own ending is registered first, and so comes last
import os
import signal
from collections import namedtuple
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

Group = namedtuple("Group", "rank world device")


@contextlib.contextmanager
def process_group() -> Iterator[Group]:
    """torchrun's processes, or a group of one; a script that calls several stages keeps one group for all."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield Group(rank, world, device)
        return
    store = dist.HashStore()  # of plain `python dft.py`: a group of one, so that there is one code path
    if "RANK" in os.environ:
        # Ranks that torchrun starts again meet in the store of the dead ones, with their addresses in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", next(rendezvous("env://"))[0])
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    try:
        yield Group(rank, world, device)
    except BaseException:
        if world == 1:  # after an error other ranks may never answer
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def everywhere(number: Tensor) -> Tensor:
    """Rank 0's number, on all ranks."""
    number = number.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(number, 0)
    return number.cpu()


def ignore_signals(_: int) -> None:
    """In a data process: a signal to the whole group is for the training process, which ends its step."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_data_processes() -> None:
    """They ignore the signal that Python would end them with, and Python would wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
