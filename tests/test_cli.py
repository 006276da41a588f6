"""Bad input at the command line: one sentence, a non-zero exit, nothing trained. And the flags themselves."""

import argparse
import contextlib
import errno
import fcntl
import importlib
import io
import json
import os
import pwd
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT, but, data_flags, log_of, turns

import data
import dft
import dpt
import mod_distill
import sft
from model import Llava
from support import index
from support.checkpoints import check_teacher
from support.flags import InputError, cli
from support.ranks import process_group
from support.run import code_of, fingerprint, inputs_of, is_finished, open_run, own
from support.state import set_lr


@pytest.fixture
def argv(world, checkpoints, tmp_path):
    def make(**more):
        return ["--student", checkpoints["small"], *data_flags(world, out=tmp_path / "out", **more)]

    return make


def test_an_error_is_one_sentence_and_exit_code_2(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft.py", *argv(data=tmp_path / "none.json")])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "sft.py"), run_name="__main__")
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("sft.py: error: cannot read the data file")
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_global_batch_must_divide(argv):
    with pytest.raises(
        InputError, match="--global_batch 8 is not a multiple of --micro_batch 3 x 1 ranks = 3"
    ):
        sft.main(argv(micro_batch=3))


def test_too_few_samples_for_one_step(argv):
    with pytest.raises(InputError, match="24 usable samples, fewer than one --global_batch 32"):
        sft.main(argv(global_batch=32))


def test_a_folder_that_holds_another_run(argv, tmp_path):
    sft.main(argv(max_steps=1))
    with pytest.raises(InputError, match=r"different run \(lr: 0.02 there, 0.5 now; seed: 3 there, 4 now\)"):
        sft.main(argv(max_steps=1, lr=0.5, seed=4))
    with pytest.raises(InputError, match="stage: 'sft' there, 'dft' now"):
        dft.main([*argv(max_steps=1), "--teacher", argv()[1]])
    assert len(log_of(tmp_path / "out")) == 1


def test_a_folder_that_holds_something_else(argv, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is no empty folder"):
        sft.main(argv())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    (tmp_path / "out" / "run.json").write_text('{"stage"')
    with pytest.raises(InputError, match="run.json cannot be read"):
        sft.main(argv())


@pytest.mark.parametrize("kind", ["file", "link to nothing", "below a file", "cannot be made"])
def test_an_out_that_cannot_be_is_refused_before_anything_is_read(argv, tmp_path, kind):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    out = {"file": tmp_path / "file", "link to nothing": tmp_path / "link",
           "below a file": tmp_path / "file/out", "cannot be made": "/proc/nothing/out"}[kind]
    said = "cannot write --out .*; mend that" if kind[0] in "bc" else "is a file or leads nowhere; take an"
    with pytest.raises(InputError, match=said):
        sft.main(but(argv(), student="nothing", out=out))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link"]


# ---------------------------------------------------------------------------------- whose the folder is

OWNER = """
import fcntl, sys
lock = open(sys.argv[1], "a")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("mine", flush=True)
sys.stdin.read()
"""


def another(lock: Path) -> subprocess.Popen:
    """Another process, which takes this lock if it is free, and keeps it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", OWNER, str(lock)], **pipes)


def test_a_second_run_into_one_folder_is_refused_and_touches_nothing(argv, tmp_path):
    (tmp_path / "out").mkdir()
    first = another(tmp_path / "out/.lock")
    assert first.stdout.readline() == "mine\n"
    with pytest.raises(InputError, match="--out .*out is in use by another run; wait for its end or take an"):
        sft.main(but(argv(), student="nothing"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]
    first.kill()  # whatever ends it
    first.communicate()
    sft.main(argv(max_steps=1))
    assert not (tmp_path / "out/.lock").exists()


def test_a_folder_is_owned_while_its_run_trains(argv, tmp_path, monkeypatch):
    refused, lock = [], tmp_path / "out/.lock"
    monkeypatch.setattr(sft, "write_log", lambda *_: refused.append(another(lock).communicate()))
    sft.main(argv(max_steps=1))
    ((said, error),) = refused
    assert said == ""
    assert "BlockingIOError" in error


def test_a_refused_run_leaves_nothing_that_was_not_there(argv, tmp_path):
    for made in [], ["a"], ["a", "a/b"]:
        for folder in made:
            (tmp_path / folder).mkdir(exist_ok=True)
        with pytest.raises(InputError, match="cannot read the data file"):
            sft.main(but(argv(data=tmp_path / "none.json"), out=tmp_path / "a/b"))
        assert sorted(str(found.relative_to(tmp_path)) for found in tmp_path.rglob("*")) == made


def test_whoever_gets_a_lock_that_was_just_removed_has_nothing(tmp_path, monkeypatch):
    """Its owner may end after it is opened, and before it is locked; a third one then finds it free."""
    lock = fcntl.lockf
    monkeypatch.setattr(fcntl, "lockf", lambda file, how: ((tmp_path / ".lock").unlink(), lock(file, how)))
    with contextlib.ExitStack() as at_end, pytest.raises(InputError, match="in use by another run"):
        own(tmp_path, at_end)


# ---------------------------------------------------------------------------------- what was read


def test_a_fingerprint_tells_contents_apart_and_nothing_else(tmp_path):
    def write(**files):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        (tmp_path / "m").mkdir()
        for name, text in files.items():
            (tmp_path / "m" / name.replace("_", ".")).write_text(text)
        return fingerprint(str(tmp_path / "m"))

    usual = {"model_safetensors": "w" * 100, "config_json": "{}"}
    mark = write(**usual)
    notes = {"run_json": "seconds", "log_jsonl": "speed", "_lock": "", "_cache": "x"}
    assert write(**usual) == write(**usual | notes) == mark
    others = [{"model_safetensors": "w" * 99 + "v"}, {"config_json": "[]"}, {"more_jinja": ""}]
    others += [{"model_safetensors": "w" * 99}]
    marks = [write(**usual | other) for other in others] + [write(model_safetensors="w" * 100)]
    marks += [write(**usual | {"config_json": ""} | {"other_json": "{}"})]
    marks += [fingerprint(str(tmp_path / "none"))]
    assert len({mark, *marks}) == len(marks) + 1
    assert marks[-1] == ""


def test_a_fingerprint_of_a_large_file_looks_at_both_ends_and_between(tmp_path):
    path, size, seen = tmp_path / "model.safetensors", 10**9, []
    for place in (None, 0, size - 1, size // 2 - 2**17, size // 2 - 2**20):
        with open(path, "wb") as file:
            file.truncate(size)
            if place is not None:
                file.seek(place)
                file.write(b"x")
        seen.append(fingerprint(str(path)))
    assert [mark == seen[0] for mark in seen[1:]] == [False, False, True, True]  # the middle is in no block


def inputs(world, parts, checkpoints, tmp_path) -> dict:
    """Copies of all that a run can read, by their flags."""
    shutil.copytree(checkpoints["small"], tmp_path / "student")
    shutil.copytree(checkpoints["large"], tmp_path / "teacher")
    shutil.copytree(parts["vision"], tmp_path / "vision")
    shutil.copytree(parts["small"], tmp_path / "llm")
    shutil.copy(world / "train.json", tmp_path / "data")
    return {flag: str(tmp_path / flag) for flag in ("student", "teacher", "vision", "llm", "data")}


def replace(path: Path) -> None:
    """Other weights or samples of the same size, in a file that keeps its times."""
    file = path if path.is_file() else path / "model.safetensors"
    times, data = file.stat(), bytearray(file.read_bytes())
    data[-8 if path.is_dir() else data.index(b"red")] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_another_input_by_the_same_name_is_noticed(world, parts, checkpoints, tmp_path):
    given = inputs(world, parts, checkpoints, tmp_path)
    before = inputs_of(argparse.Namespace(**given))
    assert before.keys() == {f"--{flag} {path}" for flag, path in given.items()}
    for flag, path in given.items():
        replace(Path(path))
        now = inputs_of(argparse.Namespace(**given))
        assert [name for name in now if now[name] != before[name]] == [f"--{flag} {path}"]
        before = now


def test_a_run_whose_inputs_were_replaced_is_refused(argv, world, parts, checkpoints, tmp_path):
    given, file = inputs(world, parts, checkpoints, tmp_path), tmp_path / "out/run.json"
    argv = but(argv(max_steps=1, data=given["data"]), student=given["student"])
    sft.main(argv)
    before = file.read_text()
    for flag in "student", "data":
        replace(Path(given[flag]))
    what = f"since then --data {given['data']}, --student {given['student']} changed. Accept that by --resume"
    with pytest.raises(InputError, match=f"holds a finished run; {what}"):
        sft.main(argv)
    sft.main([*argv, "--resume"])
    assert file.read_text() == before
    file.write_text(json.dumps(json.loads(before) | {"seconds": None}))
    with pytest.raises(InputError, match=f"holds an interrupted run; {what}"):
        sft.main(argv)
    sft.main([*argv, "--no-resume"])
    assert json.loads(file.read_text())["files"] != json.loads(before)["files"]
    for name in "student", "data":
        shutil.move(given[name], tmp_path / f"gone-{name}")
    sft.main(argv)  # it is finished, and what it was made of is not needed


def test_inputs_of_several_data_files_and_of_names_on_the_hub(world, parts, checkpoints, tmp_path):
    given = inputs(world, parts, checkpoints, tmp_path)
    more = argparse.Namespace(data=[given["data"], given["data"]], student=None, llm="Qwen/Qwen2.5-0.5B")
    assert list(inputs_of(more)) == [f"--data {given['data']}"]
    more.data = [given["data"], str(world / "train.jsonl")]
    assert list(inputs_of(more)) == [f"--data {path}" for path in more.data]


def test_another_data_file_of_the_same_size_and_time_is_read(tmp_path, monkeypatch):
    """And the same file, edited between the blocks that a fingerprint looks at."""
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": "red"}')
    read = lambda: index.Index(str(path), "", 1, lambda place, record: (0,)).read(0)[1]["a"]
    assert read() == "red"
    replace(path)
    assert read() == "sed"
    monkeypatch.setattr(index, "fingerprint", lambda _: "the same")
    assert read() == "sed"
    path.write_text('{"a": "bed"}')
    os.utime(path, ns=(1, 1))
    assert read() == "bed"


def test_an_index_is_made_again_when_the_checks_are_others(tmp_path, monkeypatch):
    (tmp_path / "d.json").write_text("[{}]")
    read = lambda size: index.Index(str(tmp_path / "d.json"), "", 1, lambda *_: (size,)).sizes.item()
    assert read(1) == read(2) == 1
    real = index.fingerprint
    monkeypatch.setattr(index, "fingerprint", lambda path: real(path) + "!" * path.endswith("checks.py"))
    assert read(2) == 2


# ---------------------------------------------------------------------------------- what a resume may change

MAY_CHANGE = {"out", "workers", "micro_batch", "gradient_checkpointing", "shard", "save_every", "keep",
              "resume", "skip_bad", "max_bad_steps"}


@pytest.mark.parametrize("stage", [dpt, sft, dft, mod_distill])
def test_no_other_flag_may_change_on_a_resume(stage, world, checkpoints, tmp_path):
    argv = [*data_flags(world, out=tmp_path), "--student", checkpoints["small"]]
    argv += ["--teacher", checkpoints["large"]] * (stage is not sft)
    argv += ["--step", "d2d"] * (stage is mod_distill)
    args = stage.parse_args(argv)
    with process_group() as ranks:
        now = open_run(args, "x", ranks, stage.__file__).identity
    assert now.keys() == vars(args).keys() - MAY_CHANGE | {"stage", "files"}
    for flag in now.keys() - {"files"}:
        (tmp_path / "run.json").write_text(json.dumps(now | {flag: "another", "seconds": None}))
        with pytest.raises(InputError, match=f"a different run .{flag}: 'another' there, "):
            is_finished(tmp_path, now, None)


# ---------------------------------------------------------------------------------- where it runs


@pytest.mark.parametrize("named", [None, "", "/tmp/c"])
def test_without_a_home_the_index_needs_a_folder(monkeypatch, tmp_path, named):
    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME")
    if named is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    fresh = types.SimpleNamespace(**runpy.run_path(index.__file__))
    assert str(fresh.CACHE) == f"{named or '~/.cache'}/multimodal-distillation"
    monkeypatch.setattr(index, "CACHE", fresh.CACHE if not named else tmp_path)
    (tmp_path / "d.json").write_text("[{}]")
    made = lambda: index.Index(str(tmp_path / "d.json"), "", 1, lambda place, record: (0,))
    if not named:
        with pytest.raises(InputError, match="no home for an index of .*d.json: set XDG_CACHE_HOME"):
            made()
    else:
        assert len(made().sizes) == 1


def test_an_index_outside_of_a_group_is_made_whatever_a_launcher_has_left(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "1")
    (tmp_path / "d.json").write_text("[{}]")
    assert len(index.Index(str(tmp_path / "d.json"), "", 1, lambda place, record: (0,)).sizes) == 1


def test_data_processes_that_cannot_be_started(argv, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "DataLoader", full)
    with pytest.raises(InputError, match="cannot start 0 data processes: .*No space left .*; each takes"):
        sft.main(argv())


def test_a_stage_in_a_folder_of_its_own_consists_of_its_files_too(tmp_path):
    (tmp_path / "stage.py").write_text("import mine\nimport losses\n")
    (tmp_path / "mine.py").write_text("")
    outside = os.path.relpath(tmp_path.resolve(), ROOT)
    files = {f"{outside}/stage.py", f"{outside}/mine.py", "losses.py"}
    assert code_of(tmp_path / "stage.py").keys() >= files


def test_output_in_ascii(monkeypatch):
    """What has no letter there is written as its number."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    cli(lambda: print("漢"))
    screen.flush()
    assert screen.buffer.getvalue() == b"\\u6f22\n"


@pytest.mark.parametrize("flag", ["micro_batch", "global_batch", "epochs", "max_steps", "workers", "max_len"])
def test_numbers_out_of_range(argv, flag, capsys):
    with pytest.raises(SystemExit):
        sft.parse_args(argv(**{flag: -1}))
    assert f"argument --{flag}: -1 is not between" in capsys.readouterr().err


@pytest.mark.parametrize("steps, said", [(2, "step 1: the loss of rank 0 is not finite"),
                                         (1, "the student's .* are not finite, so not saved")])
def test_a_run_that_diverges_stops_and_saves_nothing(argv, tmp_path, steps, said):
    """Also where its last update is the one that broke it."""
    with pytest.raises(InputError, match=said):
        sft.main(argv(lr=float("inf"), max_steps=steps))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "state").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seconds"] is None


def test_a_teacher_with_another_tokenizer(argv, checkpoints, tmp_path):
    """An id may not mean two tokens; tokens that only the teacher has are no matter."""
    student, teacher = (Llava.from_checkpoint(checkpoints[name]) for name in ("small", "large"))
    teacher.processor.tokenizer.add_tokens(["crimson"])
    check_teacher(student, teacher)
    student.processor.tokenizer.add_tokens(["scarlet"])
    for model, name in (student, "student"), (teacher, "teacher"):
        model.save(tmp_path / name)
    flags = ["--teacher", str(tmp_path / "teacher")]
    with pytest.raises(
        InputError, match="'scarlet' is id 373 for the student and 373 for the teacher, where"
    ):
        dft.main([*but(argv(), student=tmp_path / "student"), *flags])


def test_a_token_that_only_the_student_has_may_not_be_met(argv, checkpoints, tmp_path):
    student, data = Llava.from_checkpoint(checkpoints["small"]), tmp_path / "d.json"
    student.processor.tokenizer.add_tokens(["scarlet"])
    student.save(tmp_path / "student")
    flags = ["--teacher", checkpoints["large"]]
    for color in "red", "scarlet":
        data.write_text(json.dumps([{"id": 7, "conversations": turns("what color ?", color)}] * 8))
        given = [*but(argv(max_steps=1, epochs=1), student=tmp_path / "student", data=data), *flags]
        if color == "red":
            dft.main(given)
    with pytest.raises(InputError, match=r"sample \d .id 7. has \['scarlet'\], which the teacher's"):
        dft.main(but(given, out=tmp_path / "scarlet"))


def test_a_teacher_with_another_number_of_visual_tokens(argv, tmp_path, parts):
    from conftest import new_student, vision_config
    from transformers import SiglipImageProcessorPil, SiglipVisionModel

    config = vision_config()
    config.image_size = 24
    SiglipVisionModel(config).save_pretrained(tmp_path / "vision")
    SiglipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "vision")
    new_student(str(tmp_path / "vision"), parts["large"]).save(tmp_path / "teacher")
    with pytest.raises(InputError, match="4 tokens for the student and 9 for the teacher"):
        dft.main([*argv(), "--teacher", str(tmp_path / "teacher")])


