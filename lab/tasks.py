"""What is to be done in the toy world, each task once: stages, their FLOPs and scores, on several cores."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from graphlib import TopologicalSorter
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import evaluate
from data import LlavaData


class Task(NamedTuple):
    """Something that makes `out`; `made`, what it is made by, is recorded beside it in OUT.json."""

    call: Callable[[Task], None]
    script: str
    argv: list[str]
    out: Path
    inputs: list[Path]  # what it is made from
    made: dict

    def is_made(self) -> bool:
        """Whether `out` was made, or begun, by this code and these flags, after its inputs."""
        path = Path(f"{self.out}.json")
        if not path.exists() or not self.made.items() <= json.loads(path.read_text()).items():
            return False
        return all(path.stat().st_mtime_ns >= Path(f"{i}.json").stat().st_mtime_ns for i in self.inputs)

    def is_done(self) -> bool:
        run, stage = self.out / "run.json", self.call is train
        return self.is_made() and not (stage and (not run.exists() or '"seconds": null' in run.read_text()))

    def record(self, **found: float) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{self.out}.json").write_text(json.dumps(self.made | found, indent=1) + "\n")


def train(task: Task) -> None:
    """Run a stage, or go on with it."""
    if not task.is_made():
        shutil.rmtree(task.out, ignore_errors=True)
        task.record()
    begun = reading.seconds
    importlib.import_module(task.script).main(task.argv)
    task.record(reading=round(reading.seconds - begun, 1))


def count(task: Task) -> None:
    """Record the FLOPs of a kind of stage: the products of one step, the teacher's forward pass included,
    times its steps. Torch's counter does not know fused attention on a CPU, nor products added in place.
    """
    stage = importlib.import_module(task.script)
    added = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=added)
    argv = task.argv.copy()
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH), counter:
        for flag, value in ("--out", f"{folder}/step"), ("--max_steps", "1"):
            argv[argv.index(flag) + 1] = value
        stage.main(argv)
    task.record(tflop=counter.get_total_flops() * stage.parse_args(task.argv).max_steps / 1e12)


def score(task: Task) -> None:
    """Let a model answer, anew: what is there may be by other code."""
    shutil.rmtree(task.out, ignore_errors=True)
    evaluate.main(task.argv)
    task.record()


reading = SimpleNamespace(seconds=0.0)  # that this process has spent on samples


def start_worker(log: Path) -> None:
    """Prepare a worker: one thread; output goes to a log; it ends with its parent; a sample is read once."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    LlavaData.__getitem__ = read_once(LlavaData.__getitem__)


def read_once(read: Callable[[LlavaData, int], dict]) -> Callable[[LlavaData, int], dict]:
    """`read`, remembering samples, whatever file they are in: reading is three quarters of a small step."""
    kept = {}

    def remember(data: LlavaData, i: int) -> dict:
        begun = time.perf_counter()
        _, *sample = data.sample(int(data.usable[i]))
        encoder, n_towers = data.encoder, len(data.image_processors)
        key = repr(sample), encoder.max_len, encoder.caption_only, n_towers
        if key not in kept:
            if len(kept) > 300_000:  # 2 GiB
                kept.clear()
            kept[key] = read(data, i)
        reading.seconds += time.perf_counter() - begun
        return kept[key]

    return remember


def end_with_parent() -> None:
    parent_process().join()
    while True:  # a stage saves its state and stops, then the worker itself
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def do(tasks: dict[Path, Task], jobs: int, out: Path) -> None:
    """Do all tasks that are not done, each after what it is made from, so many at a time."""
    order = TopologicalSorter({key: [i for i in task.inputs if i in tasks] for key, task in tasks.items()})
    order.prepare()
    ready, running, n = deque(), {}, 0
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # the tables are of CPUs, in fp32
    with ProcessPoolExecutor(jobs, get_context("spawn"), start_worker, (out / "stages.log",)) as pool:
        while order.is_active():
            ready += order.get_ready()
            while ready and len(running) < jobs:
                key = ready.popleft()
                if tasks[key].is_done():
                    order.done(key)
                    n += 1
                else:
                    running[pool.submit(tasks[key].call, tasks[key])] = key
                ready += order.get_ready()
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                key = running.pop(future)
                future.result()
                order.done(key)
                n += 1
                print(f"{n}/{len(tasks)} {key.relative_to(out)}", flush=True)
