"""Interrupted runs: they end like uninterrupted ones, bit for bit, whatever interrupted them."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, but, data_flags, log_of, on_two_ranks
from safetensors.torch import load_file
from test_ckd import cascade_flags, stages_of

import ckd
import dft
import dpt
import mod_distill
import sft
from support import run as support_run
from support import state
from support.flags import InputError

STEPS = 12


@pytest.fixture(scope="module")
def flags(world):
    usual = {"epochs": 20, "max_steps": STEPS, "save_every": 4, "lr": 0.005}
    return lambda out, **more: data_flags(world, out=out, **usual | more)


def command(checkpoints) -> list[str]:
    return ["--student", checkpoints["small"], "--teacher", checkpoints["large"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, flags, checkpoints):
    """A run that nothing interrupts, in this process; and one on two ranks."""
    root = tmp_path_factory.mktemp("whole")
    dft.main([*command(checkpoints), *flags(root / "one")])
    on_two_ranks(dft.main, [*command(checkpoints), *flags(root / "two", micro_batch=2)])
    return root


def weights(out):
    return load_file(out / "model.safetensors")


def same_weights(a, b) -> bool:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def same_log(a, b, rel=0.0) -> None:
    a, b = log_of(a), log_of(b)
    assert len(a) == len(b) == STEPS
    for x, y in zip(a, b):
        for key in x.keys() - {"tokens_per_s"}:
            assert x[key] == pytest.approx(y[key], rel=rel, abs=rel), (x["step"], key)


def stop_at(monkeypatch, step: int, how: callable) -> None:
    """Call `how(run)` when the run has come to the log of this step."""

    def interrupted(run, at, *args):
        if at == step:
            how(run)
        return support_run.write_log(run, at, *args)

    for stage in dpt, dft, sft, mod_distill:
        monkeypatch.setattr(stage, "write_log", interrupted)


class CrashError(Exception):
    pass


def crash(_run) -> None:
    raise CrashError


def run_in_two(main, argv, monkeypatch, step=6, how=crash) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step, how)
        with pytest.raises((CrashError, SystemExit)) as error:
            main(argv)
    if how is not crash:
        assert error.value.code == state.STOPPED == 75
    main(argv)


def test_a_crashed_run_goes_on_from_its_last_state(whole, flags, checkpoints, tmp_path, monkeypatch, capsys):
    run_in_two(dft.main, [*command(checkpoints), *flags(tmp_path / "out")], monkeypatch)
    assert "goes on after step 4" in capsys.readouterr().out
    assert same_weights(whole / "one", tmp_path / "out")
    same_log(whole / "one", tmp_path / "out")
    assert not (tmp_path / "out" / "state").exists()  # a finished run needs none


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    whole, flags, checkpoints, tmp_path, monkeypatch, capsys, number
):
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, handler)  # SIGINT is ignored where a shell began the tests with &
    argv = [*command(checkpoints), *flags(tmp_path / "out", save_every=0)]
    run_in_two(dft.main, argv, monkeypatch, how=lambda run: os.kill(os.getpid(), number))
    said = capsys.readouterr().out
    assert "stopped after step 7 of 12; the same command goes on from there" in said
    assert "goes on after step 7" in said
    assert same_weights(whole / "one", tmp_path / "out")
    same_log(whole / "one", tmp_path / "out")
    assert signal.signal(number, before) is handler


def test_a_signal_in_the_last_step_waits_until_the_student_is_saved(
    whole, flags, checkpoints, tmp_path, monkeypatch, capsys
):
    argv = [*command(checkpoints), *flags(tmp_path / "out")]
    run_in_two(dft.main, argv, monkeypatch, STEPS - 1, how=lambda run: os.kill(os.getpid(), signal.SIGTERM))
    said = capsys.readouterr().out
    assert "stopped by a signal; the same command goes on from there" in said
    assert "this run is finished already" in said
    assert same_weights(whole / "one", tmp_path / "out")


def test_a_signal_in_the_last_step_of_a_stage_stops_the_cascade(
    world, parts, checkpoints, tmp_path, monkeypatch
):
    """The stage is saved, and the next one waits for the same command."""
    argv = cascade_flags(world, parts, tmp_path, checkpoints["large"], max_steps=1)
    with monkeypatch.context() as patch:
        stop_at(patch, 0, lambda run: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as error:
            ckd.main(argv)
    assert error.value.code == state.STOPPED
    assert stages_of(tmp_path) == ["1-large/dpt"]
    ckd.main(argv)
    assert stages_of(tmp_path) == ["1-large/dpt", "1-large/sft", "1-large/dft"]


def test_with_data_processes_it_ends_the_same(whole, flags, checkpoints, tmp_path, monkeypatch):
    argv = [*command(checkpoints), *flags(tmp_path / "out", workers=2)]
    run_in_two(dft.main, argv, monkeypatch, how=lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert same_weights(whole / "one", tmp_path / "out")


@pytest.mark.parametrize("micro", [2, 4])
def test_the_accumulation_may_change(whole, flags, checkpoints, tmp_path, monkeypatch, micro):
    argv = [*command(checkpoints), *flags(tmp_path / "out")]
    with monkeypatch.context() as patch:
        stop_at(patch, 6, crash)
        with pytest.raises(CrashError):
            dft.main(argv)
    dft.main(but(argv, micro_batch=micro))
    same_log(whole / "one", tmp_path / "out", rel=1e-3)


def test_the_number_of_ranks_may_change(whole, flags, checkpoints, tmp_path, monkeypatch):
    argv = [*command(checkpoints), *flags(tmp_path / "out")]
    with monkeypatch.context() as patch:
        stop_at(patch, 6, crash)
        with pytest.raises(CrashError):
            dft.main(argv)
    on_two_ranks(dft.main, but(argv, micro_batch=2))
    same_log(whole / "one", tmp_path / "out", rel=1e-3)


def test_router_noise_goes_on_where_it_was(flags, checkpoints, tmp_path, monkeypatch):
    """The random numbers of the run are part of its state."""
    argv = ["--step", "d2s", "--router", "rsample", *command(checkpoints)]
    mod_distill.main([*argv, *flags(tmp_path / "whole")])
    run_in_two(mod_distill.main, [*argv, *flags(tmp_path / "out")], monkeypatch)
    assert same_weights(tmp_path / "whole", tmp_path / "out")


def test_without_resume_it_starts_again(whole, flags, checkpoints, tmp_path, monkeypatch, capsys):
    argv = [*command(checkpoints), *flags(tmp_path / "out")]
    with monkeypatch.context() as patch:
        stop_at(patch, 6, crash)
        with pytest.raises(CrashError):
            dft.main(argv)
    with pytest.raises(InputError, match="different run .*lr: 0.005 there, 0.1 now"):
        dft.main(but(argv, lr=0.1))
    dft.main([*argv, "--no-resume"])
    assert "goes on" not in capsys.readouterr().out
    assert same_weights(whole / "one", tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, 6, crash)
        with pytest.raises(CrashError):
            dft.main([*argv, "--no-resume"])
    assert not [*(tmp_path / "out").glob("*.safetensors")]  # nobody takes the first model for the second


# ---------------------------------------------------------------------------------- files


def interrupted(flags, checkpoints, out, monkeypatch, step=10):
    with monkeypatch.context() as patch:
        stop_at(patch, step, crash)
        with pytest.raises(CrashError):
            dft.main([*command(checkpoints), *flags(out)])
    found = state.states(out / "state")
    assert [p.name[:13] for p in found] == ["step-00000008", "step-00000004"]
    return found


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(
    whole, flags, checkpoints, tmp_path, monkeypatch, capsys, damage
):
    newest, older = interrupted(flags, checkpoints, tmp_path / "out", monkeypatch)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes({"bit": data, "cut": data[:-100], "empty": b""}[damage])
    dft.main([*command(checkpoints), *flags(tmp_path / "out")])
    said = capsys.readouterr()
    assert f"{newest} is damaged" in said.err
    assert "goes on after step 4" in said.out
    assert same_weights(whole / "one", tmp_path / "out")


def test_keep(flags, checkpoints, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 10, crash)
        with pytest.raises(CrashError):
            dft.main([*command(checkpoints), *flags(tmp_path / "out", save_every=1, keep=3)])
    steps = [p.name[:13] for p in state.states(tmp_path / "out" / "state")]
    assert steps == ["step-00000010", "step-00000009", "step-00000008"]


def test_a_crash_inside_a_write_leaves_the_last_state(whole, flags, checkpoints, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def dies(state, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")
            raise CrashError
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dies)
        with pytest.raises(CrashError):
            dft.main([*command(checkpoints), *flags(tmp_path / "out")])
    assert [p.name[:13] for p in state.states(tmp_path / "out" / "state")] == ["step-00000004"]
    assert (tmp_path / "out" / "state" / ".writing").exists()
    assert not (tmp_path / "out" / ".lock").exists()
    dft.main([*command(checkpoints), *flags(tmp_path / "out")])
    assert same_weights(whole / "one", tmp_path / "out")


@contextlib.contextmanager
def full_disk(monkeypatch, step: int, size: int):
    """From this step on no file can be longer than so many bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        stop_at(patch, step, lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1])))
        yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def fails(main, argv) -> str:
    """What a run says that cannot go on; it is called where nothing must be written, not even by a test."""
    try:
        main(argv)
    except InputError as error:
        return str(error)


