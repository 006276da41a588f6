"""The lab's instruments: what a run will need, what a checkpoint costs to ask, what runs did.

python -m pytest tests/test_lab.py
"""

import json

import pytest
import torch
import transformers as hf
from conftest import NP, data_flags, log_of, new_student, turns
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import dft
import moe
from lab import bench, plan, report
from support.flags import InputError

PROJECTOR = 64 * 32 + 32 + 32 * 32 + 32


def vision_config(side: int) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, image_size=side,
                                 num_attention_heads=2, patch_size=14, vision_use_head=False)


def text_config(width: int, ffn: int, depth: int, heads: int, vocab: int, tied=False) -> hf.Qwen2Config:
    return hf.Qwen2Config(hidden_size=width, intermediate_size=ffn, num_hidden_layers=depth, vocab_size=vocab,
                          num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=tied,
                          bos_token_id=None, eos_token_id=371, pad_token_id=371)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Folders with nothing but a config.json: a tower, a language model, and both as LLaVA checkpoints."""
    root = tmp_path_factory.mktemp("shapes")
    for name, width, vision in ("student", 32, "vision"), ("teacher", 64, "vision-elsewhere"):
        vision_config(56).save_pretrained(root / vision)  # the same one, but its config names the folder
        text_config(width, 2 * width, 2, 2, 512, name == "student").save_pretrained(root / f"{name}-llm")
        plan.read_config(f"{root}/{vision}+{root}/{name}-llm").save_pretrained(root / name)
    return root


def need(shapes, stage: str, *more: str, teacher: bool = True, tokens: int = 46) -> dict:
    argv = [stage, "--student", f"{shapes}/student", *(["--teacher", f"{shapes}/teacher"] if teacher else [])]
    return plan.step(plan.parse_args([*argv, *more]), tokens)


def peak_of(tiny: list[str], argv: list[str]) -> dict[str, float]:
    """The peak of resident memory in a run of dft.py, in MiB beyond what a process has after a tiny one: the
    libraries, of which some parts are loaded only when they are used."""
    dft.main(tiny)
    before = bench.memory()
    dft.main(argv)
    return {"MiB": bench.memory(peak=True) - before}


def test_memory_is_what_a_run_takes(tmp_path, tokenizer, monkeypatch, checkpoints, world):
    """Within 15 % of the peak of a real run of two steps on 829 tokens."""
    hf.SiglipVisionModel(vision_config(384)).save_pretrained(tmp_path / "vision")
    hf.SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(tmp_path / "vision")
    models = []
    for name, depth in ("student", 4), ("teacher", 2):
        hf.Qwen2ForCausalLM(text_config(384, 1024, depth, 6, 4096)).save_pretrained(tmp_path / f"{name}-llm")
        tokenizer.save_pretrained(tmp_path / f"{name}-llm")
        new_student(str(tmp_path / "vision"), str(tmp_path / f"{name}-llm")).save(tmp_path / name)
        models += [f"--{name}", str(tmp_path / name)]
    Image.effect_noise((384, 384), 50).convert("RGB").save(tmp_path / "image.png")
    said = turns("<image>\n" + "how many objects ? " * 4, "red circle top left , " * 15 + "two")
    (tmp_path / "data.json").write_text(json.dumps([{"image": "image.png", "conversations": said}] * 2))
    # The C library would keep freed activations in pieces that gradients do not fit into; so it gives them
    # back at once, and what is resident is what is in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    given = [*models, "--teacher_dtype", "bf16", "--micro_batch", "1", "--global_batch", "1"]
    where = ["--data", f"{tmp_path}/data.json", "--images", str(tmp_path), "--out", f"{tmp_path}/out"]
    tiny = ["--student", checkpoints["small"], "--teacher", checkpoints["large"], *data_flags(world)]
    tiny += ["--max_steps", "2", "--out", f"{tmp_path}/tiny"]
    argv = [*given, *where, "--dtype", "fp32", "--workers", "0"]
    measured = bench.in_own_process(peak_of, tiny, argv)["MiB"]
    planned = plan.step(plan.parse_args(["dft", *given, "--gpus", "0"]), 829)
    assert planned["together"] / 2**20 == pytest.approx(measured, rel=0.15)
    weights = planned["student"] + planned["teacher"] + planned["optimizer"]
    assert 0.25 * weights < planned["activations"] < 4 * weights  # both are a good part of it


def test_a_teacher_that_sees_otherwise_keeps_its_tower(shapes, tmp_path):
    for part, name, value in ("vision_config", "hidden_size", 32), ("", "vision_feature_layer", -1):
        config = hf.AutoConfig.from_pretrained(shapes / "teacher")
        setattr(getattr(config, part, config), name, value)
        config.save_pretrained(tmp_path / name)
        argv = ["dft", "--student", f"{shapes}/student", "--teacher", str(tmp_path / name)]
        assert plan.step(plan.parse_args(argv), 46)["n_teacher"] == plan.sizes(config)["all"]


def test_parts_are_what_the_shapes_say(shapes):
    model = hf.AutoModelForImageTextToText.from_config(hf.AutoConfig.from_pretrained(shapes / "student"))
    n = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.model.vision_tower.parameters())
    full = need(shapes, "dft", "--gpus", "4")
    assert (full["n_student"], full["n_trained"]) == (n, n - frozen)
    moved = 4 * (n - frozen)
    assert (full["student"], full["gradients"], full["optimizer"]) == (4 * n, moved, 2 * moved)
    teacher = hf.AutoModelForImageTextToText.from_config(hf.AutoConfig.from_pretrained(shapes / "teacher"))
    alone = sum(p.numel() for p in teacher.parameters()) - frozen  # it sees through the student's tower
    assert full["teacher"] == 2 * alone
    parts = sum(full[name] for name in ("student", "gradients", "optimizer", "teacher", "activations"))
    assert full["together"] == parts + max(full["losses"], full["backward"]) + plan.SET_ASIDE


def test_flops_are_those_that_torch_counts(shapes):
    """A forward and backward pass of the language model."""
    config = hf.AutoConfig.from_pretrained(shapes / "student").text_config
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(inputs_embeds=torch.randn(1, 46, config.hidden_size, requires_grad=True))[0]
        (hidden[:, 16:] @ model.lm_head.weight.T).sum().backward()
    args = plan.parse_args(["sft", "--student", f"{shapes}/student", "--micro_batch", "1"])
    tower = 2 * 16 * (plan.sizes(plan.read_config(args.student))["vision"] + 3 * PROJECTOR)
    attention = 2 * (4 + 8) * 46**2 * 32  # two layers, forwards and backwards: what the plan leaves out
    told = plan.step(args, 46)["flops"] - tower + attention
    assert told == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("stage, answers", [("d2s", 1), ("pd --po dpo", 2), ("pd", 2)])
def test_a_pass_ahead_takes_time_where_there_are_several_micro_batches(shapes, stage, answers):
    """The student's tower, projector and body, forwards; with KTO the teacher's and both log-ratios, too."""
    given = [*stage.split(), "--gpus", "2", "--micro_batch", "4", "--global_batch"]
    one, several = (need(shapes, *given, batch)["flops"] for batch in ("8", "16"))
    sparse = plan.parse_args(["d2s", "--kl", "0", "--student", f"{shapes}/student"])
    n = plan.sizes(plan.read_config(f"{shapes}/student"), sparse)
    t = plan.sizes(plan.read_config(f"{shapes}/teacher"))
    ahead = 2 * 46 * answers * (n["body"] - n["idle"]) + 2 * 16 * (n["vision"] + PROJECTOR)
    if stage == "pd":  # the teacher looks through the student's tower
        ahead += 2 * 46 * answers * t["body"] + 2 * 16 * t["projector"]
        ahead += 2 * 30 * answers * 512 * (32 + 64)
    assert several - one == pytest.approx(ahead)


def test_what_makes_a_run_smaller(shapes):
    full = need(shapes, "dft", "--gpus", "4", "--micro_batch", "8")
    small = need(shapes, "dft", "--gpus", "4", "--micro_batch", "4")
    assert small["activations"] == pytest.approx(full["activations"] / 2, rel=0.1)
    again = need(shapes, "dft", "--gpus", "4", "--micro_batch", "8", "--gradient_checkpointing")
    assert again["activations"] < full["activations"]
    assert again["flops"] > full["flops"]
    shared = need(shapes, "sft", "--gpus", "4", "--shard", "optimizer", teacher=False)
    assert 4 * shared["optimizer"] == need(shapes, "sft", "--gpus", "4", teacher=False)["optimizer"]


def test_weights_that_products_take_in_bf16_are_copied(shapes):
    """Beside the student's own in fp32, whatever its LLM was published in; none in an fp32 run."""
    more = ["--micro_batch", "1", "--dtype"]
    exact, half = (need(shapes, "sft", *more, dtype, teacher=False) for dtype in ("fp32", "bf16"))
    head, logits = 512 * 32, 30 * 512  # a copy of the head, then its gradient in bf16; logits of the text
    assert half["losses"] - exact["losses"] == 2 * 2 * head - 2 * logits
    on_cpu = [need(shapes, "sft", *more, dtype, "--gpus", "0", teacher=False) for dtype in ("fp32", "bf16")]
    assert on_cpu[1]["losses"] - on_cpu[0]["losses"] == (2 * 2 + 4) * head - 2 * logits
    for dtype, n_bytes in ("fp32", 0), ("bf16", 2):
        few, many = (need(shapes, "d2s", *more, dtype, "--experts", n)["activations"] for n in ("4", "8"))
        copied = n_bytes * 4 * 3 * 32 * 64  # of four more experts, in one of two layers
        assert many - few == pytest.approx(copied, rel=0.01)  # routers are counted with them
    config = hf.AutoConfig.from_pretrained(shapes / "student").text_config
    config.dtype = torch.float32
    told = plan.kept_by_llm(config, (1, 46), torch.bfloat16, True)
    config.dtype = torch.bfloat16
    assert plan.kept_by_llm(config, (1, 46), torch.bfloat16, True) == told


