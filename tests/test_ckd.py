"""LLaVA-CKD: the cascade of teachers, what it refuses, how it goes on after a crash, what it gives back."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from conftest import NP, as_floats, data_flags, launch, llava_config, log_of
from safetensors.torch import load_file

import ckd
import dft
from model import Llava
from support.flags import InputError


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, checkpoints, tokenizer) -> dict[str, str]:
    """Beside small and large: a third one, deeper and untied; and misfits."""
    root = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(4)
    middle = Llava.from_checkpoint(checkpoints["large"])
    for p in middle.parameters():
        p.data += 0.05 * torch.randn_like(p)
    middle.save(root / "middle")
    other = Llava.from_checkpoint(checkpoints["large"])
    other.processor.tokenizer.add_tokens(["zebra"])
    other.save(root / "words")
    patches = Llava.from_checkpoint(checkpoints["large"])
    patches.processor.image_processor.size = {"height": 32, "width": 32}
    patches.save(root / "patches")
    config = json.loads((root / "patches/config.json").read_text())
    config["vision_config"]["image_size"] = 32
    (root / "patches/config.json").write_text(json.dumps(config))
    return {name: str(root / name) for name in ("middle", "words", "patches")}


def cascade_flags(world, parts, out, *names, **more) -> list[str]:
    flags = {"pretrain_data": world / "train.json", "finetune_data": world / "train.json", "out": out,
             "images": world / "images", "workers": 0, "pretrain_lr": 0.02, "finetune_lr": 0.02, "seed": 3,
             "pretrain_batch": 8, "finetune_batch": 8, "micro_batch": 8, "max_steps": 2} | more
    argv = [item for flag, value in flags.items() for item in (f"--{flag}", str(value))]
    student = ["--vision", parts["vision"], "--llm", parts["small"]]
    return ["--teachers", *names, *student, *argv, "--no-group_by_modality"]


def stages_of(out) -> list[str]:
    """The finished stages in the order in which they ended."""
    runs = [p for p in out.glob("*/*/run.json") if json.loads(p.read_text())["seconds"] is not None]
    return [str(p.parent.relative_to(out)) for p in sorted(runs, key=lambda p: p.stat().st_mtime_ns)]


def test_a_cascade_of_three_teachers(world, parts, checkpoints, teachers, tmp_path):
    """Unequal widths, padded vocabularies (448, 512), head tying; each round starts from the one before."""
    names = [checkpoints["small"], teachers["middle"], checkpoints["large"]]
    ckd.main(cascade_flags(world, parts, tmp_path, *names))
    rounds = "1-small", "2-middle", "3-large"
    want = [f"{folder}/{stage}" for folder in rounds for stage in ("dpt", "sft", "dft")]
    assert stages_of(tmp_path) == want
    runs = [json.loads((tmp_path / stage / "run.json").read_text()) for stage in want]
    assert [r["teacher"] for r in runs if r["stage"] != "sft"] == [n for name in names for n in (name, name)]
    assert runs[0]["llm"] == parts["small"]
    assert [r["student"] for r in runs[1:]] == [str(tmp_path / stage) for stage in want[:-1]]
    for stage, run in zip(want, runs):
        assert run["seconds"] is not None
        for line in log_of(tmp_path / stage):
            ar = line.get("l_pt", line.get("l_reg"))
            if run["stage"] != "sft":  # all weights are 1
                total = ar + line["l_res"] + line["l_vis"] + line["l_rel"]
                assert line["loss"] == pytest.approx(total, rel=1e-6)
    a, b = (load_file(tmp_path / stage / "model.safetensors") for stage in ("2-middle/dft", "3-large/dpt"))
    moved = {name for name in a if not torch.equal(a[name], b[name])}
    assert moved == {f"multi_modal_projector.linear_{k}.{p}" for k in (1, 2) for p in ("weight", "bias")}


def test_the_relation_loss_is_by_column_unless_asked(world, parts, checkpoints, tmp_path):
    lines = []
    for kind in "columns", "matrix":
        flags = cascade_flags(world, parts, tmp_path / kind, checkpoints["large"], max_steps=1, relation=kind)
        ckd.main(flags)
        lines.append(log_of(tmp_path / kind / "1-large" / "dpt")[0])
    assert lines[0]["l_res"] == pytest.approx(lines[1]["l_res"], rel=1e-6)
    assert lines[0]["l_rel"] != pytest.approx(lines[1]["l_rel"], rel=1e-3)


def test_top_down_goes_through_a_distilled_assistant(world, parts, checkpoints, tmp_path):
    names = checkpoints["small"], checkpoints["large"]
    ckd.main([*cascade_flags(world, parts, tmp_path, *names, max_steps=1), "--strategy", "top-down"])
    assert stages_of(tmp_path)[::3] == ["1-small/dpt", "2-student/dpt"]
    runs = [json.loads((tmp_path / s / "run.json").read_text()) for s in stages_of(tmp_path)]
    assert (runs[0]["student"], runs[0]["teacher"]) == names
    assert (runs[3]["llm"], runs[3]["teacher"]) == (parts["small"], str(tmp_path / "1-small/dft"))
    assert runs[5]["teacher"] == str(tmp_path / "1-small/dft")


def test_assistants_can_start_from_their_language_models(world, parts, checkpoints, tmp_path):
    flags = cascade_flags(world, parts, tmp_path, checkpoints["small"], checkpoints["large"], max_steps=1)
    ckd.main([*flags, "--strategy", "top-down", "--assistant_llms", parts["large"]])
    run = json.loads((tmp_path / "1-small/dpt/run.json").read_text())
    assert (run["llm"], run["student"]) == (parts["large"], None)


def test_two_ranks_equal_one_process(world, parts, checkpoints, tmp_path):
    names = checkpoints["small"], checkpoints["large"]
    ckd.main(cascade_flags(world, parts, tmp_path / "one", *names))
    launch("ckd.py", cascade_flags(world, parts, tmp_path / "two", *names, micro_batch=4))
    for stage, rel in ("1-small/dpt", 1e-5), ("2-large/dft", 5e-3):  # rounding grows through six stages
        a, b = (log_of(tmp_path / n / stage) for n in ("one", "two"))
        assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=rel)


def test_a_cascade_killed_in_the_second_teachers_dft_ends_the_same(
    world, parts, checkpoints, tmp_path, monkeypatch, capsys
):
    names = checkpoints["small"], checkpoints["large"]
    flags = lambda out: cascade_flags(world, parts, out, *names, epochs=2, max_steps=4, save_every=2)
    whole, killed, write_log = tmp_path / "whole", tmp_path / "killed", dft.write_log

    def dies(run, step, *rest):
        if run.out == killed / "2-large/dft" and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write_log(run, step, *rest)

    ckd.main(flags(whole))
    with monkeypatch.context() as patch:
        patch.setattr(dft, "write_log", dies)
        process = multiprocessing.get_context("fork").Process(target=ckd.main, args=(flags(killed),))
        process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed / "2-large/dft/model.safetensors").exists()
    assert len(stages_of(killed)) == 5
    before = (killed / "1-small/dft/model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    ckd.main(flags(killed))
    said = capsys.readouterr().out
    assert f"{killed}/1-small/dpt: this run is finished already" in said
    assert f"{killed}/2-large/sft: this run is finished already" in said
    assert said.count("goes on after step") == said.count("goes on after step 2") == 1
    assert (killed / "1-small/dft/model.safetensors").stat().st_mtime_ns == before
    a, b = (load_file(out / "2-large/dft/model.safetensors") for out in (whole, killed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_only_one_teacher_is_in_memory(world, parts, checkpoints, tmp_path, tokenizer, monkeypatch):
    """Two teachers of 100 MB each; the second one's stages begin with the first one's memory given back."""
    big = Llava.from_checkpoint(checkpoints["large"])
    config = llava_config(width=24, vocab=512, tied=False)
    config.text_config.intermediate_size = 170_000
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(config).model.language_model
    big.language_model, big.config = model, config
    for name in "a", "b":
        big.save(tmp_path / name)
    size = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    assert size > 75
    del big, model
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page
    seen = []
    start = ckd.dpt.main
    monkeypatch.setattr(ckd.dpt, "main", lambda argv: (seen.append(resident()), start(argv)))
    monkeypatch.setattr(ckd, "check_teachers", lambda args: None)
    ckd.main(
        cascade_flags(world, parts, tmp_path / "out", str(tmp_path / "a"), str(tmp_path / "b"), max_steps=1)
    )
    first, second = seen
    assert second - first < 0.5 * size, seen


def test_all_misfits_are_refused_before_the_first_stage(world, parts, checkpoints, teachers, tmp_path):
    first = Llava.from_checkpoint(checkpoints["small"])
    first.processor.tokenizer.add_tokens(["lion"])
    first.save(tmp_path / "first")  # its tokenizer is the student's
    names = str(tmp_path / "first"), teachers["words"], teachers["patches"]
    with pytest.raises(InputError) as error:
        ckd.main(cascade_flags(world, parts, tmp_path / "out", *names))
    message = str(error.value)
    assert "words: student and teacher must share the tokenizer" in message
    assert "'lion' is id 373 for the student and 373 for the teacher, where 373 is 'zebra'" in message
    assert f"patches: an image is {NP} tokens for the student and 16" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--student", "x"], "give either --vision and --llm"),
        (["--assistant_llms", "x"], "--assistant_llms: top-down only"),
        (["--strategy", "top-down", "--assistant_llms", "x"], "one for each teacher but the last"),
        (["--nonsense", "1"], "unrecognized arguments: --nonsense"),
        (["--relation", "rows"], "invalid choice: 'rows'"),
    ],
)
def test_bad_command_lines(world, parts, checkpoints, tmp_path, capsys, more, message):
    with pytest.raises((SystemExit, InputError)) as error:
        ckd.main([*cascade_flags(world, parts, tmp_path / "out", checkpoints["large"]), *more])
    assert message in capsys.readouterr().err + str(error.value)
    assert not (tmp_path / "out").exists()


def test_another_cascade_in_the_same_folder_is_refused(world, parts, checkpoints, tmp_path):
    argv = lambda **more: cascade_flags(world, parts, tmp_path, checkpoints["small"], max_steps=1, **more)
    ckd.main(argv())
    with pytest.raises(InputError, match="holds a different run .*lr: 0.02 there, 0.5 now"):
        ckd.main(argv(pretrain_lr=0.5))


def test_columns_of_a_stage_by_hand(world, checkpoints, tmp_path):
    """CKD Eq. 6 through dft.py's flag, against matrices made from stock logits."""
    from test_stages import first_steps
    from transformers import LlavaForConditionalGeneration

    dft.main(["--student", checkpoints["small"], "--teacher", checkpoints["large"], "--relation", "columns",
              *data_flags(world, out=tmp_path / "out", max_steps=1, lr=0)])
    (line,) = log_of(tmp_path / "out")
    models = [LlavaForConditionalGeneration.from_pretrained(checkpoints[n]) for n in ("small", "large")]
    data, steps = first_steps(world, checkpoints["small"])
    losses = []
    for sample in (data[i] for i in steps[0]):
        ((ids, _),) = sample["rows"]
        if not sample["pixels"]:
            continue
        ids = torch.tensor([ids])
        with torch.no_grad():
            s, t = (
                m(input_ids=ids, pixel_values=as_floats(sample["pixels"][0])).logits[0].double()[:, :448]
                for m in models
            )
        for image in (ids[0] == 372).nonzero()[:, 0].split(NP):
            r_s, r_t = (y[image] @ y[image].T for y in (s, t))
            cosines = [(r_s[:, i] @ r_t[:, i]) / (r_s[:, i].norm() * r_t[:, i].norm()) for i in range(NP)]
            losses.append(sum(1 - c for c in cosines) / NP)
    assert line["l_rel"] == pytest.approx((sum(losses) / len(losses)).item(), rel=1e-4)