def test_a_full_disk_stops_the_run_and_leaves_the_last_state(flags, checkpoints, tmp_path, monkeypatch):
    with full_disk(monkeypatch, 5, 20_000):
        said = fails(dft.main, [*command(checkpoints), *flags(tmp_path / "out")])
    assert f"cannot write step 8 into {tmp_path}/out/state, beside ['step-00000004.pt']: " in said
    assert "; mend that, then the same command goes on" in said
    (left,) = state.states(tmp_path / "out" / "state")
    assert state.is_sound(left)
    assert not (tmp_path / "out" / "state" / ".writing").exists()


def test_a_checkpoint_without_room_is_saved_by_the_same_command(world, parts, tmp_path, monkeypatch, capsys):
    """No step is lost, whatever --save_every is: the state after the last one is written first."""
    argv = ["--vision", parts["vision"], "--llm", parts["small"]]
    argv += data_flags(world, epochs=2, max_steps=5, save_every=0)
    dpt.main([*argv, "--out", str(tmp_path / "whole")])
    with full_disk(monkeypatch, 4, 30_000):  # room for a projector's state, and not for a student
        said = fails(dpt.main, [*argv, "--out", str(tmp_path / "out")])
    assert f"cannot write {tmp_path}/out: " in said
    assert "File too large" in said
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"run.json", "log.jsonl", "state"}
    dpt.main([*argv, "--out", str(tmp_path / "out")])
    assert "goes on after step 5" in capsys.readouterr().out
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    assert len(log_of(tmp_path / "out")) == 5