@pytest.mark.parametrize("stage", ["sft", "dpt", "d2s"])
def test_layers_keep_what_those_of_a_real_model_keep(tmp_path, stage):
    """All of them trained; frozen, so that no gradient of a weight needs their input; one of two sparse."""
    config = hf.LlavaConfig(vision_config=vision_config(56), text_config=text_config(256, 704, 2, 4, 512))
    config.save_pretrained(tmp_path)
    given = ["--student", str(tmp_path), "--dtype", "bf16", "--micro_batch", "1"]
    told = plan.step(plan.parse_args([stage, *given, *(["--kl", "0"] if stage == "d2s" else [])]), 200)
    llava = hf.LlavaForConditionalGeneration(config).model
    x, body = torch.randn(1, 200, 256, requires_grad=True), llava.language_model
    body.requires_grad_(stage == "sft")
    if stage == "d2s":
        moe.sparsify(llava, experts=4, top_k=2, layers="every_other")
        for part in moe.modules(llava, moe.Router) + moe.modules(llava, moe.Experts):
            part.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        real = plan.kept_by(lambda: body(inputs_embeds=x, use_cache=False))
    assert told["activations"] - x.nbytes == pytest.approx(real, rel=0.1)
    if stage == "dpt":
        assert 2 * told["backward"] < told["activations"]  # of one layer, and nothing is sparse


