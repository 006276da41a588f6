"""The sparse student: gradients, noise and precision of its layers, pairs that cannot be read, its tensors.

What its training steps do as a whole is in test_mod.py.
"""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import data_flags, log_of
from safetensors.torch import load_file, save_file
from test_mod import diverse, pairs

import mod_distill
import moe
from model import Llava
from support.flags import InputError


@pytest.mark.parametrize("top_k, renormalise", [(2, True), (2, False), (1, True)])
def test_gradients_of_a_layer_are_those_of_equation_4(checkpoints, top_k, renormalise):
    """Of x, of every expert, and of the router through the weights r~: against one token after the other."""
    model, *_ = diverse(checkpoints["small"], top_k=top_k, renormalise=renormalise)
    block = model.language_model.layers[0].mlp.double().train()
    experts, router = block.experts, block.gate.weight
    x = torch.randn(1, 13, 16, dtype=torch.float64, requires_grad=True)
    y = []
    for token in x[0]:
        r = torch.softmax(router @ token, 0)
        best = r.topk(top_k).indices.tolist()
        scale = sum(r[i] for i in best) if renormalise else 1
        outs = []
        for i in best:
            gate, up = experts.gate_up_proj[i].chunk(2)
            outs.append(r[i] / scale * (experts.down_proj[i] @ (F.silu(gate @ token) * (up @ token))))
        y.append(sum(outs))
    seed, leaves = torch.randn(13, 16).double(), (x, experts.gate_up_proj, experts.down_proj, router)
    want = torch.autograd.grad((torch.stack(y) * seed).sum(), leaves)
    got = torch.autograd.grad((block(x)[0] * seed).sum(), leaves)
    for a, b in zip(want, got):
        assert torch.allclose(a, b, atol=1e-10)
    assert all(g.abs().max() > 1e-3 for g in want[: 3 if top_k == 1 and renormalise else 4])


def router_of(kind: str, width: int, experts: int) -> moe.Router:
    router = moe.Router(moe.hf.Qwen2MoeConfig(num_experts=experts, num_experts_per_tok=2, hidden_size=width))
    router.kind = kind
    return router.train()


def test_jitter_is_one_percent():
    router, x = router_of("jitter", 8, 8), torch.randn(500, 8)
    router.weight.data = torch.eye(8)  # the scores are x itself, with its noise
    noise = router(x)[0] / x - 1
    assert 0.0095 < noise.abs().max() < 0.0101
    assert noise.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.05)  # uniform


@pytest.mark.parametrize("kind", ["topk", "jitter"])
def test_the_router_scores_in_fp32_under_autocast(kind):
    router, x = router_of(kind, 64, 8), torch.randn(20_000, 64)
    router.weight.data.normal_(std=0.02)
    picked = []
    for bf16 in False, True:
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            scores, kept, _ = router(x)
        assert scores.dtype == kept.dtype == torch.float32
        picked.append(router.chosen)
    assert torch.equal(*picked)


# ---------------------------------------------------------------------------------- pairs that cannot be read


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, checkpoints):
    model = diverse(checkpoints["small"])[0]
    model.save(tmp_path_factory.mktemp("sparse") / "model")
    return str(tmp_path_factory.getbasetemp() / "sparse0/model")


def broken(world, pairs, folder, which):
    """The pairs' images in `folder`, those of the pairs `which` unreadable; and the records."""
    shutil.copytree(world / "images", folder)
    records = json.loads(pairs.read_text())
    for k in which:
        names = records[k]["image"]
        for name in [names] if isinstance(names, str) else names:
            (folder / name).write_bytes(b"broken")
    return records


