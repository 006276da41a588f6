"""LLaVA-MoD: the sparse student, its routing, mimic and preference distillation, what it leaves on disk."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import NP, data_flags, launch, log_of, open_data, turns
from test_stages import changed, first_steps, same_losses, weights
from transformers import AutoProcessor, LlavaForConditionalGeneration

import mod_distill
import moe
from losses import balance_loss, dpo_loss, kl_baseline, kto_loss, routing
from model import Llava
from support import chunks
from support.flags import InputError

# ---------------------------------------------------------------------------------- equations


def test_routing_is_equations_2_and_3():
    r, kept, chosen = routing(torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]]), 2)
    assert r[0].tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert chosen.tolist() == [[2, 1]]
    assert kept[0].tolist() == pytest.approx([5 / 7, 2 / 7])
    assert routing(r.log(), 2, renormalise=False)[1][0].tolist() == pytest.approx([5 / 8, 2 / 8])
    noise = torch.tensor([[9.0, 0.0, 0.0]])  # picks the first expert, but does not weigh it
    r, kept, chosen = routing(r.log(), 1, renormalise=False, noise=noise)
    assert chosen.tolist() == [[0]]
    assert kept.item() == pytest.approx(1 / 8)


def test_gumbel_noise_samples_experts_from_r():
    scores = torch.tensor([math.log(0.2), math.log(0.3), math.log(0.5)]).expand(20_000, 3)
    config = moe.hf.Qwen2MoeConfig(num_experts=3, num_experts_per_tok=1, hidden_size=3)
    router = moe.Router(config).train()
    router.kind, router.weight.data = "rsample", torch.eye(3)
    torch.manual_seed(0)
    router(scores)
    share = torch.bincount(router.chosen.flatten(), minlength=3) / 20_000
    assert share.tolist() == pytest.approx([0.2, 0.3, 0.5], abs=0.01)
    router.eval()(scores)
    assert (router.chosen == 2).all()


def test_balance_loss_by_hand():
    uniform = torch.full((6, 4), 0.25)
    assert balance_loss(uniform, torch.tensor([0.7, 0.1, 0.1, 0.1]), 1 / 6).item() == pytest.approx(1)
    one = torch.tensor([[1.0, 0, 0, 0]]).expand(6, 4)
    assert balance_loss(one, torch.tensor([1.0, 0, 0, 0]), 1 / 6).item() == pytest.approx(4)
    r, load = torch.tensor([[0.6, 0.4], [0.1, 0.9]]), torch.tensor([0.25, 0.75])
    by_hand = 2 * (0.25 * (0.6 * 0.3 + 0.1 * 0.7) + 0.75 * (0.4 * 0.3 + 0.9 * 0.7))
    assert balance_loss(r, load, torch.tensor([0.3, 0.7])).item() == pytest.approx(by_hand)


def test_dpo_by_hand():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 3.0])
    losses = [math.log(1 + math.exp(-0.2)), math.log(1 + math.exp(0.5))]
    assert dpo_loss(chosen, rejected, 0.1, 1 / 2).item() == pytest.approx(sum(losses) / 2)
    assert dpo_loss(chosen, rejected, 0.1, torch.tensor([2.0, 0.0])).item() == pytest.approx(2 * losses[0])
    assert dpo_loss(chosen, chosen, 0.1, 1 / 2).item() == pytest.approx(math.log(2))


def test_kto_by_hand():
    sigma = lambda x: 1 / (1 + math.exp(-x))
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 3.0])
    kl_c, kl_r = kl_baseline(chosen.mean()), kl_baseline(rejected.mean())
    assert (kl_c.item(), kl_r.item()) == (0, 1)  # a mean of -0.5 is no divergence
    pairs = [(1 - sigma(0.1 * (c - 1)) + 1 - sigma(0.1 * (0 - r))) / 2 for c, r in ((1, -1), (-2, 3))]
    assert kto_loss(chosen, rejected, kl_c, kl_r, 0.1, 1 / 2).item() == pytest.approx(sum(pairs) / 2)


def test_the_kto_baseline_has_no_gradient():
    x = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    kto_loss(x[:1], x[1:], kl_baseline(x[0]), kl_baseline(x[1]), 0.3, 1.0).backward()
    s = lambda v: 1 / (1 + math.exp(-v))
    slope = lambda v: 0.3 * s(v) * (1 - s(v)) / 2
    assert x.grad.tolist() == pytest.approx([-slope(0.3 * (0.5 - 2)), slope(0.3 * (0.5 - 2))])


@pytest.mark.parametrize("chunk", [1 << 25, 40])
def test_log_probabilities_of_answers(chunk, monkeypatch):
    """In chunks and with gradients, against full logits."""
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    torch.manual_seed(0)
    h = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(13, 5, dtype=torch.float64)
    y = torch.randint(0, 13, (2, 6))
    rows = torch.tensor([[False, True, True, False, True, False], [True] * 6])
    plain = ((h @ w.T).log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1) * rows).sum(1)
    ours = mod_distill.log_p(SimpleNamespace(response=rows, y=y), (h, w))
    assert torch.allclose(plain, ours, atol=1e-12)
    loss = lambda x: (x.square() * torch.tensor([1, 3])).sum()
    a, b = (torch.autograd.grad(loss(x), h)[0] for x in (plain, ours))
    assert torch.allclose(a, b, atol=1e-10)
    with pytest.raises(InputError, match="freeze the head"):  # whose gradient would need a second pass
        mod_distill.log_p(SimpleNamespace(response=rows, y=y), (h, w.requires_grad_()))


# ---------------------------------------------------------------------------------- the sparse student


def batch_of(path: str, lengths=(9, 5)):
    """Ids with one image each, padded on the right, and features of the tower."""
    model = Llava.from_checkpoint(path)
    torch.manual_seed(2)
    ids = torch.full((2, NP + max(lengths)), 371)
    for row, n in enumerate(lengths):
        ids[row, :NP], ids[row, NP : NP + n] = 372, torch.randint(0, 370, (n,))
    mask = (torch.arange(ids.shape[1]) < NP + torch.tensor(lengths).unsqueeze(1)).long()
    return model, ids, mask, torch.randn(2, NP, 16)


@pytest.mark.parametrize(
    "shape", [(4, 2, "every_other"), (4, 1, "all"), (8, 2, "first_half"), (3, 3, "1"), (2, 1, "0,1")]
)
def test_at_step_0_the_sparse_student_is_the_dense_one(checkpoints, shape):
    dense, ids, mask, z = batch_of(checkpoints["small"])
    want = dense(ids, z) @ dense.lm_head.weight.T
    moe.sparsify(dense, *shape)
    for training in (True, False):
        moe.watch(dense, mask)
        got = dense.train(training)(ids, z) @ dense.lm_head.weight.T
        assert (got - want)[mask.bool()].abs().max() < 1e-5
    sparse = [hasattr(layer.mlp, "experts") for layer in dense.language_model.layers]
    assert sparse == {"every_other": [True, False], "all": [True, True], "first_half": [True, False],
                      "1": [False, True], "0,1": [True, True]}[shape[2]]


def test_as_printed_the_kept_weights_do_not_sum_to_one(checkpoints):
    dense, ids, mask, z = batch_of(checkpoints["small"])
    want = dense(ids, z)
    moe.sparsify(dense, 4, 2, "every_other", renormalise=False)
    assert (dense(ids, z) - want).abs().max() > 1e-2
    assert dense.config.text_config.norm_topk_prob is False


def diverse(path: str, **options) -> tuple:
    """A sparse student whose experts differ."""
    model, ids, mask, z = batch_of(path)
    moe.sparsify(model, **{"experts": 4, "top_k": 2, "layers": "all"} | options)
    torch.manual_seed(5)
    for layer in model.language_model.layers:
        for p in layer.mlp.experts.parameters():
            p.data += 0.3 * torch.randn_like(p)
        layer.mlp.gate.weight.data.normal_()
    return model, ids, mask, z


def test_a_sparse_student_computes_what_its_saved_copy_computes(checkpoints, tmp_path):
    """In memory gate and up are one matrix, and experts are stacked; in the file each has its name."""
    model, ids, mask, _ = diverse(checkpoints["small"])
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model.eval()(ids, model.encode_images(pixels)) @ model.lm_head.weight.T
        model.save(tmp_path)
        stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
        after = stock(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    assert (before - after)[mask.bool()].abs().max() < 1e-4 < 0.1 < before.abs().max()
    saved, experts = weights(tmp_path), model.language_model.layers[1].mlp.experts
    for e in range(4):
        gate, up = experts.gate_up_proj[e].chunk(2)
        for part, weight in ("gate", gate), ("up", up), ("down", experts.down_proj[e]):
            name = f"language_model.model.layers.1.mlp.experts.{e}.{part}_proj.weight"
            assert torch.equal(saved[name], weight), name


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_layer_is_equation_4(checkpoints, renormalise):
    model, ids, *_ = diverse(checkpoints["small"], renormalise=renormalise)
    block = model.language_model.layers[0].mlp.eval()
    x = torch.randn(1, 11, 16)
    got = block(x)[0]
    for n, token in enumerate(x[0]):
        r = torch.softmax(block.gate.weight @ token, 0)
        best = sorted(range(4), key=lambda i: -r[i])[:2]
        scale = sum(r[i] for i in best) if renormalise else 1
        y = torch.zeros(16)
        for i in best:
            gate, up = block.experts.gate_up_proj[i].chunk(2)
            y += r[i] / scale * (block.experts.down_proj[i] @ (F.silu(gate @ token) * (up @ token)))
        assert torch.allclose(got[n], y, atol=1e-4), n


def test_padding_is_not_routed(checkpoints):
    model, ids, mask, z = diverse(checkpoints["small"])
    moe.watch(model.train(), mask)
    h = model(ids, z)
    load = moe.expert_load(model)
    assert load.sum(1).tolist() == [2 * mask.sum()] * 2  # top 2 of both layers
    load = load / load.sum(1, keepdim=True)
    loss = moe.mean_balance_loss(model, load, mask.sum().item())
    real = mask.bool()
    want, shares = [], []
    for router in moe.modules(model, moe.Router):
        r = router.r[real.flatten()]
        top = r.topk(2).indices.flatten().bincount(minlength=4) / (2 * len(r))
        want.append(4 * (top * r.mean(0)).sum())
        shares.append(top)
    assert loss.item() == pytest.approx((sum(want) / 2).item(), rel=1e-5)
    assert torch.allclose(load.float(), torch.stack(shares))
    other = ids.masked_fill(~real, 7)  # whatever stands in the padding, real tokens get the same
    assert torch.equal(model(other, z)[real], h[real])
    block, seen = model.language_model.layers[0].mlp, []
    block.experts.register_forward_hook(lambda _, args, out: seen.append((args[1], out)))
    model(ids, z)
    assert (seen[0][0][~real.flatten()] == 4).all()  # no expert
    assert (seen[0][1][~real.flatten()] == 0).all()


def test_jitter_is_for_training_only(checkpoints):
    model, ids, mask, z = diverse(checkpoints["small"])
    moe.watch(model, mask)
    clean = model.eval()(ids, z)
    for kind in "jitter", "rsample":
        moe.prepare(model, kind)
        moe.watch(model, mask)
        assert torch.equal(model.eval()(ids, z), clean)
        assert not torch.equal(model.train()(ids, z), clean)


# ---------------------------------------------------------------------------------- the steps


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, world):
    """Preference data: two answers for the samples with one turn and an image."""
    samples = json.loads((world / "train.json").read_text())
    records = []
    for k, s in enumerate(s for s in samples if "image" in s and len(s["conversations"]) == 2):
        question, good = (turn["value"] for turn in s["conversations"])
        records.append({"id": k, "image": s["image"], "chosen": turns(question, good),
                        "rejected": turns(question, good + " green cross" * (1 + k % 2))})
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    path.write_text(json.dumps(records[:8]))
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory, world, checkpoints, pairs):
    """D2D -> D2S -> PD in this process; returns the folders."""
    root = tmp_path_factory.mktemp("mod")
    teacher = ["--teacher", checkpoints["large"]]
    for step, student in ("d2d", checkpoints["small"]), ("d2s", root / "d2d"), ("pd", root / "d2s"):
        more = {"data": pairs, "epochs": 2} if step == "pd" else {}
        mod_distill.main(["--step", step, "--student", str(student), *teacher,
                          *data_flags(world, out=root / step, **more)])
    return root


def test_two_ranks_equal_one_process(chain, world, checkpoints, tmp_path):
    """d2d by its command line. d2s and pd, with what is of the joined batch there, are in test_ranks.py."""
    argv = ["--step", "d2d", "--student", checkpoints["small"], "--teacher", checkpoints["large"]]
    launch("mod_distill.py", [*argv, *data_flags(world, out=tmp_path / "d2d", micro_batch=4)])
    same_losses(log_of(chain / "d2d"), log_of(tmp_path / "d2d"))
    a, b = weights(chain / "d2d"), weights(tmp_path / "d2d")
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


def test_what_the_steps_train(chain, checkpoints):
    names = changed(checkpoints["small"], chain / "d2d")
    assert names == {n for n in weights(chain / "d2d") if not n.startswith("vision_tower")}
    before, after = weights(chain / "d2d"), weights(chain / "d2s")
    for name in before:
        if name in after and not name.startswith("multi_modal_projector"):
            assert torch.equal(before[name], after[name]), name
    assert {n for n in before if n not in after} == {
        f"language_model.model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    trained = {n for n in after if ".mlp.experts." in n or n.endswith("mlp.gate.weight")}
    trained |= {n for n in after if n.startswith("multi_modal_projector")}
    assert changed(chain / "d2s", chain / "pd") == trained
    assert len(trained) == 4 * 3 + 1 + 4


def test_experts_diverge(chain):
    after = weights(chain / "d2s")
    experts = [after[f"language_model.model.layers.0.mlp.experts.{e}.gate_proj.weight"] for e in range(4)]
    start = weights(chain / "d2d")["language_model.model.layers.0.mlp.gate_proj.weight"]
    for e, weight in enumerate(experts):
        assert not torch.equal(weight, start)
        for other in experts[:e]:
            assert (weight - other).abs().max() > 1e-3


@pytest.mark.parametrize("step", ["d2s", "pd"])
def test_a_sparse_checkpoint_is_a_stock_one(chain, world, step):
    stock, report = LlavaForConditionalGeneration.from_pretrained(chain / step, output_loading_info=True)
    shared = {f"model.language_model.layers.0.mlp.shared_expert.{part}_proj.weight"
              for part in ("gate", "up", "down")}  # of width 0: they are not in the file
    assert set(report.pop("missing_keys")) == shared
    assert not any(report.values()), report
    assert type(stock.model.language_model).__name__ == "Qwen2MoeModel"
    mine, ids, mask, _ = batch_of(str(chain / step))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want = stock.eval()(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        got = mine.eval()(ids, mine.encode_images(pixels)) @ mine.lm_head.weight.T
        assert (got - want)[mask.bool()].abs().max() < 1e-4
        prompt = ids[:1, : NP + 4]
        text = stock.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6,
                              pixel_values=pixels[:1], do_sample=False, eos_token_id=None)[0]
        greedy = prompt
        for _ in range(6):
            h = mine(greedy, mine.encode_images(pixels[:1]))
            greedy = torch.cat([greedy, (h[:, -1:] @ mine.lm_head.weight.T).argmax(-1)], 1)
    assert text.tolist() == greedy[0].tolist()


def test_the_log_tells_how_experts_and_preferences_fare(chain):
    for line in log_of(chain / "d2s") + log_of(chain / "pd"):
        assert sum(line[f"expert_{e}"] for e in range(4)) == pytest.approx(1)
        assert 1 - 1e-3 < line["l_bal"] <= 4
    for line in log_of(chain / "d2s"):
        assert line["loss"] == pytest.approx(line["l_ar"] + line["l_kl"] + 0.01 * line["l_bal"], rel=1e-6)
    for line in log_of(chain / "d2d"):
        assert line["loss"] == pytest.approx(line["l_kl"], rel=1e-6)
    log = log_of(chain / "pd")
    for line in log:
        assert line["loss"] == pytest.approx(line["l_po"] + 0.01 * line["l_bal"], rel=1e-6)
        assert 0 <= line["ranked_right"] <= 1
        assert 0 <= line["saturated"] <= 1
    assert log[1]["margin"] > log[0]["margin"]


@pytest.mark.parametrize("po", ["kto", "dpo"])
def test_preference_losses_of_the_first_batch(chain, world, checkpoints, pairs, tmp_path, po):
    """Step 0, worked out again with stock models, one answer at a time, sharing no code with the losses."""
    mod_distill.main(["--step", "pd", "--po", po, "--beta", "0.3", "--student", str(chain / "d2s"),
                      "--teacher", checkpoints["large"], "--balance", "0",
                      *data_flags(world, out=tmp_path / po, data=pairs, lr=0, max_steps=1)])
    (line,) = log_of(tmp_path / po)
    models = [
        LlavaForConditionalGeneration.from_pretrained(p).eval() for p in (chain / "d2s", checkpoints["large"])
    ]
    processor = AutoProcessor.from_pretrained(chain / "d2s")
    ratios = {"chosen": [], "rejected": []}
    for record in json.loads(pairs.read_text()):
        from PIL import Image

        names = record["image"] if isinstance(record["image"], list) else [record["image"]]
        images = [Image.open(world / "images" / name).convert("RGB") for name in names]
        for kind, ratio in ratios.items():
            question, answer = (turn["value"] for turn in record[kind])
            question = question.replace("<image>", "").strip()
            text = "USER: " + "<image>\n" * len(images) + f"{question} ASSISTANT: {answer}<|endoftext|>"
            question_only = text[: text.index(" ASSISTANT:") + len(" ASSISTANT:")]
            given = processor(images=images, text=question_only, return_tensors="pt")["input_ids"].shape[1]
            inputs = processor(images=images, text=text, return_tensors="pt")
            ids, sums = inputs["input_ids"][0], []
            for model in models:
                with torch.no_grad():
                    log_p = model(**inputs).logits[0].double().log_softmax(-1)
                sums.append(sum(log_p[k - 1, ids[k]].item() for k in range(given, len(ids))))
            ratio.append(sums[0] - sums[1])
    sigma = lambda x: 1 / (1 + math.exp(-x))
    c, r, n = ratios["chosen"], ratios["rejected"], 8
    if po == "dpo":
        want = sum(-math.log(sigma(0.3 * (a - b))) for a, b in zip(c, r)) / n
    else:
        z_c, z_r = max(0, sum(c) / n), max(0, sum(r) / n)
        want = sum(2 - sigma(0.3 * (a - z_r)) - sigma(0.3 * (z_c - b)) for a, b in zip(c, r)) / n / 2
    assert line["l_po"] == pytest.approx(want, rel=1e-3)
    assert line["margin"] == pytest.approx(0.3 * sum(a - b for a, b in zip(c, r)) / n, rel=1e-3)
    assert line["ranked_right"] == pytest.approx(sum(a > b for a, b in zip(c, r)) / n)


def test_sft_of_the_sparse_student_needs_no_teacher(chain, world, checkpoints, tmp_path):
    flags = data_flags(world, out=tmp_path / "sft", max_steps=1)
    mod_distill.main(["--step", "d2s", "--kl", "0", "--student", str(chain / "d2d"), *flags])
    (line,) = log_of(tmp_path / "sft")
    assert line["l_ar"] == pytest.approx(log_of(chain / "d2s")[0]["l_ar"], rel=1e-5)
    assert line["loss"] == pytest.approx(line["l_ar"] + 0.01 * line["l_bal"], rel=1e-6)


def test_instructions_can_be_distilled_too(chain, world, checkpoints, tmp_path):
    """MoD Table 7; the mean is over both kinds of rows."""
    base = ["--step", "d2d", "--student", checkpoints["small"], "--teacher", checkpoints["large"]]
    mod_distill.main([*base, "--distill", "response+instruction",
                      *data_flags(world, out=tmp_path / "both", max_steps=1)])
    import dft

    dft.main(["--student", checkpoints["small"], "--teacher", checkpoints["large"], "--targets", "response",
              "prompt", *data_flags(world, out=tmp_path / "kd", max_steps=1)])
    (both,), (kd,) = log_of(tmp_path / "both"), log_of(tmp_path / "kd")
    data, steps = first_steps(world, checkpoints["small"])
    batch = data.collate([data[i] for i in steps[0]])
    n_res, n_prompt = batch.response.sum().item(), batch.prompt.sum().item()
    want = (kd["l_res"] * n_res + kd["l_prompt"] * n_prompt) / (n_res + n_prompt)
    assert both["l_kl"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "flags", [["--router", "rsample"], ["--router", "jitter"], ["--gradient_checkpointing"]]
)
def test_routers_and_checkpointing(chain, world, checkpoints, tmp_path, flags):
    argv = ["--step", "d2s", "--student", str(chain / "d2d"), "--teacher", checkpoints["large"], *flags]
    mod_distill.main([*argv, *data_flags(world, out=tmp_path / "out", max_steps=2 * (len(flags) == 2))])
    line, clean = log_of(tmp_path / "out")[0], log_of(chain / "d2s")[0]
    if flags == ["--gradient_checkpointing"]:
        same_losses(log_of(chain / "d2s"), log_of(tmp_path / "out"))
    else:
        assert line["l_bal"] != clean["l_bal"]
        assert line["l_ar"] == pytest.approx(clean["l_ar"], rel=1e-3)  # the experts are still alike


def test_the_balance_loss_is_of_the_experts_that_are_trained(world, checkpoints, tmp_path, monkeypatch):
    """The pass ahead, which counts each expert's tokens, must draw the noise that the training pass draws."""
    given, trained, balance = [], [], mod_distill.mean_balance_loss
    passes, load_teacher = [], mod_distill.load_teacher

    def counted(*args):
        teacher = load_teacher(*args)
        teacher.register_forward_hook(lambda *_: passes.append(1))
        return teacher

    monkeypatch.setattr(mod_distill, "load_teacher", counted)
    monkeypatch.setattr(mod_distill, "mean_balance_loss", lambda student, load, n_tokens: (
        given.append(load), trained.append(moe.expert_load(student)), balance(student, load, n_tokens))[-1])
    argv = ["--step", "d2s", "--student", checkpoints["small"], "--teacher", checkpoints["large"]]
    size = {"global_batch": 4, "micro_batch": 2, "max_steps": 1}
    mod_distill.main([*argv, "--router", "rsample", *data_flags(world, out=tmp_path / "out", **size)])
    assert len(trained) == len(passes) == 2  # and the teacher is not asked ahead: it counts no tokens
    load = sum(trained).double()
    for shares in given:
        assert torch.allclose(shares, load / load.sum(1, keepdim=True))


