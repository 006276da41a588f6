"""The long fault tests, whose numbers stand in docs/reliability.md.

python tests/faults.py kills --n 50      SIGKILL at random moments of toy runs; all must end bit-identical
python tests/faults.py million           a 1,000,000-sample data file: seconds and memory, 2 ranks x 2 workers
python tests/faults.py fuzz --n 2000     mutated samples: a batch or a clear error, never anything else
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


# ---------------------------------------------------------------------------------- kills


def kills(n: int, root: Path) -> None:
    """DPT on the toy world, killed and started again until it has been killed `n` times in all."""
    from safetensors.torch import load_file
    from torch import equal

    from lab.world import BASE, write_world

    write_world(root / "world", n_train=60, n_test=1)
    data = ["--images", str(root / "world/images"), "--workers", "0", "--no-caption_only"]
    parts = ["--vision", f"{BASE}/siglip", "--llm", f"{BASE}/qwen-small"]
    flags = ["--data", str(root / "world/pretrain.json"), *data, *parts, "--global_batch", "8",
             "--micro_batch", "4", "--max_steps", "60", "--epochs", "20", "--save_every", "3"]
    command = lambda out: [sys.executable, "dpt.py", *flags, "--out", str(root / out)]
    quiet = {"cwd": ROOT, "env": ENV, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command("whole"), check=True, **quiet)
    want, rng, killed, runs = load_file(root / "whole/model.safetensors"), random.Random(0), 0, 0
    log = root / "killed/log.jsonl"
    steps = lambda: log.read_text().count("\n") if log.exists() else 0
    while killed < n:
        for attempt in range(5):
            process, last = subprocess.Popen(command("killed"), **quiet), steps() + rng.randrange(1, 20)
            while process.poll() is None and (attempt == 4 or steps() < last):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))  # somewhere in a step, or in the writing of a state
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        assert process.returncode == 0
        got = load_file(root / "killed/model.safetensors")
        assert got.keys() == want.keys()
        assert all(equal(got[k], want[k]) for k in want), f"run {runs} differs"
        shutil.rmtree(root / "killed")
        runs += 1
        print(f"{killed} kills in {runs} runs, all ended bit-identical", flush=True)


# ---------------------------------------------------------------------------------- a million samples


def million(n: int, root: Path) -> None:
    words = "a red circle stands on top of the blue square while nobody looks at it from the left".split()
    rng = random.Random(0)
    (root / "images").mkdir()
    for k in range(100):
        (root / "images" / f"{k}.png").touch()
    with open(root / "data.json", "w") as file:
        file.write("[")
        for i in range(n):
            talk = [("human", "<image>\nwhat is this ?" if k == 0 else "and then ?") if k % 2 == 0 else
                    ("gpt", " ".join(rng.choices(words, k=60))) for k in range(6)]
            turns = [{"from": who, "value": text} for who, text in talk]
            file.write(
                ",\n" * (i > 0) + json.dumps({"id": i, "image": f"{i % 100}.png", "conversations": turns})
            )
        file.write("]")
    print(f"{n:,} samples, {(root / 'data.json').stat().st_size / 1e9:.2f} GB")
    for name in "first", "second":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                   "29611", __file__, "open", "--root", str(root)]
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)
        base, peak, imported = 0.0, 0.0, root / "imported"
        while process.poll() is None:
            total = sum(map(pss, tree(process.pid)))
            if (root / "go").exists():
                peak = max(peak, total)
            elif len(list(root.glob("ready-*"))) == 2:
                base = total
                (root / "go").touch()
            time.sleep(0.05)
        print(
            f"{name} time: {process.stdout.read().strip()}; memory beyond the imports {peak - base:.0f} MiB",
            flush=True,
        )
        for mark in [*root.glob("ready-*"), root / "go", imported]:
            mark.unlink(missing_ok=True)
        assert process.returncode == 0


def tree(pid: int) -> list[int]:
    try:
        children = open(f"/proc/{pid}/task/{pid}/children").read().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in tree(int(child)))]


def pss(pid: int) -> float:
    try:
        return int(open(f"/proc/{pid}/smaps_rollup").read().split("Pss:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return 0.0


def open_data(root: Path) -> None:
    """One rank: opens the data, plans an epoch and reads some batches' texts with two workers."""
    import torch.distributed as dist
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    from data import LlavaData, global_batches
    from support.chat import CHAT_TEMPLATE, IMAGE_TOKEN, Chat
    from support.ranks import process_group

    class Processor:
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/toy/qwen-small")
        image_processor = None

    Processor.tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    Processor.tokenizer.chat_template = CHAT_TEMPLATE
    with process_group() as group:
        (root / f"ready-{group.rank}").touch()
        while not (root / "go").exists():
            time.sleep(0.01)
        begun = time.time()
        args = SimpleNamespace(
            data=str(root / "data.json"), images=str(root / "images"), max_len=2048, skip_bad=0
        )
        student = {"processor": Processor, "chat": Chat(Processor), "n_visual_tokens": 729,
                   "config": SimpleNamespace(text_config=None)}
        data = LlavaData(args, SimpleNamespace(**student, vision_tower=True))
        opened = time.time() - begun
        batches = global_batches(data, 128, "0", True)

        class Texts(LlavaData):
            def __getitem__(self, i: int) -> int:
                return len(self.encode(self.sample(i)[1])[0][0])

        data.__class__ = Texts
        loader = DataLoader(data, batch_sampler=batches[:200], num_workers=2, collate_fn=sum)
        tokens = sum(loader)
        dist.barrier()
        if group.rank == 0:
            print(f"opened in {opened:.1f} s: {len(data):,} samples; {tokens:,} tokens")


# ---------------------------------------------------------------------------------- fuzz


def fuzz(n: int, root: Path) -> None:
    from test_fuzz import fuzz_samples

    print(fuzz_samples(n, root, seed=int(time.time())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kills", "million", "fuzz", "open"))
    parser.add_argument("--n", type=int, help="kills, samples or mutations (default: 50, 1000000, 2000)")
    parser.add_argument("--root", type=Path)
    args = parser.parse_args()
    if args.what == "open":
        open_data(args.root)
    else:
        with tempfile.TemporaryDirectory() as folder:
            usual = {"kills": 50, "million": 1_000_000, "fuzz": 2000}[args.what]
            {"kills": kills, "million": million, "fuzz": fuzz}[args.what](args.n or usual, Path(folder))
