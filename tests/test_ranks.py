"""Many ranks: the same numbers however a batch is split, no hang at the end, no memory held twice."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, data_flags, launch, log_of
from safetensors.torch import load_file
from test_mod import pairs
from two_ranks import fp64

import mod_distill
from support.flags import InputError
from support.ranks import name_of_attempt, process_group


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
        patch.setenv("PYTHONPATH", str(ROOT))
        (root / "argv").write_text(json.dumps({"argv": argv}))
        launch("tests/two_ranks.py", [str(root / "argv")], ranks=2)
    return root, lambda name, rank: json.loads((root / f"argv.{name}.{rank}").read_text())


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


def test_slurm_without_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="each of Slurm's 8 tasks .* srun --ntasks-per-node 1 torchrun"):
        with process_group():
            pass
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with process_group() as ranks:
        assert ranks.world_size == 1
