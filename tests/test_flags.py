"""Every flag of every stage: its default is the paper's, and it reaches what it names.

Whoever adds a flag adds its default to the table here. What a run does is seen through torch's own hooks on
modules and optimizers, through its log and through what it leaves on disk.
"""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import data_flags, log_of
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ckd
import dft
import dpt
import mod_distill
import sft
from model import Llava
from support.flags import to_argv

SHARED = {
    "epochs": 1, "warmup": 0.03, "weight_decay": 0.0,  # KD §4.1, CKD §4.1, MoD Table 10
    "max_len": 2048,  # MoD Table 10, LLaVA-1.5
    "max_grad_norm": 1.0, "group_by_modality": True,  # LLaVA-1.5 and the trainer that it uses
    "images": ".", "max_steps": 0, "seed": 0, "dtype": "auto", "micro_batch": 4, "workers": 4,
    "gradient_checkpointing": False, "skip_bad": 0, "save_every": 1000, "keep": 2, "resume": None,
    "max_bad_steps": 0, "shard": "none",
}
KD = {  # §4.1
    "alpha": 1.0, "beta": 1.0, "gamma": 0.5, "relation": "matrix", "targets": ["response", "visual"],
    "delta": 1.0, "teacher_dtype": "auto",
}
CKD = KD | {"gamma": 1.0, "relation": "columns"}  # §4.1 and Eq. (6)
NEW = {"vision": None, "llm": None, "student": None, "template": "teacher"}
PRETRAIN = {"lr": 1e-3, "global_batch": 256}  # KD §4.1: 32 on each of 8 GPUs; CKD §4.1
FINETUNE = {"lr": 2e-5, "global_batch": 128}  # KD §4.1: 16 on each of 8 GPUs; CKD §4.1; MoD Table 10
MOD = {  # Eqs. (6) and (7), §4.1, released code
    "teacher": None, "teacher_dtype": "auto", "distill": "response", "kl": 1.0, "ar": 0.0, "experts": 4,
    "top_k": 2, "moe_layers": "every_other", "renormalise": True, "router": "topk", "balance": 0.01,
    "po": "kto", "beta": 0.1,
}
DEFAULTS = {
    "dpt": SHARED | NEW | KD | PRETRAIN | {"teacher": None, "caption_only": True},
    "sft": SHARED | FINETUNE,
    "dft": SHARED | FINETUNE | KD,
    "d2d": SHARED | FINETUNE | MOD,
    "d2s": SHARED | FINETUNE | MOD | {"ar": 1.0},
    "pd": SHARED | FINETUNE | MOD | {"lr": 2e-6},  # MoD A.1
}
SCRIPTS = {"dpt": dpt, "sft": sft, "dft": dft} | dict.fromkeys(("d2d", "d2s", "pd"), mod_distill)


@pytest.mark.parametrize("stage", DEFAULTS)
def test_defaults_are_the_papers(stage):
    given = {"student": "s", "data": ["d"], "out": "o"}
    given |= {} if stage == "sft" else {"teacher": "t"}
    given |= {"step": stage} if stage in ("d2d", "d2s", "pd") else {}
    assert vars(SCRIPTS[stage].parse_args(to_argv(**given))) == DEFAULTS[stage] | given


def test_a_command_line_says_every_value_that_is_not_none():
    assert to_argv(gamma=0, lr=0.0, out="", teacher=None) == ["--gamma", "0", "--lr", "0.0", "--out", ""]
    assert to_argv(resume=False, shuffle=True, targets=[]) == ["--no-resume", "--shuffle", "--targets"]
    assert to_argv(teachers=[0, 1]) == ["--teachers", "0", "1"]


# ---------------------------------------------------------------------------------- what a run does


