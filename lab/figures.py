"""What a table's numbers do not show: which expert serves which kind of token, and what the relation loss
changes. Both look at the first seed's models, on scenes of the training data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import moe
from data import Batch, LlavaData
from lab.world import COLORS, PLACES, SHAPES
from losses import relation_loss, self_correlation
from model import Llava
from support.chunks import gram

N = 300  # samples that are looked at, three of a scene
KINDS = ("image: object", "image: nothing", "colour", "shape", "place", "other words")


def read_batch(model: Llava, world: Path) -> tuple[Batch, list[str]]:
    """The first samples of all data, and the caption of each."""
    files = {"data": str(world / "mixed.json"), "images": str(world / "images")}
    data = LlavaData(argparse.Namespace(**files, skip_bad=0, max_len=128), model)
    records = json.loads((world / "mixed.json").read_text())[:N]
    captions = [records[i - i % 3]["conversations"][1]["value"] for i in range(len(records))]
    return data.collate([data[i] for i in range(len(records))]), captions


def kinds_of(model: Llava, batch: Batch, captions: list[str]) -> torch.Tensor:
    """The number in KINDS of every token (B, T); -1 for padding."""
    tokens = model.processor.tokenizer.convert_ids_to_tokens(range(512))
    words = [(token or "").replace("Ġ", "") for token in tokens]
    places = {word for place in PLACES for word in place.split()}
    of_word = [2 if w in COLORS else 3 if w in SHAPES else 4 if w in places else 5 for w in words]
    kinds = torch.tensor(of_word)[batch.input_ids].masked_fill(batch.attention_mask == 0, -1)
    for row, (caption, visual) in enumerate(zip(captions, batch.visual)):
        there = torch.tensor([place in caption for place in PLACES]).view(2, 2)  # the 2 x 2 grid of cells
        patches = there.repeat_interleave(2, 0).repeat_interleave(2, 1)  # and the 4 x 4 patches that see it
        kinds[row, visual] = (~patches).long().flatten()
    return kinds


@torch.no_grad()
def draw_experts(models: dict[str, str], world: Path, path: Path) -> None:
    """The first sparse layer of every sparse model: what share of a kind's choices each expert is."""
    from matplotlib.figure import Figure

    loaded = {name: Llava.from_checkpoint(model) for name, model in models.items()}
    sparse = {name: model.eval() for name, model in loaded.items() if moe.is_sparse(model)}
    size = (3 * len(sparse) + 1.2, 3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(sparse), sharey=True, squeeze=False)
    for axis, (name, model) in zip(axes.flat, sparse.items()):
        batch, captions = read_batch(model, world)
        moe.prepare(model)
        moe.watch(model, batch.attention_mask)
        model(batch.input_ids, model.encode_images(batch.pixel_values))
        router, kinds = moe.modules(model, moe.Router)[0], kinds_of(model, batch, captions).flatten()
        n = router.num_experts
        chosen = [router.chosen[kinds == k].flatten().bincount(minlength=n) for k in range(6)]
        shares = torch.stack([count / count.sum() for count in chosen])  # (kinds, E)
        axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (k, e), share in zip(torch.cartesian_prod(*map(torch.arange, shares.shape)), shares.flatten()):
            axis.text(e, k, f"{100 * share:.0f}", ha="center", va="center", color="w" if share > 0.6 else "k")
        axis.set(yticks=range(6), yticklabels=KINDS, xticks=range(router.num_experts), xlabel="expert")
        axis.set_title(name, fontsize=9)
    figure.suptitle("percent of a kind's choices that go to each expert, first sparse layer", fontsize=10)
    figure.savefig(path, dpi=110)


@torch.no_grad()
def draw_relations(models: dict[str, str], world: Path, path: Path) -> None:
    """R of Eq. (4) for one scene, divided by its norm, of students and the teacher, which is the last model;
    and L_rel, the mean over the scenes that are looked at.
    """
    from matplotlib.figure import Figure

    found = {}
    for name, checkpoint in models.items():
        model = Llava.from_checkpoint(checkpoint).eval()
        batch, _ = read_batch(model, world)
        z = model.encode_images(batch.pixel_values)
        h = model(batch.input_ids, z)[batch.visual].unflatten(0, z.shape[:2])  # (n, Np, D)
        r = self_correlation(h, gram(model.lm_head.weight, len(model.lm_head.weight)))
        found[name] = r / r.flatten(1).norm(dim=1).view(-1, 1, 1)
    *_, teacher = found.values()
    rows, columns = -(-(len(found) + 1) // 5), min(5, len(found) + 1)
    figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
    scene, *axes = figure.subplots(rows, columns, squeeze=False).flat
    scene.imshow(batch.pixel_values[0].permute(1, 2, 0).numpy())
    scene.set_title("the scene, 4 x 4 patches", fontsize=9)
    for axis, (name, r) in zip(axes, found.items()):
        most = float(teacher[0].abs().max())
        axis.imshow(r[0].numpy(), cmap="RdBu", vmin=-most, vmax=most)
        l_rel = relation_loss(r, teacher, 1 / len(r))
        axis.set_title(f"{name}\nL_rel to the teacher {l_rel:.3f}", fontsize=9)
    for axis in (scene, *axes):
        axis.axis("off")
    figure.suptitle("R of LLaVA-KD's Eq. (4), between the patches", fontsize=10)
    figure.savefig(path, dpi=110)
