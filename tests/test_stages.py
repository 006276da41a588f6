"""The stage scripts by their command lines: what they train, what they leave alone, and how they add up."""

import argparse
import json

import pytest
import torch
import torch.utils.checkpoint
from conftest import NP, as_floats, data_flags, launch, log_of, on_two_ranks, open_data
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import dft
import dpt
import sft
from data import schedule
from support import chunks
from support.flags import to_argv


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(f"{path}/model.safetensors")


def changed(before, after) -> set[str]:
    a, b = weights(before), weights(after)
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def same_losses(a, b) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for name in ("loss", *sorted(x.keys() - {"tokens_per_s", "loss", "grad_norm"}), "grad_norm"):
            # The margin of preferences is what is left of sums that cancel: fp32 has it to 1e-6 of those.
            assert x[name] == pytest.approx(y[name], rel=1e-5, abs=2e-6), (x["step"], name)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, world, parts, checkpoints):
    """DPT -> SFT -> DFT in one process each; returns the folders."""
    root = tmp_path_factory.mktemp("chain")
    student = ["--vision", parts["vision"], "--llm", parts["small"]]
    teacher = ["--teacher", checkpoints["large"]]
    dpt.main([*student, *teacher, *data_flags(world, out=root / "dpt")])
    sft.main(["--student", str(root / "dpt"), *data_flags(world, out=root / "sft")])
    dft.main(["--student", str(root / "sft"), *teacher, *data_flags(world, out=root / "dft")])
    return root


def test_stages_on_two_ranks_equal_one_process(chain, world, parts, checkpoints, tmp_path):
    """DPT by torchrun; DFT too in test_resume.py, and SFT there and, between these two, in test_ckd.py."""
    student = ["--vision", parts["vision"], "--llm", parts["small"]]
    teacher = ["--teacher", checkpoints["large"]]
    launch("dpt.py", [*student, *teacher, *data_flags(world, out=tmp_path / "dpt", micro_batch=2)])
    split = data_flags(world, out=tmp_path / "dft", micro_batch=1)
    on_two_ranks(dft.main, ["--student", f"{chain}/sft", *teacher, *split])
    for stage in "dpt", "dft":
        same_losses(log_of(chain / stage), log_of(tmp_path / stage))
    assert {p.name for p in (tmp_path / "dft").iterdir()} >= {"model.safetensors", "log.jsonl", "run.json"}


def test_one_rank_has_no_image_in_some_step(world, checkpoints):
    """What the test above relies on, in its last stage: micro-batches of one sample on two ranks."""
    data, steps = first_steps(world, checkpoints["small"])
    pairs = [[bool(data.n_images[i]) for i in batch[k : k + 2]] for batch in steps for k in range(0, 8, 2)]
    assert any(sum(pair) == 1 for pair in pairs)
    assert any(not any(pair) for pair in pairs)
    assert any(sum(pair) == 1 for pair in pairs[3::4])  # also where the gradients are exchanged


def first_steps(world, model):
    """The data and the schedule of the runs in this file."""
    processor = AutoProcessor.from_pretrained(model)
    data = open_data(world / "train.json", world / "images", processor)
    args = argparse.Namespace(seed=3, epochs=1, max_steps=0, global_batch=8, group_by_modality=False, data="")
    return data, schedule(data, args)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_does_not_change_the_losses(chain, world, checkpoints, tmp_path, micro):
    teacher = ["--teacher", checkpoints["large"]]
    flags = data_flags(world, out=tmp_path / "dft", micro_batch=micro)
    dft.main(["--student", str(chain / "sft"), *teacher, *flags])
    same_losses(log_of(chain / "dft"), log_of(tmp_path / "dft"))
    a, b = weights(chain / "dft"), weights(tmp_path / "dft")
    for name in a:
        assert (a[name] - b[name]).abs().max() < 1e-3, name


