"""The processes of a run: torchrun's, or one alone. Their device, DDP wrapper, and signals."""

import atexit
import contextlib
import json
import multiprocessing.util  # registers its own ending first, so that ours comes before it
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from support.flags import require

STOPPED = 75  # exit code after a signal: what was done is on the disk, the same command goes on
PATIENCE = timedelta(hours=6)  # rank 0 may work that long while others wait: an index, a state on a slow disk
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP  # that schedulers and terminals send
TORCHRUN = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"  # what it tells each process
# What others say of how many processes they have started: srun, and mpirun of three makes.
COUNTS = "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"


class Ranks:
    """This process's place in the run: `rank` of `world_size`, on `device`. Made by `process_group`."""

    def __init__(self, device: torch.device):
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.at_end = contextlib.ExitStack()  # what is given back when the run ends, the last thing first
        self._ddp, self._signals = None, []

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of all ranks' tensors, also written into the given one."""
        dist.all_reduce(numbers)
        return numbers

    def gather(self, mine: object) -> list:
        """Every rank's object, sent as JSON."""
        text, sizes = json.dumps(mine).encode(), torch.zeros(self.world_size, dtype=torch.long)
        sizes[self.rank] = len(text)
        sizes = self.sum(sizes.to(self.device)).tolist()
        table = torch.zeros(self.world_size, max(sizes), dtype=torch.long)
        table[self.rank, : len(text)] = torch.tensor(list(text))
        rows = self.sum(table.to(self.device)).tolist()
        return [json.loads(bytes(row[:n])) for row, n in zip(rows, sizes)]

    def data_parallel(self, student: nn.Module) -> Callable[..., Tensor]:
        """The student's forward pass under DDP; for a single rank, which has no others, the student itself.
        The wrapper lives here, so that it is gone before the process group: else a run can hang at its end.
        """
        if self.world_size == 1:
            return student
        self.at_end.callback(setattr, self, "_ddp", None)
        self._ddp = DistributedDataParallel(student, forward_sync_buffers=False, gradient_as_bucket_view=True)
        return lambda *inputs, **options: self._ddp(*inputs, **options)

    def exchange_gradients(self, now: bool) -> contextlib.AbstractContextManager:
        """Around a forward pass: whether its backward pass ends with the mean of gradients over ranks."""
        return contextlib.nullcontext() if now or self._ddp is None else self._ddp.no_sync()

    def catch_signals(self) -> None:
        """From here on SIGNALS are what `stop_was_asked` asks for, but for those ignored, as by `nohup`."""
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in SIGNALS:
                if (before := signal.getsignal(number)) != signal.SIG_IGN:
                    signal.signal(number, lambda *caught: self._signals.append(caught))
                    self.at_end.callback(signal.signal, number, before)

    def stop_was_asked(self) -> bool:
        """Whether any rank has caught a signal; the same answer on every rank."""
        return bool(self.sum(torch.tensor(float(len(self._signals)), device=self.device)))


def place() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine), as torchrun says; (0, 1, 0) where nobody does."""
    given = [os.environ.get(name, "") for name in TORCHRUN]
    if not any(given[:3]):
        counts = [f"{name}={os.environ[name]}" for name in COUNTS if os.environ.get(name, "1") != "1"]
        alone = f"{', '.join(counts)}: each of these processes would be a run of its own; start one a node"
        require(not counts, f"{alone}, which starts the others: srun --ntasks-per-node 1 torchrun ...")
        return 0, 1, 0
    whole = all(given) and all(map(str.isdigit, given[:3])) and int(given[0]) < int(given[1])
    said = " ".join(f"{name}={value}" for name, value in zip(TORCHRUN, given))
    advice = "start by torchrun, or `unset RANK WORLD_SIZE LOCAL_RANK`"
    require(whole, f"torchrun does not set such an environment: {said}; {advice}")
    return int(given[0]), int(given[1]), int(given[2])


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """torchrun's processes, or a group of one. Inside another `process_group`, the same group again."""
    rank, world, local = place()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        n, device, backend = torch.cuda.device_count(), torch.device("cuda", local), "nccl"
        require(local < n, f"this machine has {n} GPUs, too few for its ranks: torchrun --nproc_per_node {n}")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums over V stay fp32
    outermost, store = not dist.is_initialized(), dist.HashStore()  # the store of a group of one
    if outermost:
        if torch.backends.mps.is_available() and rank == 0:
            print("Apple's GPU (MPS) is not used: all is computed on the CPU", file=sys.stderr)
        if world > 1:
            shared = next(rendezvous("env://", timeout=PATIENCE))[0]
            store = dist.PrefixStore(name_of_attempt(shared, rank, world), shared)
        options = {"timeout": PATIENCE, "device_id": device if device.type == "cuda" else None}
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, **options)
    ranks = Ranks(device)
    try:
        with ranks.at_end:
            yield ranks
    except Exception:
        outermost = outermost and world == 1  # after an error other ranks may never answer
        raise
    finally:
        if outermost:
            dist.destroy_process_group()


def name_of_attempt(store: dist.Store, rank: int, world: int) -> str:
    """A name for this attempt, the same on all ranks and never used before: restarted ranks find in
    torchrun's store what dead ones left there, and every node has its own count of restarts. Each rank
    publishes a random word; all words together are the name. If a word is left over from a crashed attempt,
    some rank reads another name than the others, and all look again.
    """
    confirmed = None
    store.set(f"word {rank}", os.urandom(4).hex())
    while True:
        name = b" ".join(store.multi_get([f"word {r}" for r in range(world)])).decode()
        if store.add(name, int(name != confirmed)) == world:
            return name
        confirmed = name
        time.sleep(0.005)


def start_data_process(_: int) -> None:
    """Ignore signals to the whole group: they are for the training process, which ends its step. Send batches
    by value: in shared memory there may be no room (Docker: 64 MB), and who waits for them is not told.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ForkingPickler.register(Tensor, lambda x: (torch.from_numpy, (x.numpy(),)))


@atexit.register
def end_data_processes() -> None:
    """They ignore the signal that Python would end them with, and Python would wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
