"""What is to be done in the toy world, each task once, on several cores: stages, their FLOPs, scores, and how
near students are to their teacher.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from graphlib import TopologicalSorter
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import fmean
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import evaluate
from data import LlavaData
from lab.world import SKILLS, sample
from losses import kl_divergence, over_common_ids
from model import Llava, load_teacher
from support.run import ROOT


class Task(NamedTuple):
    """Something that makes `out`; `made`, what it is made by, is recorded beside it in OUT.json."""

    call: Callable[[Task], None]
    script: Path  # of the stage
    argv: list[str]
    out: Path
    inputs: list[Path]  # what it is made from
    made: dict

    def is_made(self) -> bool:
        """Whether `out` was made, or begun, by this code and these flags, after its inputs."""
        path = Path(f"{self.out}.json")
        if not path.exists() or not self.made.items() <= note(self.out).items():
            return False
        return all(path.stat().st_mtime_ns >= Path(f"{i}.json").stat().st_mtime_ns for i in self.inputs)

    def is_done(self) -> bool:
        run, stage = self.out / "run.json", self.call is train
        return self.is_made() and not (stage and (not run.exists() or '"seconds": null' in run.read_text()))

    def record(self, **found: float) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{self.out}.json").write_text(json.dumps(self.made | found, indent=1) + "\n")


@contextmanager
def stage_of(script: Path) -> Iterator[ModuleType]:
    """The stage of a script. A fork's, which lies elsewhere, is forgotten afterwards, with its `losses`."""
    if script.parent == ROOT:
        yield importlib.import_module(script.stem)
        return
    names = script.stem, "losses"
    ours = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(script.parent))
    importlib.invalidate_caches()  # the fork may have been written a moment ago
    try:
        yield importlib.import_module(script.stem)
    finally:
        sys.path.remove(str(script.parent))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(ours)


def note(out: Path) -> dict:
    """What is recorded of the task that makes `out`."""
    return json.loads(Path(f"{out}.json").read_text())


def steps_of(task: Task) -> int:
    return int(task.argv[task.argv.index("--max_steps") + 1])


def train(task: Task) -> None:
    """Run a stage, or go on with it. Its seconds are those of the processor, which do not grow where other
    programs run, without those of reading.
    """
    if not task.is_made():
        shutil.rmtree(task.out, ignore_errors=True)
        task.record()
    before = note(task.out).get("seconds", 0)
    begun = time.process_time() - reading.seconds
    with stage_of(task.script) as stage:
        try:
            stage.main(task.argv)
        finally:
            task.record(seconds=round(before + time.process_time() - reading.seconds - begun, 2))


def count(task: Task) -> None:
    """Record the FLOPs of a kind of stage: the products of one step, the teacher's forward pass included,
    times its steps. Torch's counter does not know fused attention on a CPU, nor products added in place.
    """
    added = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=added)
    argv = task.argv.copy()
    with tempfile.TemporaryDirectory() as folder, stage_of(task.script) as stage:
        for flag, value in ("--out", f"{folder}/step"), ("--max_steps", "1"):
            argv[argv.index(flag) + 1] = value
        with sdpa_kernel(SDPBackend.MATH), counter:
            stage.main(argv)
    task.record(tflop=counter.get_total_flops() * steps_of(task) / 1e12)


def score(task: Task) -> None:
    """Let a model answer, anew: what is there may be by other code."""
    shutil.rmtree(task.out, ignore_errors=True)
    evaluate.main(task.argv)
    task.record()


