"""What nobody forks: process group, precision, learning rate, counts, log, run folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flags import InputError

if TYPE_CHECKING:
    from data import Batch, LlavaData


# Response, visual and prompt rows and images of a global batch per rank; its tokens and unreadable samples.
Counts = namedtuple("Counts", "response visual prompt images tokens bad")


# ---------------------------------------------------------------------------------- processes and devices


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
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    else:  # plain `python dft.py`: a group of one, so that there is one code path
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Group(rank, world, device)
    except BaseException:
        if world == 1:  # after an error other ranks may never answer
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class Run:
    """One run of one stage: its process group, device, precision and folder.

    `with Run(args, "dft") as run:` and then `run.finished` says whether OUT holds this very run, finished.
    """

    def __init__(self, args: argparse.Namespace, stage: str):
        self.args, self.stage, self.out = args, stage, Path(args.out)

    def __enter__(self) -> Run:
        self.group = process_group()
        self.rank, self.world, self.device = self.group.__enter__()
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dtype = self.dtype_of(self.args.dtype)
        self.accumulation, rest = divmod(self.args.global_batch, self.args.micro_batch * self.world)
        if rest or not self.accumulation:
            raise InputError(
                f"--global_batch {self.args.global_batch} is not a multiple of --micro_batch "
                f"{self.args.micro_batch} x {self.world} ranks = {self.args.micro_batch * self.world}"
            )
        self.finished = self._open_folder()
        random.seed(self.args.seed)
        torch.manual_seed(self.args.seed)
        return self

    def __exit__(self, *error: object) -> bool | None:
        return self.group.__exit__(*error)

    @property
    def main_rank(self) -> bool:
        return self.rank == 0

    def say(self, message: str) -> None:
        if self.main_rank:
            tqdm.write(message)

    def dtype_of(self, name: str) -> torch.dtype:
        return {"auto": self.dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[name]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    # ------------------------------------------------------------------ the folder of the run

    def identity(self) -> dict:
        """What makes a run the same run: its flags, but for those that only change its speed."""
        ignored = {"out", "workers", "micro_batch", "gradient_checkpointing"}
        return {"stage": self.stage} | {k: v for k, v in vars(self.args).items() if k not in ignored}

    def _open_folder(self) -> bool:
        """True if the run is there and finished; an InputError if the folder belongs to a different run."""
        path, identity = self.out / "run.json", json.loads(json.dumps(self.identity()))
        if path.exists():
            try:
                there = dict(json.loads(path.read_text()))
            except ValueError:
                raise InputError(f"{path} cannot be read; delete {self.out} or take another folder") from None
            finished = there.pop("seconds", None) is not None
            differing = sorted(k for k in there.keys() | identity.keys() if there.get(k) != identity.get(k))
            if differing:
                flags = "; ".join(f"{k}: {there.get(k)!r} there, {identity.get(k)!r} now" for k in differing)
                raise InputError(
                    f"--out {self.out} holds a different run ({flags}); take another or delete it"
                )
            if finished:
                self.say(f"{self.out}: this run is finished already")
                return True
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise InputError(
                f"--out {self.out} is no empty folder and holds no run of ours; take another folder"
            )
        return False

    def _write_identity(self, seconds: float | None) -> None:
        text = json.dumps(self.identity() | {"seconds": seconds}, indent=1)
        (self.out / "run.json").write_text(text + "\n")

    def finish(self, student: nn.Module) -> None:
        """Save the student and mark the run as finished."""
        self.bar.close()
        if self.main_rank:
            student.save(self.out)
            self._write_identity(seconds=round(time.perf_counter() - self.started, 1))
            self.say(f"saved {self.out}" + f"; {self.n_bad} unreadable samples left out" * bool(self.n_bad))
        dist.barrier()

    def start(self, student: nn.Module, steps: int, data: LlavaData, note: str = "") -> None:
        """All checks are done: take the folder, print the start-up summary, start the clock."""
        dist.barrier()  # every rank has looked into the folder before one writes
        if self.main_rank:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "log.jsonl").write_text("")
            self._write_identity(seconds=None)
        batch, micro = self.args.global_batch, self.args.micro_batch
        split = f"{self.accumulation} x {micro} x {self.world} rank(s)"
        self.say(f"{self.stage}: {steps} steps of {batch} samples = {split}")
        self.say(f"  {str(self.dtype)[6:]} on {self.device.type}; {len(data)} samples, {steps * batch} drawn")
        if data.n_too_long:
            self.say(f"  {data.n_too_long} samples left out: their prompts are longer than --max_len")
        for name, part in student.named_children():
            n = [sum(p.numel() for p in part.parameters() if p.requires_grad == on) for on in (True, False)]
            self.say(f"  {name:22s} trained {n[0]:>13,d}   frozen {n[1]:>13,d}")
        if note:
            self.say(f"  {note}")
        self.n_bad, self.started = 0, time.perf_counter()
        self.clock = self.started
        self.bar = tqdm(total=steps, desc=self.stage, disable=not self.main_rank, mininterval=1.0)

    # ------------------------------------------------------------------ inside the loop

    def count(self, micros: list[Batch], n_visual_tokens: int) -> Counts:
        """What the global batch holds, over this step's micro-batches and all ranks.

        Rows and images are counted per rank, on average, and as 1 where there are none: a loss weighs its
        rows by 1 / count, DDP averages over ranks: every loss is the mean over the rows of the global batch.
        """
        counts = sum(batch.counts(n_visual_tokens) for batch in micros).to(self.device)
        dist.all_reduce(counts)
        *rows, tokens, bad = counts.tolist()
        n = Counts(*[(count or 1) / self.world for count in rows], tokens, bad)
        self.n_bad += int(n.bad)
        mine = [message for batch in micros for message in batch.bad]
        for message in mine:
            tqdm.write(f"unreadable, {self.n_bad} so far: {message}", file=sys.stderr)
        if self.n_bad > self.args.skip_bad:
            what = mine[0] if mine else f"{int(n.bad)} sample(s) of other ranks cannot be read"
            raise InputError(f"{what}; repair it or allow more with --skip_bad (now {self.args.skip_bad})")
        return n

    def parallel(self, student: nn.Module) -> nn.Module:
        """The student under DDP. A single rank has nobody to exchange with: no buckets, no copies."""
        if self.world == 1:
            return student
        return DistributedDataParallel(student, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def sync(self, ddp: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Ranks exchange gradients on the last micro-batch of a step only."""
        return contextlib.nullcontext() if last or self.world == 1 else ddp.no_sync()

    def log(self, step: int, lr: float, losses: list[dict[str, Tensor]], tokens: float, norm: Tensor) -> None:
        """One step's line in log.jsonl and on the bar from each micro-batch's share of the global means."""
        stacked = [torch.stack([value.detach().double() for value in terms.values()]) for terms in losses]
        values = torch.stack(stacked).sum(0)
        dist.all_reduce(values)
        values /= self.world
        now = time.perf_counter()
        speed, self.clock = tokens / (now - self.clock), now
        if self.main_rank:
            terms = dict(zip(losses[0], values.tolist()))
            line = {"step": step, "lr": lr} | terms | {"tokens_per_s": round(speed), "grad_norm": norm.item()}
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            self.bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
            self.bar.update()
        if not math.isfinite(norm.item() + values.sum().item()):
            raise InputError(
                f"step {step}: the loss or its gradient is not finite; see {self.out / 'log.jsonl'}"
            )


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
