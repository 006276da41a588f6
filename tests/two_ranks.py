"""What two ranks do and see, for tests/test_ranks.py."""

import functools
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mod_distill
import sft
from model import Llava
from support import ranks as support_ranks
from support import run as support_run
from support import state
from support.ranks import process_group

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def fp64(patch: pytest.MonkeyPatch) -> None:
    """All arithmetic and weights in fp64."""
    patch.setattr(support_run, "precision", lambda *_: torch.float64)
    load = Llava.from_checkpoint.__func__
    patch.setattr(Llava, "from_checkpoint", classmethod(lambda cls, path, *_: load(cls, path, torch.float64)))


@case
def losses_in_fp64(root, argv, **_) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fp64(patch)
        for step in "d2s", "pd":
            for micro in 4, 1:
                split = ["--micro_batch", str(micro), "--out", str(root / f"{step}-{micro}")]
                mod_distill.main([*argv[step], *split])


@case
def gradients(root, argv, **_) -> list:
    """Storages of the gradients before every micro-batch of a run that accumulates four."""
    seen, trained = [], []
    make, inner = sft.make_optimizer, sft.over_rows

    def looks(*args):
        kept = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes()
                for p in trained if p.grad is not None}
        seen.append([sorted(kept), sum(kept.values())])
        return inner(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "make_optimizer", lambda run, ps: trained.extend(ps) or make(run, ps))
        patch.setattr(sft, "over_rows", looks)
        sft.main([*argv["sft"], "--micro_batch", "1", "--out", str(root / "gradients")])
    return [seen, sum(p.numel() * p.element_size() for p in trained)]


def anonymous() -> int:
    """Bytes of memory that this process shares with nobody and no file."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


@case
def memory(root, **_) -> int:
    """How much a resume has taken when the whole state is there."""
    with process_group() as ranks:
        args = SimpleNamespace(resume=None, keep=2, shard="none", lr=0.1, weight_decay=0.0)
        run = SimpleNamespace(args=args, ranks=ranks, out=root / "memory", bad=set(), n_bad_steps=0)
        student = nn.Sequential(nn.Linear(2560, 4096))  # 42 MB, and a state of 126
        optimizer = state.make_optimizer(run, list(student.parameters()))
        student[0].weight.grad, student[0].bias.grad = torch.ones(4096, 2560), torch.ones(4096)
        optimizer.step()
        state.save_state(run, 1, student, optimizer)
        before, taken, load = anonymous(), [], optimizer.load_state_dict
        optimizer.load_state_dict = lambda saved: (taken.append(anonymous() - before), load(saved))
        assert state.load_state(run, student, optimizer) == 1
        return taken[0]


@case
def shard(root, argv, **_) -> list:
    """Runs that share AdamW's state out or not, or change that on the way; bytes of moments on this rank."""
    held, make = {}, sft.make_optimizer

    def made(name, run, trained):
        held[name] = make(run, trained)
        return held[name]

    def dies(run, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        return support_run.write_log(run, step, *rest)

    for name in "none none", "optimizer optimizer", "optimizer none", "none optimizer":
        flags = [
            *argv["sft"],
            "--micro_batch",
            "2",
            "--save_every",
            "2",
            "--out",
            str(root / name),
            "--shard",
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft, "make_optimizer", functools.partial(made, name))
            if name != "none none":
                with process_group(), patch.context() as crash, pytest.raises(KeyboardInterrupt):
                    crash.setattr(sft, "write_log", dies)
                    sft.main([*flags, name.split()[0]])
            sft.main([*flags, name.split()[1]])
    size = lambda o: sum(m.nbytes for s in o.state.values() for m in (s or {}).values() if m.dim())
    return [size(held["none none"]), size(held["optimizer optimizer"].optim), size(held["none optimizer"])]


@case
def cycles(root, **_) -> list[bool]:
    """Starts and ends of a group around a DDP step; whether each left a DDP behind."""
    left, store = [], next(support_ranks.rendezvous("env://"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support_ranks, "rendezvous", lambda *_, **__: iter([store]))  # a new one takes 0.1 s
        for _ in range(100):
            with process_group() as ranks:
                forward = ranks.data_parallel(nn.Linear(4, 4))
                loss = forward(torch.randn(2, 4)).sum()
                loss.backward()
                ddp = weakref.ref(ranks._ddp)
            left.append(ddp() is not None)
    return left


def play(root: Path, argv: dict[str, list[str]]) -> dict[str, object]:
    """What this rank sees in all cases."""
    return {name: case(root=root, argv=argv) for name, case in CASES.items()}
