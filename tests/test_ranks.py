"""Many ranks: the same numbers however a batch is split, no hang at the end, no memory held twice."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, data_flags, log_of, on_two_ranks
from safetensors.torch import load_file
from test_mod import pairs
from torch import nn
from torch.utils.data import DataLoader
from two_ranks import fp64, play

import mod_distill
from support import state
from support.flags import InputError
from support.ranks import COUNTS, TORCHRUN, name_of_attempt, place, process_group, start_data_process


@pytest.fixture(scope="module")
def two(tmp_path_factory, world, checkpoints, pairs):
    """One run of all cases on two ranks, and of the losses on one: the folder, and what rank 0 or 1 saw."""
    root = tmp_path_factory.mktemp("two")
    sft = data_flags(world, lr=0.005, epochs=9, max_steps=6)
    argv = {"sft": ["--student", checkpoints["small"], *sft]}
    for step, student in ("d2s", checkpoints["small"]), ("pd", root / "d2s-8"):
        more = {"data": pairs, "epochs": 2} if step == "pd" else {}
        argv[step] = ["--step", step, "--student", str(student), "--teacher", checkpoints["large"],
                      *data_flags(world, **more)]
    for words in argv.values():  # every case has its own
        at = words.index("--micro_batch")
        del words[at : at + 2]
    with pytest.MonkeyPatch.context() as patch:
        fp64(patch)
        for step in "d2s", "pd":
            mod_distill.main([*argv[step], "--micro_batch", "8", "--out", str(root / f"{step}-8")])
    saw = on_two_ranks(play, root, argv)
    return root, lambda name, rank: saw[rank][name]


@pytest.mark.parametrize("rank", [0, 1])
def test_groups_can_be_started_and_ended_again_and_again(two, rank):
    """A DDP that outlives its group can hang the process: here it would within 100 cycles."""
    assert two[1]("cycles", rank) == [False] * 100


@pytest.mark.parametrize("step", ["d2s", "pd"])
@pytest.mark.parametrize("micro", [4, 1])
def test_losses_do_not_depend_on_how_the_batch_is_split(two, step, micro):
    """1 x 8 against 2 ranks x 4 and 2 ranks x 1 x 4: also KTO's baseline and the balance loss."""
    whole, split = log_of(two[0] / f"{step}-8"), log_of(two[0] / f"{step}-{micro}")
    assert len(whole) == len(split) > 1
    for a, b in zip(whole, split):
        for key in a.keys() - {"tokens_per_s"}:
            assert b[key] == pytest.approx(a[key], rel=1e-9, abs=1e-9), (a["step"], key)


@pytest.mark.parametrize("rank", [0, 1])
def test_accumulated_gradients_exist_once(two, rank):
    seen, size = two[1]("gradients", rank)
    assert len(seen) == 6 * 4
    places = seen[4][0]
    assert all(kept == [places, size] for kept in seen[4:])  # from the first update on, in DDP's buckets


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resume_does_not_hold_the_state_in_the_memory_of_each_rank(two, rank):
    assert two[1]("memory", rank) < 20e6


@pytest.mark.parametrize("name", ["optimizer optimizer", "optimizer none", "none optimizer"])
def test_a_sharded_optimizer_is_adamw(two, name):
    """Bit by bit, with clipping, after a resume, and where the flag changes on the way."""
    a, b = (load_file(two[0] / run / "model.safetensors") for run in ("none none", name))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert max(line["grad_norm"] for line in log_of(two[0] / name)) > 1  # so that it was clipped


def test_a_sharded_optimizer_holds_its_share(two):
    whole, one, no_copy = two[1]("shard", 0)
    other = two[1]("shard", 1)[1]
    assert one + other == whole
    assert 0.3 * whole < one < 0.7 * whole
    assert no_copy == 0


# ---------------------------------------------------------------------------------- attempts