@contextmanager
def watch():
    """What the student is shown, what the optimizer gets, in which precision both models compute."""
    seen = SimpleNamespace(ids=[], gradients=[], start=None, optimizer=None, attention=[], teacher=set())

    def of_language(module) -> bool:
        name = type(module).__name__
        return name.startswith("Qwen2") and name.endswith("Attention")

    def before(module, inputs):
        if isinstance(module, Llava) and module.training:
            seen.ids.append(inputs[0])

    def after(module, inputs, output):
        if of_language(module) and module.training and torch.is_grad_enabled():
            seen.attention.append(output[0].dtype)
        elif of_language(module) and not module.training:
            seen.teacher.add(module.q_proj.weight.dtype)

    def update(optimizer, *_):
        if seen.start is None:
            seen.optimizer, seen.start = optimizer, [p.detach().double() for p in trained(optimizer)]
        seen.gradients.append([p.grad if p.grad is None else p.grad.double() for p in trained(optimizer)])

    hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after)
    hooks = *hooks, register_optimizer_step_pre_hook(update)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def trained(optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.fixture(scope="module")
def start(tmp_path_factory, world, checkpoints):
    """Run a stage on the tests' small models; returns its folder, its log and what `watch` saw."""
    root = tmp_path_factory.mktemp("flags")
    samples = [s for s in json.loads((world / "train.json").read_text()) if "image" in s]
    pairs = [{"image": s["image"], "chosen": s["conversations"][:2],
              "rejected": [s["conversations"][0], {"from": "gpt", "value": "top left"}]}
             for s in samples[:8]]
    (root / "pairs.json").write_text(json.dumps(pairs))

    def run(stage, *words, **flags):
        given = {"out": root / f"{len(list(root.iterdir()))}-{stage}", "student": checkpoints["small"]}
        given |= {} if stage == "sft" else {"teacher": checkpoints["large"]}
        given |= {"step": stage} if stage in ("d2d", "d2s", "pd") else {}
        given |= {"data": root / "pairs.json", "student": root / "sparse"} if stage == "pd" else {}
        with watch() as seen:
            argv = [*data_flags(world, **(given := given | flags)), *words]
            if "--group_by_modality" in words:
                argv.remove("--no-group_by_modality")
            SCRIPTS[stage].main(argv)
        return SimpleNamespace(out=given["out"], log=log_of(given["out"]), **vars(seen))

    run("d2s", out=root / "sparse", max_steps=1)
    return run


KINDS = ["--targets", "response", "visual", "prompt", "--relation", "columns"]
OF_KD = {"alpha": 0.3, "beta": 0.7, "gamma": 0.2, "delta": 0.4}
LOSS_OF_KD = {"l_res": 0.3, "l_vis": 0.7, "l_rel": 0.2, "l_prompt": 0.4}
# stage: its flags, and the weights that they give to the logged terms
CHANGED = {
    "dpt": ([*KINDS, "--no-caption_only"], OF_KD, {"l_pt": 1} | LOSS_OF_KD),
    "sft": ([], {}, {"l_reg": 1}),
    "dft": (KINDS, OF_KD, {"l_reg": 1} | LOSS_OF_KD),
    "d2d": ([], {"kl": 0.3, "ar": 0.7}, {"l_kl": 0.3, "l_ar": 0.7}),
    "d2s": ([], {"kl": 0.3, "ar": 0.7, "balance": 0.5}, {"l_kl": 0.3, "l_ar": 0.7, "l_bal": 0.5}),
    "pd": ([], {"balance": 0.5}, {"l_po": 1, "l_bal": 0.5}),
}
BETAS = dict.fromkeys(("d2d", "d2s", "pd"), (0.9, 0.98))  # MoD Table 10; else AdamW's own


@pytest.mark.parametrize("stage", CHANGED)
def test_a_run_with_every_number_changed(start, stage):
    words, flags, weights = CHANGED[stage]
    size = 4 if stage == "pd" else 8
    flags = flags | ({} if stage == "sft" else {"teacher_dtype": "bf16"})
    run = start(stage, *words, lr=0.02, warmup=0.5, weight_decay=0.3, max_grad_norm=0.05, epochs=3,
                max_steps=5, global_batch=size, micro_batch=size // 2, **flags)
    assert len(run.log) == 5  # an epoch has three batches, of pairs two
    assert {len(ids) for ids in run.ids} == {4}  # a pair is two rows
    assert set(run.attention) == {torch.float32}
    assert run.teacher == (set() if stage == "sft" else {torch.bfloat16})
    for line in run.log:
        assert line["loss"] == pytest.approx(sum(w * line[term] for term, w in weights.items()), rel=1e-6)
        assert min(line[term] for term in weights) > 1e-6

    rates = [0.02 / 3, 0.04 / 3, 0.02, 0.02, 0.01]  # half of five steps, rounded up, is three; then a cosine
    assert [line["lr"] for line in run.log] == pytest.approx(rates, rel=1e-6)
    for line, gradients in zip(run.log, run.gradients, strict=True):
        norm = sum(g.square().sum() for g in gradients if g is not None).sqrt().item()
        assert norm == pytest.approx(0.05, rel=1e-3)
        assert line["grad_norm"] > 0.055
    b1, b2 = BETAS.get(stage, (0.9, 0.999))
    for k, (p, got) in enumerate(zip(run.start, trained(run.optimizer), strict=True)):
        m = v = 0
        for t, (lr, gradients) in enumerate(zip(rates, run.gradients), 1):
            if (g := gradients[k]) is not None:
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.square()
                p = p * (1 - lr * 0.3) - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + 1e-8)
        assert (got - p).abs().max() < 5e-6, k


@pytest.mark.parametrize("stage", CHANGED)
def test_the_same_batch_twice_gives_the_same_gradient(start, stage):
    """At a rate of 0: no gradient is left over from the step before. In bf16 and with checkpointing."""
    size = 8 if stage == "pd" else 24
    run = start(stage, "--gradient_checkpointing", lr=0, epochs=2, global_batch=size, micro_batch=size,
                dtype="bf16", max_grad_norm=1e6)
    a, b = run.log
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)
    assert a["grad_norm"] > 0.01
    assert a["loss"] == pytest.approx(b["loss"], rel=0.01)
    assert run.attention == [torch.bfloat16] * 8  # two layers, forward and once more backward, in two steps


