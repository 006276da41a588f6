"""What stands in losses.py is what trains: each function is changed in its place, and every stage notices.

python -m pytest tests/test_definition.py
"""

import functools
import importlib
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, data_flags, log_of
from forked import imports_of
from safetensors.torch import load_file

import dft
import dpt
import losses
import mod_distill
import sft
from support import run as support_run
from support.flags import InputError

# (function, stage, flags of the stage, what its first log line calls the function's value)
USES = [
    ("autoregressive_loss", "dpt", [], "l_pt"),
    ("autoregressive_loss", "pt", [], "l_pt"),
    ("autoregressive_loss", "sft", [], "l_reg"),
    ("autoregressive_loss", "dft", [], "l_reg"),
    ("autoregressive_loss", "d2s", [], "l_ar"),
    ("response_kl", "dpt", [], "l_res"),
    ("response_kl", "dft", [], "l_res"),
    ("response_kl", "d2d", [], "l_kl"),
    ("response_kl", "d2s", [], "l_kl"),
    ("visual_kl", "dpt", [], "l_vis"),
    ("visual_kl", "dft", [], "l_vis"),
    ("prompt_kl", "dpt", ["--targets", "prompt", "--no-caption_only"], "l_prompt"),
    ("prompt_kl", "dft", ["--targets", "prompt"], "l_prompt"),
    ("prompt_kl", "d2d", ["--distill", "response+instruction"], None),  # one part of l_kl
    ("self_correlation", "dpt", [], None),  # a cosine does not see twice a matrix: see `changed`
    ("self_correlation", "dft", [], None),
    ("relation_loss", "dpt", [], "l_rel"),
    ("relation_loss", "dft", [], "l_rel"),
    ("routing", "d2s", [], None),  # returns three tensors: see `changed`
    ("routing", "pd", [], None),
    ("balance_loss", "d2s", [], "l_bal"),
    ("balance_loss", "pd", [], "l_bal"),
    ("dpo_loss", "pd", ["--po", "dpo"], "l_po"),
    ("kto_loss", "pd", [], "l_po"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, world, parts, checkpoints):
    """Run two steps of a stage on the tests' small models; returns its folder."""
    root = tmp_path_factory.mktemp("definition")
    teacher, pairs = ["--teacher", checkpoints["large"]], root / "pairs.json"
    small = ["--student", checkpoints["small"]]
    flags = lambda out, **more: data_flags(world, out=out, max_steps=2, **more)
    mod_distill.main(["--step", "d2s", *small, *teacher, *flags(root / "sparse")])
    write_pairs(world, pairs)

    def start(stage: str, more: list[str]) -> str:
        out = root / f"{len(list(root.iterdir()))}"
        argv = [*small, *(teacher if stage not in ("pt", "sft") else []), *more]
        if stage in ("d2d", "d2s"):
            mod_distill.main(["--step", stage, *argv, *flags(out)])
        elif stage == "pd":
            argv = ["--student", str(root / "sparse"), *teacher, *more]
            more = {"data": pairs, "epochs": 2, "global_batch": 4, "micro_batch": 4}
            mod_distill.main(["--step", "pd", *argv, *flags(out, **more)])
        else:
            {"pt": dpt, "dpt": dpt, "sft": sft, "dft": dft}[stage].main([*argv, *flags(out)])
        return out

    return start


@pytest.fixture(scope="module")
def whole(run):
    """The folder of a stage as it is, run once for all functions in it."""
    return functools.cache(lambda stage, *flags: run(stage, list(flags)))


def write_pairs(world, path) -> None:
    import json

    samples = [s for s in json.loads((world / "train.json").read_text()) if "image" in s]
    pairs = []
    for s in samples:
        good = s["conversations"][:2]
        bad = [good[0], good[1] | {"value": "top left top left"}]
        pairs.append({"image": s["image"], "chosen": good, "rejected": bad})
    path.write_text(json.dumps(pairs[:8]))


def fails(*args, **kwargs):
    raise ArithmeticError("this definition is not used")


def twice(*args, **kwargs):
    value = globals()["_original"](*args, **kwargs)
    if isinstance(value, tuple):  # routing: r, the kept values, whose they are
        return value[0], 2 * value[1], value[2]
    return value**3 if value.dim() == 3 else 2 * value  # of a correlation matrix the third power


def put(monkeypatch, name: str, other) -> None:
    """Give a function of losses.py another body, as an edit of the file does, for whoever imports it."""
    function = getattr(losses, name)
    copy = types.FunctionType(function.__code__, function.__globals__, name, function.__defaults__)
    monkeypatch.setattr(losses, "_original", copy, raising=False)
    monkeypatch.setattr(function, "__code__", other.__code__)


@pytest.mark.parametrize("name, stage, flags, term", USES)
def test_a_stage_trains_by_the_definition(run, whole, monkeypatch, name, stage, flags, term):
    undoubled = whole(stage, *flags)
    with monkeypatch.context() as patch:
        put(patch, name, fails)
        with pytest.raises(ArithmeticError):
            run(stage, flags)
    with monkeypatch.context() as patch:
        put(patch, name, twice)
        doubled = run(stage, flags)
    first, first_doubled = log_of(undoubled)[0], log_of(doubled)[0]
    if term:
        assert first[term] != 0
        assert first_doubled[term] == pytest.approx(2 * first[term], rel=1e-5)
    assert first_doubled["loss"] != first["loss"]
    a, b = (load_file(out / "model.safetensors") for out in (undoubled, doubled))
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_all_functions_of_the_papers_are_covered():
    named = {name for name, *_ in USES}
    assert named == {"autoregressive_loss", "response_kl", "visual_kl", "prompt_kl", "self_correlation",
                     "relation_loss", "routing", "balance_loss", "dpo_loss", "kto_loss"}


# ---------------------------------------------------------------------------------- a run knows its code


def test_a_changed_file_stops_the_same_command(world, checkpoints, tmp_path, monkeypatch):
    """With real files: a copy of the project, one of whose files is edited after the first call."""
    for name in "sft.py", "data.py", "losses.py", "model.py", "dft.py":
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "support", tmp_path / "support")
    argv = ["--student", checkpoints["small"], *data_flags(world, out="out", max_steps=1)]
    monkeypatch.chdir(tmp_path)
    sft.main(argv)
    with open(tmp_path / "dft.py", "a") as file:
        file.write("# sft.py does not consist of this, and no word is said of it\n")
    with open(tmp_path / "losses.py", "a") as file:
        file.write("# another thought\n")
    with imports_of(str(tmp_path)), pytest.raises(Exception, match="--no-resume") as error:
        importlib.import_module("sft").main(argv)
    assert str(error.value).startswith("--out out holds a finished run; since then losses.py changed.")