def test_every_stage_has_a_plan(shapes, capsys):
    new = ["--vision", f"{shapes}/vision", "--llm", f"{shapes}/student-llm"]
    projector = plan.step(plan.parse_args(["dpt", *new]), 46)
    assert projector["n_trained"] == PROJECTOR
    assert projector["teacher"] == 0
    sft, d2d, d2s, pd = (need(shapes, stage, teacher=stage != "sft") for stage in ("sft", "d2d", "d2s", "pd"))
    assert sft["n_trained"] == d2d["n_trained"]
    assert d2s["n_trained"] == pd["n_trained"] == projector["n_trained"] + 4 * (3 * 32 * 64) + 4 * 32 + 32
    assert sft["flops"] < d2d["flops"] < pd["flops"] > d2s["flops"]
    given = ["sft", "--student", f"{shapes}/vision+{shapes}/student-llm", "--text", "30", "--max_len", "64"]
    fits = plan.main([*given, "--samples", "1000", "--tflops", "2", "--gpus", "2", "--epochs", "3"])
    assert fits["hours"] == pytest.approx(3 * 1000 * fits["flops"] / 4e12 / 3600)
    assert "it fits into 80 GiB" in capsys.readouterr().out
    assert not plan.main([*given, "--memory", "2.0005", "--gpus", "2"])["fits"]
    said = capsys.readouterr().out
    assert "does not fit into 2.0005 GiB" in said
    least = "--gradient_checkpointing --micro_batch 1 --shard optimizer"
    together = plan.step(plan.parse_args([*given, *least.split(), "--gpus", "2"]), 64)["together"]
    assert f"the least it can take is {together / 2**30:.2f} GiB, with {least}" in said