@torch.no_grad()
def compare(task: Task) -> None:
    """Record how near a student is to a teacher of the same tower, on pictures that no model was trained on:
    how often both find the same token likeliest, in percent, and the mean KL to the teacher's distribution,
    over all answer rows and all visual rows of 1,000 questions with their right answers.
    """
    student_path, teacher_path, questions, images = task.argv
    student = Llava.from_checkpoint(student_path).eval()
    teacher = load_teacher(teacher_path, student, torch.float32)
    lines = map(json.loads, Path(questions).read_text().splitlines())
    asked = [q for q in lines if q["category"] in SKILLS][:1000]
    records = [sample(str(k), q["image"], f"<image>\n{q['text']}", q["label"]) for k, q in enumerate(asked)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(records))
        file.flush()
        args = argparse.Namespace(data=[file.name], images=images, skip_bad=0, max_len=128)
        data = LlavaData(args, student)
        samples = [data[i] for i in range(len(data))]
    found = defaultdict(list)
    for batch in (data.collate(samples[k : k + 250]) for k in range(0, len(samples), 250)):
        z = student.encode_images(batch.pixel_values)
        h_s, h_t = student(batch.input_ids, z), teacher(batch.input_ids, z)
        for kind, rows in ("answers", batch.response), ("images", batch.visual):
            log_p = (m.lm_head(h[rows]).log_softmax(-1) for m, h in ((student, h_s), (teacher, h_t)))
            log_s, log_t = over_common_ids(*log_p)
            found[f"agree, {kind}"] += (100.0 * (log_s.argmax(-1) == log_t.argmax(-1))).tolist()
            found[f"KL, {kind}"] += kl_divergence(log_s, log_t).tolist()
    task.record(**{name: fmean(values) for name, values in found.items()})


BAR = "{percentage:3.0f}% |{bar:30}| {elapsed} gone, about {remaining} left: {desc}"
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
        known = vars(data).setdefault("known", {})  # samples of these files, by their numbers
        if i not in known:
            begun = time.process_time()
            _, *sample = data.sample(int(data.usable[i]))
            encoder, n_towers = data.encoder, len(data.image_processors)
            key = repr(sample), encoder.max_len, encoder.caption_only, n_towers
            if key not in kept:
                if len(kept) > 300_000:  # 2 GiB
                    kept.clear()
                kept[key] = read(data, i)
            known[i] = kept[key]
            reading.seconds += time.process_time() - begun
        return known[i]

    return remember


def end_with_parent() -> None:
    parent_process().join()
    while True:  # a stage saves its state and stops, then the worker itself
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def work_of(task: Task) -> int:
    """How long a task takes, roughly, in steps of the small student; a teacher's are five times as long."""
    if task.call is not train:
        return 100
    is_student = task.out.parent.name.isdigit()  # a number of scenes
    return steps_of(task) * (1 + ("--teacher" in task.argv)) * (1 if is_student else 5)


def done_of(task: Task) -> float:
    """How much of that is done, of a task that runs."""
    log = task.out / "log.jsonl"
    if task.call is not train or not log.exists():
        return 0
    return work_of(task) * min(1, log.read_bytes().count(b"\n") / steps_of(task))


def do(tasks: dict[Path, Task], jobs: int, out: Path) -> None:
    """Do all tasks that are not done, each after what it is made from, so many at a time."""
    inputs = {key: [i for i in task.inputs if i in tasks] for key, task in tasks.items()}
    todo: dict[Path, int] = {}  # and how much can only be done afterwards
    for key in TopologicalSorter(inputs).static_order():
        if todo.keys() & inputs[key] or not tasks[key].is_done():
            todo[key] = 0
    for key in reversed(todo):
        for i in todo.keys() & inputs[key]:
            todo[i] = max(todo[i], todo[key] + work_of(tasks[key]))
    order = TopologicalSorter({key: todo.keys() & inputs[key] for key in todo})
    order.prepare()
    ready, running, done = [*order.get_ready()], {}, 0
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # the tables are of CPUs, in fp32
    bar = tqdm(total=sum(work_of(tasks[key]) for key in todo), bar_format=BAR, smoothing=0, disable=not todo)
    with ProcessPoolExecutor(jobs, get_context("spawn"), start_worker, (out / "stages.log",)) as pool, bar:
        while ready or running:
            while ready and len(running) < jobs:
                ready.remove(key := max(ready, key=todo.__getitem__))
                running[pool.submit(tasks[key].call, tasks[key])] = key
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                future.result()
                order.done(key)
                done += work_of(tasks[key])
                ready += order.get_ready()
            bar.set_description_str(", ".join(key.name for key in running.values()), refresh=False)
            bar.update(done + sum(done_of(tasks[key]) for key in running.values()) - bar.n)