def test_targets_of_pre_training(start):
    """test_stages.py has those of dft.py."""
    run = start("dpt", "--targets", "response", gamma=0, max_steps=1)
    assert run.log[0]["loss"] == pytest.approx(run.log[0]["l_pt"] + run.log[0]["l_res"], rel=1e-6)


def test_the_shape_of_the_sparse_student(start):
    run = start("d2s", "--no-renormalise", experts=3, top_k=1, moe_layers="1", max_steps=1)
    text = json.loads((run.out / "config.json").read_text())["text_config"]
    shape = [text[key] for key in ("num_experts", "num_experts_per_tok", "mlp_only_layers", "norm_topk_prob")]
    assert shape == [3, 1, [0], False]
    assert [key for key in run.log[0] if key.startswith("expert_")] == ["expert_0", "expert_1", "expert_2"]


def test_what_the_student_is_shown(start, tokenizer, capsys):
    pairs = {"lr": 0, "global_batch": 2, "micro_batch": 2}
    plain, grouped = start("sft", **pairs), start("sft", "--group_by_modality", max_len=30, **pairs)
    assert max(ids.shape[1] for ids in grouped.ids) == 30 < max(ids.shape[1] for ids in plain.ids)
    mixed = lambda run: sum(len(set((ids == 372).any(1).tolist())) == 2 for ids in run.ids)
    assert mixed(plain) > 2  # of 12
    assert mixed(grouped) <= 1  # of what is left over
    assert plain.ids[0].tolist() != start("sft", seed=4, max_steps=1, **pairs).ids[0].tolist()
    captions = start("dpt", lr=0, max_steps=1)
    assert "  of 12 conversations the answers alone are read: --no-caption_only" in capsys.readouterr().out
    assert "ASSISTANT" in tokenizer.decode(plain.ids[0][0])
    assert not any("ASSISTANT" in tokenizer.decode(row) for ids in captions.ids for row in ids)


def test_the_seed_is_that_of_new_weights(start, parts):
    """With all samples in one batch their order does not matter, only the fresh projector or router."""
    whole = {"lr": 0, "global_batch": 24, "micro_batch": 24}
    new = ["--vision", parts["vision"], "--llm", parts["small"]]
    for stage, term, words, more in ("dpt", "l_pt", new, {"student": ""}), ("d2s", "l_bal", [], {}):
        a, b = (start(stage, *words, seed=seed, **whole, **more).log[0][term] for seed in (3, 4))
        assert a != pytest.approx(b, rel=1e-4)