def test_a_log_without_room_ends_the_run_in_one_sentence(flags, checkpoints, tmp_path, monkeypatch):
    log = tmp_path / "out" / "log.jsonl"
    stop_at(monkeypatch, 0, lambda run: (log.unlink(), log.symlink_to("/dev/full")))
    with pytest.raises(InputError, match="cannot write .*log.jsonl: .*No space left on device; mend that"):
        sft.main(["--student", checkpoints["small"], *flags(tmp_path / "out")])


def test_a_state_is_read_without_running_what_is_in_it(flags, checkpoints, tmp_path, monkeypatch):
    newest, older = interrupted(flags, checkpoints, tmp_path / "out", monkeypatch)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"step": Evil()}, tmp_path / "evil")
    evil = newest.with_name("step-00000009.pt")
    (tmp_path / "evil").rename(evil)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        dft.main([*command(checkpoints), *flags(tmp_path / "out")])
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------- numerical faults


def poison(monkeypatch, at: int) -> None:
    """From the `at`-th call on for one call, the loss is not a number."""
    inner, calls = sft.over_rows, []

    def poisoned(*args):
        calls.append(1)
        loss, terms = inner(*args)
        return (loss * float("nan"), terms) if len(calls) == at else (loss, terms)

    monkeypatch.setattr(sft, "over_rows", poisoned)


def test_a_step_that_is_not_finite_is_named_and_stops_the_run(
    flags, checkpoints, tmp_path, monkeypatch, capsys
):
    """And the same command goes on where more such steps are allowed."""
    poison(monkeypatch, 6)
    argv = ["--student", checkpoints["small"], *flags(tmp_path / "out")]
    with pytest.raises(
        InputError, match="step 5: the loss of rank 0 is not finite; rank 0 had .*sample .*id"
    ):
        sft.main(argv)
    assert len(state.states(tmp_path / "out" / "state")) == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()
    poison(monkeypatch, 2)
    sft.main([*argv, "--max_bad_steps", "1"])
    assert "update left out (1 so far, --max_bad_steps allows 1)" in capsys.readouterr().err


def test_bad_steps_can_be_left_out(flags, checkpoints, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 6)
    argv = ["--student", checkpoints["small"], *flags(tmp_path / "out", max_bad_steps=1)]
    sft.main(argv)
    log = log_of(tmp_path / "out")
    assert [k for k, line in enumerate(log) if line["loss"] is None] == [5]
    assert "update left out (1 so far, --max_bad_steps allows 1)" in capsys.readouterr().err
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "out").values())