def test_bf16_is_close_to_fp32(chain, world, checkpoints, pairs, tmp_path):
    for step, student, data in ("d2s", "d2d", world / "train.json"), ("pd", "d2s", pairs):
        argv = ["--step", step, "--student", str(chain / student), "--teacher", checkpoints["large"]]
        mod_distill.main([*argv, "--dtype", "bf16",
                          *data_flags(world, out=tmp_path / step, data=data, max_steps=1)])
        a, b = log_of(chain / step)[0], log_of(tmp_path / step)[0]
        assert a["loss"] == pytest.approx(b["loss"], rel=0.03)
        assert a["loss"] != b["loss"]


# ---------------------------------------------------------------------------------- preference data


def test_a_pair_shares_its_prompt_and_only_the_last_answer_counts(world, checkpoints, tmp_path):
    start = ["<image>\nhow many", "two", "is there a cross ?"]
    record = {"image": "0.png", "chosen": turns(*start, "yes"), "rejected": turns(*start, "top left")}
    (tmp_path / "p.json").write_text(json.dumps([record]))
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    data = open_data(tmp_path / "p.json", world / "images", processor, pairs=True)
    batch = data.collate([data[0]])
    texts = [processor.tokenizer.decode(row[row != -100]) for row in batch.y]
    assert texts == [" yes<|endoftext|>", " top left<|endoftext|>"]
    assert batch.pixel_values.shape[0] == 1
    assert batch.visual.sum(1).tolist() == [NP, NP]