def test_what_cannot_be_planned_is_said(shapes):
    def plan_for(*argv: str) -> None:
        plan.main([*argv, "--text", "30"])

    with pytest.raises(InputError, match="vision is a 'siglip_vision_model' model: give a LLaVA checkpoint"):
        plan_for("sft", "--student", f"{shapes}/vision")
    with pytest.raises(InputError, match="has more than one"):
        plan_for("sft", "--student", f"{shapes}/vision+{shapes}/student-llm+{shapes}/student-llm")
    with pytest.raises(InputError, match="cannot load the config of .*nowhere"):
        plan_for("sft", "--student", f"{shapes}/nowhere")
    with pytest.raises(InputError, match="samples of 10 tokens have no room for an image of 16"):
        plan_for("sft", "--student", f"{shapes}/student", "--max_len", "10")


def test_inference_is_measured(checkpoints, tmp_path, capsys, monkeypatch):
    """Of a sparse checkpoint, whose token goes through some of the experts only."""
    from model import Llava
    from moe import sparsify

    student = Llava.from_checkpoint(checkpoints["small"])
    sparsify(student, 4, 1, "all")
    student.save(tmp_path / "sparse")
    rows = {path: bench.infer(str(path), 1, n_new=4) for path in (checkpoints["small"], tmp_path / "sparse")}
    dense, sparse = rows.values()
    assert (
        dense["activated"]
        == dense["parameters"]
        == sum(p.numel() for p in student.parameters()) - 2 * (3 * 3 * 16 * 32 + 4 * 16 + 16)
    )
    assert sparse["parameters"] - sparse["activated"] == 2 * 3 * (3 * 16 * 32)
    eager = hf.AutoModelForImageTextToText.from_pretrained(checkpoints["small"], attn_implementation="eager")
    ids = torch.tensor([[372] * NP + [0] * (dense["prompt_tokens"] - NP)])
    with FlopCounterMode(display=False) as counter:
        eager(input_ids=ids, pixel_values=torch.zeros(1, 3, 16, 16))
    assert dense["TFLOP"] * 1e12 == pytest.approx(counter.get_total_flops())
    assert all(
        row[name] > 0 for row in rows.values() for name in ("prefill_tokens_per_s", "decode_tokens_per_s")
    )
    monkeypatch.setattr(bench, "infer", lambda path, repeats: rows[path])
    bench.main(["infer", "--model", checkpoints["small"]])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == {"bench": "infer", "model": checkpoints["small"]} | dense
    with pytest.raises(InputError, match="add --model CHECKPOINT"):
        bench.main(["infer"])


def test_runs_are_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append((self, path)))
    for run, extra in ("a", {"l_rel": 0.5}), ("deep/b", {"expert_0": 0.3, "expert_1": 0.7}):
        (tmp_path / run).mkdir(parents=True)
        line = {"lr": 1e-3, "tokens_per_s": 10, "loss": 2.0} | extra | {"grad_norm": None}
        (tmp_path / run / "log.jsonl").write_text(
            "".join(json.dumps({"step": s} | line) + "\n" for s in range(3))
        )
    report.main([str(tmp_path), "--picture", str(tmp_path / "new" / "all.png")])
    ((figure, path),) = drawn
    assert str(path) in capsys.readouterr().out
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert set(panels) == {"loss", "l_rel", "grad_norm", "lr", "tokens_per_s", "expert_0", "expert_1"}
    assert [list(line.get_ydata()) for line in panels["loss"].lines] == [[2.0] * 3] * 2
    assert [list(line.get_ydata()) for line in panels["l_rel"].lines] == [[0.5] * 3, []]
    with pytest.raises(InputError, match="no log.jsonl in .*new"):
        report.main([str(tmp_path / "new")])


def test_the_log_of_a_real_run_is_drawn(checkpoints, world, tmp_path):
    from conftest import data_flags

    models = ["--student", checkpoints["small"], "--teacher", checkpoints["large"]]
    dft.main([*models, *data_flags(world, out=tmp_path / "dft", max_steps=2)])
    report.main([str(tmp_path / "dft"), "--picture", str(tmp_path / "runs.png")])
    assert len(log_of(tmp_path / "dft")) == 2
    assert (tmp_path / "runs.png").read_bytes()[:4] == b"\x89PNG"