def test_a_gradient_that_is_not_finite_updates_nothing(flags, checkpoints, tmp_path, monkeypatch, capsys):
    """Though the loss is finite: a product overflows on the way back."""
    make, norms = sft.make_optimizer, []

    def overflows(run, trained, **options):
        trained[0].register_hook(lambda grad: grad * (torch.nan if len(norms) == 1 else 1))
        trained[0].register_post_accumulate_grad_hook(lambda p: norms.append(p.detach().clone()))
        return make(run, trained, **options)

    monkeypatch.setattr(sft, "make_optimizer", overflows)
    sft.main(["--student", checkpoints["small"], *flags(tmp_path / "out", max_steps=3, max_bad_steps=1)])
    log = log_of(tmp_path / "out")
    assert [line["grad_norm"] is None for line in log] == [False, True, False]
    assert all(line["loss"] is not None for line in log)
    assert "step 1: the gradient is not finite; rank 0 had" in capsys.readouterr().err
    assert not torch.equal(norms[0], norms[1])  # by the first update
    assert torch.equal(norms[1], norms[2])


# ---------------------------------------------------------------------------------- torchrun


def start(argv, ranks=2, **more) -> subprocess.Popen:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = {"nproc_per_node": ranks, "master_port": port} | more
    options = [item for k, v in flags.items() for item in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process, seconds=90) -> None:
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.time() < end
        time.sleep(0.01)


def ranks_of(process) -> list[int]:
    """The processes that torchrun started, by rank."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1]) == process.pid:
                variables = open(f"/proc/{pid}/environ").read().split("\0")
                found += [(v, int(pid)) for v in variables if v.startswith("RANK=")]
        except (OSError, ValueError):
            continue
    return [pid for _, pid in sorted(found)]


def test_a_killed_rank_is_restarted_from_the_last_state(whole, flags, checkpoints, tmp_path):
    argv = ["dft.py", *command(checkpoints), *flags(tmp_path / "out", micro_batch=2, save_every=2)]
    process = start(argv, max_restarts=3, monitor_interval=0.2)
    wait_for(lambda: state.states(tmp_path / "out" / "state"), process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output[-3000:]
    assert "goes on after step" in output
    assert same_weights(whole / "two", tmp_path / "out")
    same_log(whole / "two", tmp_path / "out")


def test_a_failing_rank_brings_the_rest_down_with_its_own_error(world, checkpoints, tmp_path):
    """A sample of rank 1 cannot be read: no timeout, and the reason is on the screen."""
    (tmp_path / "images").mkdir()
    for image in (world / "images").iterdir():
        (tmp_path / "images" / image.name).write_bytes(image.read_bytes())
    (tmp_path / "images" / "12.png").write_bytes(b"broken")
    begun = time.time()
    argv = data_flags(world, out=tmp_path / "out", images=tmp_path / "images", micro_batch=4)
    process = start(["sft.py", "--student", checkpoints["small"], *argv])
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    assert "12.png cannot be read" in output
    assert time.time() - begun < 90


SLOW_DISK = """
import time, torch
import dft
save = torch.save
torch.save = lambda state, file: (time.sleep(3), save(state, file))
dft.main()
"""


def test_sigterm_to_torchrun_stops_all_ranks_with_a_state(flags, checkpoints, tmp_path, monkeypatch):
    """Also where writing takes longer than torchrun's patience, which --shutdown-timeout lengthens."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")  # in place of torchrun's 30 seconds
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "slow.py").write_text(SLOW_DISK)
    argv = [*command(checkpoints), *flags(tmp_path / "out", micro_batch=2, save_every=0)]
    more = {"monitor_interval": 0.2, "shutdown-timeout": 60}
    process = start([str(tmp_path / "slow.py"), *argv], **more)
    log = tmp_path / "out" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 1, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(state.states(tmp_path / "out" / "state")) == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seconds"] is None


def test_the_run_file_survives_a_crash_while_it_is_written(tmp_path, monkeypatch):
    run = SimpleNamespace(out=tmp_path, identity={"stage": "sft"})
    support_run.write_identity(run, seconds=1)
    monkeypatch.setattr(os, "replace", lambda *_: crash(None))
    with pytest.raises(CrashError):
        support_run.write_identity(run, seconds=2)
    assert json.loads((tmp_path / "run.json").read_text()) == {"stage": "sft", "seconds": 1}