def test_gradient_checkpointing_and_workers_change_nothing(chain, world, checkpoints, tmp_path, monkeypatch):
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k)
    )
    flags = data_flags(world, out=tmp_path / "dft", workers=1)
    dft.main(
        [
            "--student",
            str(chain / "sft"),
            "--teacher",
            checkpoints["large"],
            "--gradient_checkpointing",
            *flags,
        ]
    )
    same_losses(log_of(chain / "dft"), log_of(tmp_path / "dft"))


def test_what_each_stage_trains(chain, world, parts, tmp_path):
    dpt.main(["--vision", parts["vision"], "--llm", parts["small"], *data_flags(world, out=tmp_path / "pt")])
    projector = {f"multi_modal_projector.linear_{k}.{p}" for k in (1, 2) for p in ("weight", "bias")}
    assert changed(tmp_path / "pt", chain / "dpt") == projector  # same seed, same start, other objective
    start = weights(parts["small"])
    for name, value in weights(
        chain / "dpt"
    ).items():  # the LLM and the tower are bit for bit those of the parts
        if name.startswith("language_model.model."):
            assert torch.equal(value, start[name.removeprefix("language_model.")]), name
    tower = weights(parts["vision"])
    for before, after in (("dpt", "sft"), ("sft", "dft")):
        names = changed(chain / before, chain / after)
        every = set(weights(chain / after))
        assert names == {n for n in every if not n.startswith("vision_tower")}
    for name, value in weights(chain / "dft").items():
        if name.startswith("vision_tower"):
            assert any(torch.equal(value, t) for t in tower.values() if t.shape == value.shape), name


def test_the_losses_fall_and_are_all_logged(chain):
    log = log_of(chain / "dft")
    assert [line["step"] for line in log] == [0, 1, 2]
    for line in log:
        assert line.keys() == {"step", "lr", "loss", "l_reg", "l_res", "l_vis", "l_rel", "l_prompt",
                               "tokens_per_s", "grad_norm"}
        assert line["l_prompt"] == 0  # not among the default targets
        total = line["l_reg"] + line["l_res"] + line["l_vis"] + 0.5 * line["l_rel"]
        assert line["loss"] == pytest.approx(total, rel=1e-6)
        assert min(line["l_res"], line["l_vis"], line["l_rel"]) > 1e-4
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("stage", ["dpt", "dft"])
def test_the_log_holds_the_losses_of_the_first_batch(chain, world, checkpoints, tmp_path, stage):
    """Step 0, worked out again with stock models, one sample at a time, sharing no code with the losses."""
    teacher = ["--teacher", checkpoints["large"]]
    prompts = ["--targets", "response", "visual", "prompt"]
    flags = data_flags(world, out=tmp_path / "out", max_steps=1, lr=0)
    script, more = (dpt, ["--no-caption_only"]) if stage == "dpt" else (dft, [])
    script.main(["--student", str(chain / "sft"), *teacher, *prompts, *more, *flags])
    (line,) = log_of(tmp_path / "out")

    student, teacher = (
        LlavaForConditionalGeneration.from_pretrained(p) for p in (chain / "sft", checkpoints["large"])
    )
    data, steps = first_steps(world, chain / "sft")
    nll, kl = [], {"l_res": [], "l_vis": [], "l_prompt": []}
    rel = []
    for sample in (data[i] for i in steps[0]):
        ((ids, targets),) = sample["rows"]
        ids = torch.tensor([ids])
        pixels = {"pixel_values": as_floats(sample["pixels"][0])} if sample["pixels"] else {}
        with torch.no_grad():
            s, t = (m(input_ids=ids, **pixels).logits[0].double()[:, :448] for m in (student, teacher))
        p_s, p_t = s.softmax(-1), t.softmax(-1)
        rows = (p_t * (p_t / p_s).log()).sum(-1)
        visual = [k for k in range(len(targets)) if ids[0, k] == 372]
        for k in range(len(targets) - 1):
            if targets[k] != -100:
                nll.append(-p_s[k, ids[0, k + 1]].log())
                kl["l_res"].append(rows[k])
            elif k not in visual and k + 1 not in visual:
                kl["l_prompt"].append(rows[k])
        kl["l_vis"] += [rows[k] for k in visual]
        for first in range(0, len(visual), NP):
            r_s, r_t = (y[visual[first : first + NP]] @ y[visual[first : first + NP]].T for y in (s, t))
            rel.append(1 - (r_s * r_t).sum() / (r_s.norm() * r_t.norm()))
    name = {"dpt": "l_pt", "dft": "l_reg"}[stage]
    want = {name: nll, **kl, "l_rel": rel}
    want = {term: (sum(values) / len(values)).item() for term, values in want.items()}
    for term, value in want.items():
        assert line[term] == pytest.approx(value, rel=1e-4), term
    total = want[name] + want["l_res"] + want["l_vis"] + want["l_prompt"] + 0.5 * want["l_rel"]
    assert line["loss"] == pytest.approx(total, rel=1e-4)