def bad_records():
    good = {"image": "0.png", "chosen": turns("<image>\na", "b"), "rejected": turns("<image>\na", "c")}
    change = lambda **new: {**copy.deepcopy(good), **new}
    yield {k: v for k, v in good.items() if k != "rejected"}, "no 'rejected' answer or conv"
    yield change(chosen=[]), "no 'chosen' answer or conv"
    yield change(rejected=good["chosen"]), "same answer"
    yield change(rejected=turns("<image>\nother", "c")), "differ before their last answer"
    yield change(chosen=turns("<image>\na", "b", "c")), "must begin with a question and end with an answer"
    yield change(chosen="text"), "chosen, turn 0, needs .from."
    yield [1], "no 'chosen'"


@pytest.mark.parametrize("record, message", list(bad_records()))
def test_bad_preference_records(world, checkpoints, tmp_path, record, message):
    (tmp_path / "p.json").write_text(json.dumps([record]))
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    with pytest.raises(InputError, match=message) as error:
        open_data(tmp_path / "p.json", world / "images", processor, pairs=True)
    assert "sample 0" in str(error.value)


# ---------------------------------------------------------------------------------- bad command lines


def bad_commands():
    teacher = ["--teacher", "{large}"]
    yield ["--step", "d2s", "--student", "{d2d}", *teacher, "--top_k", "5"], "--top_k 5 of --experts 4"
    yield ["--step", "d2s", "--student", "{d2s}", *teacher], "sparse already"
    yield ["--step", "d2d", "--student", "{d2s}", *teacher], "sparse already"
    yield ["--step", "pd", "--student", "{d2d}", *teacher], "is dense: --step pd goes on from --step d2s"
    yield ["--step", "d2d", "--student", "{d2d}", *teacher, "--experts", "8"], "--experts is for --step d2s"
    yield ["--step", "d2s", "--student", "{d2d}", *teacher, "--po", "dpo"], "--po is for --step pd"
    yield ["--step", "pd", "--student", "{d2s}", *teacher, "--kl", "2"], "--kl is for --step d2d and d2s"
    yield ["--step", "d2s", "--student", "{d2d}"], "needs --teacher, or --kl 0"
    plain = ["--step", "d2d", "--student", "{d2d}", "--kl", "0", "--ar", "1"]
    yield [*plain, "--distill", "response+instruction"], "no --teacher, --teacher_dtype or --distill"
    yield [*plain, "--teacher_dtype", "bf16"], "no --teacher, --teacher_dtype or --distill"
    yield ["--step", "pd", "--student", "{d2s}"], "needs --teacher"
    yield ["--step", "d2s", "--student", "{d2d}", *teacher, "--moe_layers", "7"], "--moe_layers '7'"
    yield ["--step", "d2s", "--student", "{d2d}", *teacher, "--moe_layers", "odd"], "--moe_layers 'odd'"
    yield ["--step", "pd", "--student", "{d2s}", *teacher], "no 'chosen' answer or conv"  # of LLaVA's data


