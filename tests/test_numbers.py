"""Numbers on the command line: their bounds, and in every stage the norm that gradients are clipped to."""

import pytest
import torch
from conftest import data_flags
from safetensors.torch import load_file

import dft
import dpt
import mod_distill
import sft

STAGES = {
    "dpt": (dpt, ["--teacher", "{large}"]),
    "sft": (sft, []),
    "dft": (dft, ["--teacher", "{large}"]),
    "d2d": (mod_distill, ["--step", "d2d", "--teacher", "{large}"]),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("lr", "-1", "-1 is not between 0 and inf"),
        ("lr", "nan", "nan is not between 0 and inf"),
        ("warmup", "100", "100 is not between 0 and 1"),
        ("warmup", "-1", "-1 is not between 0 and 1"),
        ("max_grad_norm", "-1", "-1 is not between 0 and inf"),
        ("weight_decay", "-0.1", "-0.1 is not between 0 and inf"),
        ("seed", "-1", "-1 is not between 0 and 9223372036854775807"),
        ("seed", "9" * 20, "is not between 0 and 9223372036854775807"),
        ("micro_batch", "0", "0 is not between 1 and inf"),
        ("micro_batch", "1.5", "invalid int value: '1.5'"),
        *((f, "0", "0 is not between 1 and inf") for f in ("keep", "epochs", "global_batch", "max_len")),
        ("shard", "weights", "invalid choice: 'weights'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_bounds(capsys, stage, flag, value, message):
    script, flags = STAGES[stage]
    with pytest.raises(SystemExit):
        script.parse_args(["--student", "s", "--data", "d", "--out", "o", *flags, f"--{flag}", value])
    assert f"argument --{flag}: " in (said := capsys.readouterr().err)
    assert message in said


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_clipped_to_the_norm_and_0_is_off(world, checkpoints, tmp_path, stage):
    script, flags = STAGES[stage]
    base = ["--student", checkpoints["small"], *(flag.format(**checkpoints) for flag in flags)]
    name = "multi_modal_projector.linear_1.weight"
    before, moved = load_file(f"{checkpoints['small']}/model.safetensors")[name], {}
    for norm in "0", "1e9", "1e-12":
        argv = data_flags(world, out=tmp_path / norm, max_steps=1, lr=0.01, max_grad_norm=norm)
        script.main([*base, *argv])
        moved[norm] = load_file(tmp_path / norm / "model.safetensors")[name] - before
    assert torch.equal(moved["0"], moved["1e9"])
    assert moved["0"].abs().max() > 0.009  # AdamW's first step is as long as the learning rate ...
    assert moved["1e-12"].abs().max() < 1e-5  # ... unless gradients are far below its epsilon
