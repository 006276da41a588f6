"""Many ranks: the same numbers however a batch is split, no hang at the end, no memory held twice."""

import json

import pytest
import torch
from conftest import ROOT, data_flags, launch, log_of
from safetensors.torch import load_file
from test_mod import pairs  # noqa: F401
from two_ranks import fp64

import mod_distill


@pytest.fixture(scope="module")
def two(tmp_path_factory, world, checkpoints, pairs):  # noqa: F811
    """One run of all cases on two ranks, and of the losses on one: the folder, and what rank 0 or 1 saw."""
    root = tmp_path_factory.mktemp("two")
    sft = data_flags(world, lr=0.005, epochs=9, max_steps=6)
    argv = {"sft": ["--student", checkpoints["small"], *sft]}
    for step, student in ("d2s", checkpoints["small"]), ("pd", root / "d2s-8"):
        more = {"data": pairs, "epochs": 2} if step == "pd" else {}
        argv[step] = ["--step", step, "--student", str(student), "--teacher", checkpoints["large"],
                      *data_flags(world, **more)]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        fp64(patch)
        for step in "d2s", "pd":
            mod_distill.main([*argv[step], "--out", str(root / f"{step}-8")])
        patch.setenv("PYTHONPATH", str(ROOT))
        (root / "argv").write_text(json.dumps({"argv": argv}))
        launch("tests/two_ranks.py", [str(root / "argv")], ranks=2)
    return root, lambda name, rank: json.loads((root / f"argv.{name}.{rank}").read_text())


@pytest.mark.parametrize("rank", [0, 1])
def test_groups_can_be_started_and_ended_again_and_again(two, rank):
    """A DDP that outlives its group can hang the process: here it would within 100 cycles."""
    assert two[1]("cycles", rank) == [False] * 200


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
