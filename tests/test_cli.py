"""Bad input at the command line: one sentence, a non-zero exit, nothing trained. And the flags themselves."""

import argparse
import importlib
import io
import json
import shutil

import pytest
from conftest import but, data_flags, launch, log_of

import dft
import dpt
import sft
from model import Llava
from support.checkpoints import check_teacher
from support.flags import InputError, cli
from support.state import set_lr


@pytest.fixture
def argv(world, checkpoints, tmp_path):
    def make(**more):
        return ["--student", checkpoints["small"], *data_flags(world, out=tmp_path / "out", **more)]

    return make


def test_an_error_is_one_sentence_and_exit_code_2(argv, tmp_path):
    done = launch("sft.py", argv(data=tmp_path / "none.json"), expect=1)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("sft.py: error: cannot read the data file")
    assert "Traceback" not in done.stderr
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


def test_a_folder_that_is_a_file_or_broken(argv, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match="is no empty folder"):
        sft.main(argv())
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"stage"')
    with pytest.raises(InputError, match="run.json cannot be read"):
        sft.main(argv())


@pytest.mark.parametrize("flag", ["micro_batch", "global_batch", "epochs", "max_steps", "workers", "max_len"])
def test_numbers_out_of_range(argv, flag, capsys):
    with pytest.raises(SystemExit):
        sft.parse_args(argv(**{flag: -1}))
    assert f"argument --{flag}: -1 is not between" in capsys.readouterr().err


def test_a_run_that_diverges_stops_and_saves_nothing(argv, tmp_path):
    with pytest.raises(InputError, match="step 1: the loss of rank 0 is not finite"):
        sft.main(argv(lr=float("inf")))
    assert not (tmp_path / "out" / "model.safetensors").exists()
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


def test_a_terminal_that_lacks_the_characters_of_data(monkeypatch):
    page = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(page, encoding="ascii", write_through=True))
    cli(lambda: print("北京"))
    assert page.getvalue() == b"\\u5317\\u4eac\n"