@pytest.fixture
def corrupt(world, tmp_path):
    """Three samples whose image breaks off, in a copy of the world."""
    shutil.copytree(world, tmp_path / "w")
    for k in (4, 8, 12):
        (tmp_path / "w" / "images" / f"{k}.png").write_bytes(b"\x89PNG broken")
    return tmp_path / "w"


def test_a_corrupt_image_stops_the_run_by_name(corrupt, checkpoints, tmp_path):
    flags = data_flags(corrupt, out=tmp_path / "out", micro_batch=2)
    named = r"sample (4 .id 4|8 .id 8|12 .id 12)\): image .* cannot be read .*--skip_bad allows 0"
    with pytest.raises(InputError, match=named):
        sft.main(["--student", checkpoints["small"], *flags])


def test_skip_bad_goes_on_and_counts(corrupt, checkpoints, tmp_path, capsys):
    flags = data_flags(corrupt, out=tmp_path / "out")
    sft.main(["--student", checkpoints["small"], *flags, "--skip_bad", "3"])
    out = capsys.readouterr()
    assert "3 bad samples left out" in out.out
    assert out.err.count("cannot be read") == 3
    assert len(log_of(tmp_path / "out")) == 3
    flags = data_flags(corrupt, out=tmp_path / "out2")
    with pytest.raises(InputError, match="3 bad so far, --skip_bad allows 2: repair it or allow more"):
        sft.main(["--student", checkpoints["small"], *flags, "--skip_bad", "2"])