def test_every_ablation_is_one_command_line(chain, world, checkpoints, tmp_path):
    """KD Tables 3 and 4: any set of targets, with and without RDist; unread rows are not read."""
    first = log_of(chain / "dft")[0]
    base = ["--student", str(chain / "sft"), "--teacher", checkpoints["large"]]
    for k, (flags, parts) in enumerate((
        (["--targets", "response", "--gamma", "0"], {"l_res": 1}),
        (["--targets", "response", "prompt", "--gamma", "0"], {"l_res": 1, "l_prompt": 1}),
        (["--targets", "response", "visual", "prompt", "--gamma", "0"],
         {"l_res": 1, "l_vis": 1, "l_prompt": 1}),
        (["--targets"], {"l_rel": 0.5}),
        (["--alpha", "0.25", "--beta", "2", "--gamma", "3"], {"l_res": 0.25, "l_vis": 2, "l_rel": 3}),
    )):
        dft.main([*base, *flags, *data_flags(world, out=tmp_path / str(k), max_steps=1)])
        (line,) = log_of(tmp_path / str(k))
        for name in parts:
            if name != "l_prompt":
                assert line[name] == pytest.approx(first[name], rel=1e-5)
            assert line[name] > 0
        total = line["l_reg"] + sum(w * line[name] for name, w in parts.items())
        assert line["loss"] == pytest.approx(total, rel=1e-6)
        assert line["l_reg"] == pytest.approx(first["l_reg"], rel=1e-5)


def test_bf16_is_close_to_fp32(chain, world, checkpoints, tmp_path):
    flags = data_flags(world, out=tmp_path / "dft", max_steps=2)
    dft.main(["--student", str(chain / "sft"), "--teacher", checkpoints["large"], "--dtype", "bf16", *flags])
    for a, b in zip(log_of(chain / "dft"), log_of(tmp_path / "dft")):
        for name in "loss", "l_reg", "l_res", "l_vis":
            assert a[name] == pytest.approx(b[name], rel=0.03), name
            assert a[name] != b[name]
    assert all(v.dtype == torch.float32 for v in weights(tmp_path / "dft").values())