@pytest.mark.parametrize("po", ["kto", "dpo"])
def test_unreadable_pairs_are_not_in_the_mean(world, checkpoints, sparse, pairs, tmp_path, po):
    records = broken(world, pairs, tmp_path / "images", [0])
    (tmp_path / "less.json").write_text(json.dumps(records[1:]))
    base = ["--step", "pd", "--po", po, "--student", sparse, "--teacher", checkpoints["large"]]
    lines = []
    for name, data, size in ("bad", pairs, 8), ("less", tmp_path / "less.json", 7):
        more = {"data": data, "images": tmp_path / "images", "global_batch": size, "micro_batch": size,
                "balance": 0, "max_steps": 1, "skip_bad": 1}
        mod_distill.main([*base, *data_flags(world, out=tmp_path / name, **more)])
        lines += log_of(tmp_path / name)
    for key in "loss", "l_po", "margin", "saturated", "ranked_right", "grad_norm":
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-4), key


def test_a_batch_without_a_readable_pair_is_a_loss_of_0(world, checkpoints, sparse, pairs, tmp_path):
    broken(world, pairs, tmp_path / "images", range(8))
    for micro in 8, 4:
        more = {
            "data": pairs,
            "images": tmp_path / "images",
            "balance": 0,
            "skip_bad": 8,
            "micro_batch": micro,
        }
        mod_distill.main(["--step", "pd", "--student", sparse, "--teacher", checkpoints["large"],
                          *data_flags(world, out=tmp_path / str(micro), **more)])
        (line,) = log_of(tmp_path / str(micro))
        assert [line[key] for key in ("loss", "l_po", "margin", "ranked_right", "grad_norm")] == [0] * 5


# ---------------------------------------------------------------------------------- tensors on disk


def names(sparse_layers: dict[int, int], tied: bool) -> set[str]:
    """The tensors of a checkpoint of the tests; sparse_layers: how many experts which layer has."""
    both = lambda *stems: [f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias")]
    vision = both("embeddings.patch_embedding", "post_layernorm") + ["embeddings.position_embedding.weight"]
    for i in range(3):
        parts = [*(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]
        vision += both(*(f"encoder.layers.{i}.{p}" for p in [*parts, "layer_norm1", "layer_norm2"]))
    text, ffn = ["embed_tokens.weight", "norm.weight"], ("gate_proj", "up_proj", "down_proj")
    for i in range(2):
        own = [*both(*(f"self_attn.{p}_proj" for p in "qkv")), "self_attn.o_proj.weight",
               "input_layernorm.weight", "post_attention_layernorm.weight"]
        if i in sparse_layers:
            own += [f"mlp.experts.{e}.{p}.weight" for e in range(sparse_layers[i]) for p in ffn]
            own += ["mlp.gate.weight", "mlp.shared_expert_gate.weight"]
        else:
            own += [f"mlp.{p}.weight" for p in ffn]
        text += [f"layers.{i}.{name}" for name in own]
    projector = both("linear_1", "linear_2")
    found = {f"vision_tower.vision_model.{n}" for n in vision} | {f"language_model.model.{n}" for n in text}
    found |= {f"multi_modal_projector.{n}" for n in projector}
    return found if tied else found | {"language_model.lm_head.weight"}


def test_the_names_of_saved_tensors(checkpoints, sparse, tmp_path):
    """As serving tools read them; none is empty, which vLLM would have no place for."""
    assert load_file(f"{checkpoints['large']}/model.safetensors").keys() == names({}, tied=False)
    assert load_file(f"{checkpoints['small']}/model.safetensors").keys() == names({}, tied=True)
    tensors = load_file(f"{sparse}/model.safetensors")
    assert tensors.keys() == names({0: 4, 1: 4}, tied=True)
    assert all(tensor.numel() for tensor in tensors.values())


def test_only_weights_without_elements_may_be_missing(checkpoints, sparse, tmp_path):
    shutil.copytree(sparse, tmp_path / "lacks")
    tensors = load_file(f"{sparse}/model.safetensors")
    del tensors["language_model.model.layers.1.mlp.shared_expert_gate.weight"]
    save_file(tensors, tmp_path / "lacks/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 of the model's weights.*layers.1.mlp.shared_expert_gate"):
        Llava.from_checkpoint(str(tmp_path / "lacks"))