@pytest.mark.parametrize("argv, message", list(bad_commands()))
def test_bad_command_lines_stop_before_training(chain, world, checkpoints, tmp_path, capsys, argv, message):
    places = {"large": checkpoints["large"], "d2d": chain / "d2d", "d2s": chain / "d2s"}
    argv = [item.format(**places) for item in argv] + data_flags(world, out=tmp_path / "out")
    with pytest.raises((InputError, SystemExit)) as error:
        mod_distill.main(argv)
    assert message in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_routers_do_not_keep_what_a_checkpoint_computes_again(checkpoints):
    """The second forward pass, in the backward pass, leaves the first one's routing values alone."""
    model, ids, mask, z = diverse(checkpoints["small"])
    model.train().language_model.activation_checkpointing_enable({"use_reentrant": False})
    moe.watch(model, mask)
    h, calls = model(ids, z), []
    kept = [router.r for router in moe.modules(model, moe.Router)]
    for router in moe.modules(model, moe.Router):
        router.register_forward_hook(lambda *_: calls.append(1))
    load = moe.expert_load(model).double()
    load = load / load.sum(1, keepdim=True)
    loss = h.square().mean() + moe.mean_balance_loss(model, load, mask.sum().item())
    moe.unwatch(model)
    loss.backward()
    assert len(calls) == len(kept) == 2
    assert all(router.r is r for router, r in zip(moe.modules(model, moe.Router), kept))
    assert all(router.weight.grad.abs().sum() > 0 for router in moe.modules(model, moe.Router))
