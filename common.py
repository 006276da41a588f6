"""What nobody forks: process group, precision, learning rate, counts, log, run folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flags import InputError
from ranks import process_group
from resume import collect, read_state, restore, write_state, write_whole

if TYPE_CHECKING:
    from data import Batch, LlavaData


STOPPED = 75  # exit code of a run that a signal stopped: its state is saved, the same command goes on

# Response, visual and prompt rows and images of a global batch per rank; its tokens and unreadable samples.
Counts = namedtuple("Counts", "response visual prompt images tokens bad")


# ---------------------------------------------------------------------------------- processes and devices


class Run:
    """One run of one stage: its process group, device, precision and folder.

    `with Run(args, "dft") as run:` and then `run.finished` says whether OUT holds this very run, finished.
    """

    def __init__(self, args: argparse.Namespace, stage: str):
        self.args, self.stage, self.out, self.handlers = args, stage, Path(args.out), {}

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
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
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
        ignored = {"out", "workers", "micro_batch", "gradient_checkpointing",
                   "save_every", "keep", "resume", "max_bad_steps"}  # fmt: skip
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
        write_whole(
            self.out / "run.json", json.dumps(self.identity() | {"seconds": seconds}, indent=1) + "\n"
        )

    def finish(self, student: nn.Module) -> None:
        """Save the student and mark the run as finished."""
        self.bar.close()
        if self.main_rank:
            beside = self.out / ".saving"  # nobody may find half of a model
            shutil.rmtree(beside, ignore_errors=True)
            student.save(beside)
            for file in beside.iterdir():
                os.replace(file, self.out / file.name)
            beside.rmdir()
            self._write_identity(seconds=round(time.perf_counter() - self.started, 1))
            shutil.rmtree(self.out / "state", ignore_errors=True)
            self.say(f"saved {self.out}" + f"; {self.n_bad} unreadable samples left out" * bool(self.n_bad))
        dist.barrier()

    def start(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        data: LlavaData,
        note: str = "",
    ) -> int:
        """All checks are done: take the folder, print the start-up summary, start the clock.

        Returns the first step to do: 0, or where the run was when it was interrupted.
        """
        dist.barrier()  # every rank has looked into the folder before one writes
        self.student, self.optimizer, self.steps = student, optimizer, steps
        first, self.n_bad, self.n_skipped, self.stop = 0, 0, 0, False
        if not self.args.resume and self.main_rank:
            shutil.rmtree(self.out / "state", ignore_errors=True)
        dist.barrier()
        state = read_state(self.out / "state", self.rank)
        if state:
            restore(state, student, optimizer, self.rank, self.device)
            first, self.n_bad, self.n_skipped = state["step"], *state["counts"].values()
        if self.main_rank:
            self.out.mkdir(parents=True, exist_ok=True)
            log = self.out / "log.jsonl"
            lines = log.read_text().split("\n")[:first] if first else []  # those of the steps that are done
            write_whole(log, "".join(f"{line}\n" for line in lines))
            self._write_identity(seconds=None)
        for number in (
            (signal.SIGTERM, signal.SIGINT) if threading.main_thread() is threading.current_thread() else ()
        ):
            self.handlers[number] = signal.signal(number, self._ask_to_stop)
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
        if first:
            self.say(f"  goes on after step {first}")
        self.started = self.clock = time.perf_counter()
        self.bar = tqdm(
            total=steps, initial=first, desc=self.stage, disable=not self.main_rank, mininterval=1.0
        )
        return first

    def _ask_to_stop(self, *_: object) -> None:
        self.stop = True  # after this step

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

    def sound(self, step: int, losses: list[dict[str, Tensor]], norm: Tensor, micros: list[Batch]) -> bool:
        """Whether losses and gradients are finite; all ranks agree. If not, this step's update is left out.

        After --max_bad_steps such steps the run stops. Their weights never reach a file.
        """
        bad = torch.zeros(self.world + 1, device=self.device)
        bad[self.rank] = not math.isfinite(sum(terms["loss"].item() for terms in losses))
        bad[-1] = not math.isfinite(norm.item())
        dist.all_reduce(bad)
        if not bad.any():
            return True
        ranks = [rank for rank in range(self.world) if bad[rank]]
        what = f"loss of rank {', '.join(map(str, ranks))}" if ranks else "gradient"
        message = f"step {step}: the {what} is not finite"
        if self.rank in ranks or not ranks:
            message += f"; rank {self.rank} had {', '.join(name for batch in micros for name in batch.names)}"
        self.n_skipped += 1
        if self.n_skipped > self.args.max_bad_steps:
            raise InputError(
                f"{message}; see {self.out / 'log.jsonl'} (--max_bad_steps {self.args.max_bad_steps})"
            )
        tqdm.write(f"{message}; update left out, {self.n_skipped} so far", file=sys.stderr)
        return False

    def log(self, step: int, lr: float, losses: list[dict[str, Tensor]], tokens: float, norm: Tensor) -> None:
        """End a step: its line in log.jsonl and on the bar from each micro-batch's share of the global means;
        the training state where it is due; the end of the run where a signal asked for it.
        """
        stacked = [torch.stack([value.detach().double() for value in terms.values()]) for terms in losses]
        stop = torch.tensor([float(self.stop) * self.world], dtype=torch.double, device=self.device)
        values = torch.cat([torch.stack(stacked).sum(0), stop])
        dist.all_reduce(values)
        *values, stop = (values / self.world).tolist()
        now = time.perf_counter()
        speed, self.clock = tokens / (now - self.clock), now
        if self.main_rank:
            terms = dict(zip(losses[0], values))
            line = {"step": step, "lr": lr} | terms | {"tokens_per_s": round(speed), "grad_norm": norm.item()}
            line = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            self.bar.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
            self.bar.update()
        done, every = step + 1, self.args.save_every
        if done < self.steps and (stop or (every and done % every == 0)):
            counts = {"n_bad": self.n_bad, "n_skipped": self.n_skipped}
            state = collect(self.student, self.optimizer, done, self.device, **counts)
            if self.main_rank:
                write_state(self.out / "state", done, state, self.args.keep)
        if done < self.steps and stop:
            dist.barrier()
            self.bar.close()
            self.say(f"stopped after step {done} of {self.steps}; the same command goes on from there")
            raise SystemExit(STOPPED)


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