def test_all_ranks_of_an_attempt_agree_on_its_name_whatever_the_dead_ones_left():
    """Two attempts on one store, begun one rank after the other; between them one that never was complete."""
    store, names = dist.HashStore(), ([], [])
    for attempt in names:
        join = lambda rank, into=attempt: into.append(name_of_attempt(store, rank, 3))
        alive = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in (2, 0, 1)]
        for thread in alive:
            assert not attempt  # without all of them there is no attempt
            thread.start()
            time.sleep(0.1)  # so that the early ones meet the words of the dead
        for thread in alive:
            thread.join(timeout=10)
        store.set("word 1", "of one that died before the others came")
    assert [len(attempt) for attempt in names] == [3, 3]
    assert [len(set(attempt)) for attempt in names] == [1, 1]
    assert names[0] != names[1]


NODES = """
import os, signal, sys
import torch
from support.ranks import process_group
first = not os.path.exists(sys.argv[1])
with process_group() as ranks:
    ranks.sum(torch.ones(1))
    if first and ranks.rank == 1:
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if first:
        signal.pause()  # this node's ranks are well: it does not count a restart
    print("sum", ranks.sum(torch.ones(1)).item(), "restarts", os.environ["TORCHELASTIC_RESTART_COUNT"])
"""


def test_two_nodes_meet_again_after_one_has_lost_a_rank(tmp_path):
    """Each has its own count of restarts, and they must not wait for each other for ever."""
    (tmp_path / "script.py").write_text(NODES)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        end = f"127.0.0.1:{s.getsockname()[1]}"
    options = {"nnodes": 2, "rdzv_backend": "c10d", "rdzv_endpoint": end, "rdzv_id": 1, "max_restarts": 2,
               "monitor_interval": 0.2, "local_addr": "127.0.0.1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]
    command += [item for k, v in options.items() for item in (f"--{k}", str(v))]
    command += [str(tmp_path / "script.py"), str(tmp_path / "died")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(command, env=env, **pipe) for _ in range(2)]
    try:
        said = "".join(node.communicate(timeout=60)[0] for node in nodes)
    finally:
        for node in nodes:
            node.terminate()  # torchrun ends its ranks then
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted(re.findall("sum 2.0 restarts (.)", said)) == ["0", "1"]


# ---------------------------------------------------------------------------------- how it was started


@pytest.fixture
def environment(monkeypatch):
    """Sets variables of the environment, where no launcher has set any."""
    for name in (*TORCHRUN, *COUNTS):
        monkeypatch.delenv(name, raising=False)
    return lambda **variables: [monkeypatch.setenv(k, v) for k, v in variables.items()]


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
                                  "MV2_COMM_WORLD_SIZE"])
def test_processes_that_know_nothing_of_each_other_are_refused(environment, name):
    """As `srun` or `mpirun` start them without torchrun: each would be a run of its own."""
    environment(**{name: "8"})
    with pytest.raises(InputError, match=f"{name}=8: each of these .* srun --ntasks-per-node 1 torchrun"):
        with process_group():
            pass
    environment(**{name: "1"})
    with process_group() as ranks:
        assert ranks.world_size == 1
    environment(**{name: "8"} | WHOLE)
    assert place() == (1, 2, 0)


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
HALVES = [{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}, {"RANK": "2"}, {"RANK": "x"}, {"RANK": ""}]


@pytest.mark.parametrize("given", [*HALVES[:3], *(WHOLE | bad for bad in HALVES[3:])])
def test_half_of_what_torchrun_says_is_refused_at_once(environment, given):
    environment(**given)
    said = " ".join(f"{name}={given.get(name, '')}" for name in TORCHRUN)
    with pytest.raises(InputError, match=f"{said}; start by torchrun, or `unset RANK WORLD_SIZE LOCAL_RANK`"):
        with process_group():
            pass