def test_skipping_changes_nothing_else(corrupt, checkpoints, tmp_path):
    """Without the broken samples' rows, the losses are those of a run whose data never had them."""
    flags = data_flags(corrupt, out=tmp_path / "a", max_steps=1, global_batch=24, micro_batch=24)
    sft.main(["--student", checkpoints["small"], *flags, "--skip_bad", "3"])
    samples = [s for s in json.loads((corrupt / "train.json").read_text()) if s["id"] not in (4, 8, 12)]
    (corrupt / "less.json").write_text(json.dumps(samples))
    flags = data_flags(corrupt, out=tmp_path / "b", max_steps=1, global_batch=21, micro_batch=21,
                       data=corrupt / "less.json")
    sft.main(["--student", checkpoints["small"], *flags])
    (a,), (b,) = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_dpt_wants_a_student_or_its_parts(capsys):
    for flags in (
        [],
        ["--vision", "v"],
        ["--vision", "v", "--llm", "l", "--student", "s"],
        ["--llm", "l", "--student", "s"],
    ):
        with pytest.raises(SystemExit):
            dpt.parse_args([*flags, "--data", "d", "--out", "o"])
        assert "--vision and --llm" in capsys.readouterr().err


def test_prompt_tokens_need_prompts(parts, capsys):
    flags = [
        "--student",
        "s",
        "--teacher",
        "t",
        "--data",
        "d",
        "--out",
        "o",
        "--targets",
        "response",
        "prompt",
    ]
    with pytest.raises(SystemExit):
        dpt.parse_args(flags)
    assert "--no-caption_only" in capsys.readouterr().err
    assert dpt.parse_args([*flags, "--no-caption_only"]).targets == ["response", "prompt"]