@pytest.mark.parametrize("teacher_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_teacher_has_a_precision_of_its_own(chain, world, checkpoints, tmp_path, dtype, teacher_dtype):
    flags = data_flags(world, out=tmp_path / "dft", max_steps=1, dtype=dtype, teacher_dtype=teacher_dtype)
    dft.main(["--student", str(chain / "sft"), "--teacher", checkpoints["large"], *flags])
    (line,), (exact, *_) = log_of(tmp_path / "dft"), log_of(chain / "dft")
    assert line["loss"] == pytest.approx(exact["loss"], rel=0.03)
    same = [term for term in ("l_reg", "l_res") if line[term] == pytest.approx(exact[term], rel=1e-6)]
    assert same == (["l_reg"] if dtype == "fp32" else []) + (
        ["l_res"] if (dtype, teacher_dtype) == ("fp32",) * 2 else []
    )


def test_a_teacher_with_its_own_tower(chain, world, checkpoints, tmp_path):
    """Different encoders are fine as long as the visual token counts agree."""
    from model import Llava

    teacher = Llava.from_checkpoint(checkpoints["large"])
    for p in teacher.vision_tower.parameters():
        torch.nn.init.normal_(p, std=0.2)
    teacher.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    teacher.save(tmp_path / "teacher")
    flags = data_flags(world, out=tmp_path / "dft", max_steps=1, micro_batch=4)
    dft.main(["--student", str(chain / "sft"), "--teacher", str(tmp_path / "teacher"), *flags])
    (line,), (shared, *_) = log_of(tmp_path / "dft"), log_of(chain / "dft")
    assert line["l_reg"] == pytest.approx(shared["l_reg"], rel=1e-5)
    assert line["l_vis"] != pytest.approx(shared["l_vis"], rel=1e-3)


def test_the_start_up_summary_and_a_second_call(chain, world, checkpoints, capsys):
    argv = [
        "--student",
        str(chain / "sft"),
        "--teacher",
        checkpoints["large"],
        *data_flags(world, out=chain / "dft"),
    ]
    before = (chain / "dft" / "log.jsonl").read_text()
    dft.main(argv)
    assert "finished already" in capsys.readouterr().out
    assert (chain / "dft" / "log.jsonl").read_text() == before
    assert json.loads((chain / "dft" / "run.json").read_text())["seconds"] is not None


def test_sft_is_dft_without_a_teacher(chain, world, tmp_path):
    """Eq. (1) is the same number in both, and all that SFT's loss is."""
    for line in log_of(chain / "sft"):
        assert line["loss"] == line["l_reg"]


def over_full_logits(objective, kinds, y, student, teacher):
    """What `over_rows` stands for: full logits, and autograd."""
    log_s, log_t = ((h @ w.T).log_softmax(-1) for h, w in (student, teacher))
    kinds = {k: torch.zeros_like(y, dtype=torch.bool) if mask is None else mask for k, mask in kinds.items()}
    return objective(**{k: chunks.Rows(log_s[mask], log_t[mask], y[mask], None) for k, mask in kinds.items()})


def test_chunked_and_plain_give_the_same_training_curve_on_the_toy_world(tmp_path, monkeypatch):
    from lab.world import BASE, write_world

    write_world(tmp_path, n_train=60, n_test=1)
    data = {"data": f"{tmp_path}/finetune.json", "images": f"{tmp_path}/images", "workers": 0, "epochs": 2,
            "global_batch": 16, "micro_batch": 8, "max_len": 128}
    for name in "small", "large":
        new = {"vision": f"{BASE}/siglip", "llm": f"{BASE}/qwen-{name}", "out": f"{tmp_path}/{name}"}
        dpt.main(to_argv(**new, max_steps=1, **data))
    curves = []
    for name in "plain", "chunked":
        with monkeypatch.context() as patch:
            if name == "plain":
                patch.setattr(dft, "over_rows", over_full_logits)
            else:
                patch.setattr(chunks, "CHUNK", 50 * 512)  # 50 rows
            dft.main(to_argv(student=f"{tmp_path}/small", teacher=f"{tmp_path}/large", lr=2e-3,
                             max_steps=6, out=f"{tmp_path}/{name}", **data))
        keys = ("loss", "l_reg", "l_res", "l_vis", "l_rel")
        curves.append([[line[k] for k in keys] for line in log_of(tmp_path / name)])
    plain, chunked = curves
    assert plain[-1][0] < 0.8 * plain[0][0]
    for a, b in zip(plain, chunked):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