def test_more_ranks_than_gpus_are_refused(environment, monkeypatch):
    environment(**WHOLE | {"LOCAL_RANK": "1"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="has 1 GPUs, too few for its ranks: torchrun --nproc_per_node 1"):
        with process_group():
            pass


def test_a_mac_is_told_that_its_gpu_is_not_used(environment, monkeypatch, capsys):
    environment()
    with process_group():
        pass
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with process_group() as ranks, process_group():
        assert ranks.device.type == "cpu"
    assert capsys.readouterr().err == "Apple's GPU (MPS) is not used: all is computed on the CPU\n"


def test_batches_of_data_processes_take_no_shared_memory():
    """There may be none, and then they would be waited for without end."""
    data = [torch.arange(6).view(2, 3) + k for k in range(4)]
    loader = DataLoader(data, None, num_workers=1, worker_init_fn=start_data_process)
    for given, got in zip(data, loader):
        assert torch.equal(given, got)
        assert not got.is_shared()


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    """`nohup` ignores SIGHUP, so that a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process_group() as ranks:
            ranks.catch_signals()
            for number in signal.SIGHUP, signal.SIGUSR1:
                os.kill(os.getpid(), number)
            assert [caught[0] for caught in ranks._signals] == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


# ---------------------------------------------------------------------------------- the optimizer


def optimizer_of(tmp_path, ranks, device="cpu"):
    """A run with --shard optimizer that seems to be on `device`, its student, and its optimizer."""
    args = SimpleNamespace(resume=None, keep=2, shard="optimizer", lr=0.1, weight_decay=0.0)
    seems = SimpleNamespace(rank=0, device=torch.device(device), gather=ranks.gather)
    run = SimpleNamespace(args=args, ranks=seems, out=tmp_path, bad=set(), n_bad_steps=0)
    student = nn.Sequential(nn.Linear(3, 2))
    optimizer = state.make_optimizer(run, list(student.parameters()), betas=(0.9, 0.98))
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return run, student, optimizer


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_sharded_optimizer_has_the_options_of_one_that_is_not(tmp_path, device):
    with process_group() as ranks:
        *_, sharded = optimizer_of(tmp_path, ranks, device)
        for group in *sharded.param_groups, *sharded.optim.param_groups:
            assert (group["betas"], group["fused"], group["lr"]) == ((0.9, 0.98), True, 0.1)


def test_a_sharded_state_is_written_when_its_copies_are_there(tmp_path, monkeypatch):
    """They are begun on the GPU, and nobody else waits for them."""
    order = []
    with process_group() as ranks:
        run, student, optimizer = optimizer_of(tmp_path, ranks, "cuda")
        gathers = optimizer.consolidate_state_dict
        optimizer.consolidate_state_dict = lambda: (order.append("gather"), gathers())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
        monkeypatch.setattr(torch, "save", lambda *_: order.append("write"))
        state.save_state(run, 1, student, optimizer)
    assert order == ["gather", "wait", "write"]


def test_a_sharded_optimizer_goes_on_with_all_of_its_state_on_the_device(tmp_path):
    with process_group() as ranks:
        run, student, optimizer = optimizer_of(tmp_path, ranks)
        state.save_state(run, 1, student, optimizer)
        run.ranks.device = torch.device("meta")
        assert state.load_state(run, student, optimizer) == 1
        moments = optimizer.optim.state.values()
        assert len(moments) == 2
        assert {m["step"].device.type for m in moments} == {"meta"}


@pytest.mark.parametrize("keep, want", [(1, [[], [1], [2], [3]]), (3, [[], [1], [1, 2], [2, 3]])])
def test_older_states_make_room_before_a_new_one_is_written(tmp_path, monkeypatch, keep, want):
    """But never the last of them."""
    seen, save = [], torch.save
    there = lambda: sorted(int(path.stem[-2:]) for path in state.states(tmp_path / "state"))
    monkeypatch.setattr(torch, "save", lambda *args: (seen.append(there()), save(*args)))
    with process_group() as ranks:
        run, student, optimizer = optimizer_of(tmp_path, ranks)
        run.args.keep = keep
        for done in range(1, 5):
            state.save_state(run, done, student, optimizer)
    assert seen == want
    assert there() == [1, 2, 3, 4][-keep:]