@pytest.mark.parametrize("flags, said", [
    ("--alpha 3", "--alpha is of distillation, which needs --teacher"),
    ("--targets response", "--targets is of distillation"), ("--gamma 0", "--gamma is of distillation"),
    ("--template own", "--template is for a new student alone"),
])
def test_flags_that_would_do_nothing_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        dpt.parse_args(["--student", "s", "--data", "d", "--out", "o", *flags.split()])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("script", ["dpt", "sft", "dft", "evaluate", "toy", "lab.bench"])
def test_help_states_every_default(script, monkeypatch, capsys):
    seen = []
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda self, argv: (seen.append(self), parse(self, argv))
    )
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    assert "usage" in capsys.readouterr().out
    (parser,) = seen
    for action in parser._actions:
        assert action.help, action.option_strings
        assert action.type is not bool
        if not action.required and action.default not in (None, "", argparse.SUPPRESS):
            assert "default" in action.help, action.option_strings


def test_the_schedule():
    class Optimizer:
        param_groups = [{}]

    lrs = [set_lr(Optimizer, step, 100, 2.0, warmup=0.03) for step in range(100)]
    assert lrs[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert lrs[3] == 2.0
    assert lrs[3 + 97 // 2] == pytest.approx(1.0, abs=0.03)
    assert all(a > b for a, b in zip(lrs[3:], lrs[4:]))
    assert 0 < lrs[-1] < 0.001
    assert [set_lr(Optimizer, 0, 1, 2.0, warmup=0.0), set_lr(Optimizer, 0, 1, 2.0, warmup=0.5)] == [2.0, 2.0]