@pytest.fixture
def edited(monkeypatch):
    """From then on, losses.py counts as edited."""
    code = support_run.code_of
    return lambda: monkeypatch.setattr(support_run, "code_of", lambda s: code(s) | {"losses.py": "edited"})


def test_a_finished_run_of_other_code_is_trained_again_only_if_asked(
    run, world, checkpoints, tmp_path, edited
):
    argv = ["--student", checkpoints["small"], *data_flags(world, out=tmp_path / "out", max_steps=1)]
    sft.main(argv)
    before = (tmp_path / "out/run.json").read_text()
    edited()
    with pytest.raises(InputError, match="holds a finished run; since then losses.py changed"):
        sft.main(argv)
    assert (tmp_path / "out/run.json").read_text() == before
    sft.main([*argv, "--no-resume"])
    assert '"edited"' in (tmp_path / "out/run.json").read_text()


def test_an_interrupted_run_of_other_code_goes_on_only_if_asked(
    world, checkpoints, tmp_path, edited, monkeypatch, capsys
):
    argv = ["--student", checkpoints["small"], *data_flags(world, out=tmp_path / "out", save_every=1)]
    with monkeypatch.context() as patch:
        patch.setattr(
            sft, "write_log", lambda run, step, *a: 1 / (2 - step) and support_run.write_log(run, step, *a)
        )
        with pytest.raises(ZeroDivisionError):
            sft.main(argv)
    edited()
    with pytest.raises(InputError, match="an interrupted run; since then losses.py.*--resume"):
        sft.main(argv)
    sft.main([*argv, "--resume"])
    assert "goes on after step 2" in capsys.readouterr().out
    assert len(log_of(tmp_path / "out")) == 3


def test_every_script_names_all_files_that_it_imports():
    """By another way than the one that is tested: Python's own modules after an import."""
    named, ours = set(), lambda file: file.is_relative_to(ROOT) and file.parts[-2] != "tests"
    with imports_of(str(ROOT)):
        for script in "dft", "ckd", "mod_distill":  # one after the other: what is there now, and its own
            importlib.import_module(script)
            files = [Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
            imported = {str(f.relative_to(ROOT)) for f in files if ours(f) and ".venv" not in f.parts}
            named |= set(support_run.code_of(ROOT / f"{script}.py"))
            assert imported == named