# ---------------------------------------------------------------------------------- the cascade


@pytest.fixture
def cascade(monkeypatch, parts, checkpoints, tmp_path):
    """ckd.py on three teachers: the stages that it calls, each with its flags as the stage reads them."""
    (tmp_path / "middle").symlink_to(checkpoints["large"])
    teachers = [checkpoints["small"], str(tmp_path / "middle"), checkpoints["large"]]
    data = {"pretrain_data": "p.json", "finetune_data": "f.json", "out": str(tmp_path / "out")}
    new = {"vision": parts["vision"], "llm": parts["small"]}

    def called(*words, **flags):
        calls = []
        with monkeypatch.context() as patch:
            for name, stage in ("dpt", dpt), ("sft", sft), ("dft", dft):
                patch.setattr(stage, "main", lambda argv, name=name, stage=stage: calls.append(
                    {"stage": name} | vars(stage.parse_args(argv))))
            ckd.main([*to_argv(teachers=teachers, **data, **new, **flags), *words])
        return calls

    return SimpleNamespace(called=called, teachers=teachers, out=data["out"], new=new)


def rounds(cascade, rows, kd, pretrain, finetune, every):
    """What is expected of the stages: rows are (folder, teacher, start of the student)."""
    calls = []
    for name, teacher, start in rows:
        out = lambda stage, name=name: f"{cascade.out}/{name}/{stage}"
        pre, fine = {"data": ["p.json"]} | pretrain, {"data": ["f.json"]} | finetune
        calls += [
            DEFAULTS["dpt"] | kd | start | {"stage": "dpt", "teacher": teacher} | pre,
            DEFAULTS["sft"] | {"stage": "sft", "student": out("dpt")} | fine,
            DEFAULTS["dft"] | kd | {"stage": "dft", "student": out("sft"), "teacher": teacher} | fine,
        ]
        calls[-3:] = [call | every | {"out": out(call["stage"])} for call in calls[-3:]]
    return calls


def test_the_cascade_by_default(cascade):
    small, middle, large = cascade.teachers
    rows = [("1-small", small, cascade.new), ("2-middle", middle, {"student": f"{cascade.out}/1-small/dft"}),
            ("3-large", large, {"student": f"{cascade.out}/2-middle/dft"})]
    assert cascade.called() == rounds(cascade, rows, CKD, PRETRAIN, FINETUNE, {})


@pytest.mark.parametrize("assistants", [False, True])
def test_top_down_with_every_flag_changed(cascade, parts, assistants):
    """The strongest teaches the one below it, and so on down to the student."""
    kd = OF_KD | {"relation": "matrix", "targets": ["response", "prompt"], "teacher_dtype": "fp32"}
    flags = kd | {"strategy": "top-down", "caption_only": False, "pretrain_lr": 0.1, "finetune_lr": 0.2,
                  "pretrain_batch": 12, "finetune_batch": 6}
    every = {"warmup": 0.1, "weight_decay": 0.2, "max_len": 100, "seed": 7, "micro_batch": 3, "images": "i"}
    small, middle, large = cascade.teachers
    starts = [{"student": middle}, {"student": small}]
    if assistants:
        flags["assistant_llms"] = [parts["small"], parts["large"]]  # of the weakest first, as the teachers
        starts = [{"vision": parts["vision"], "llm": parts[name]} for name in ("large", "small")]
    rows = [("1-middle", large, starts[0]), ("2-small", f"{cascade.out}/1-middle/dft", starts[1]),
            ("3-student", f"{cascade.out}/2-small/dft", cascade.new)]
    pretrain, finetune = {"lr": 0.1, "global_batch": 12}, {"lr": 0.2, "global_batch": 6}
    want = rounds(cascade, rows, kd, pretrain | {"caption_only": False}, finetune, every)
    assert cascade.called(*to_argv(**every), **flags) == want
