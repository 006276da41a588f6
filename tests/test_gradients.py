"""What a stage hands to its optimizer in step 0, against autograd on the full logits of two stock models.

The losses are written out anew from the papers, one sample at a time; no code is shared with the stages but
that which reads the tokens. The batch has text alone, several turns and two images, in two micro-batches.
"""

import json
from collections import defaultdict

import pytest
import torch
from conftest import NP, data_flags, open_data, turns
from PIL import Image
from test_mod import diverse
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoProcessor, LlavaForConditionalGeneration

import dft
import dpt
import mod_distill
import sft
from model import Llava

IMAGE = 372
KD = "--targets response visual prompt --alpha 0.3 --beta 0.7 --gamma 2 --delta 0.4".split()
PD = "--step pd --beta 0.05 --balance 0.5".split()
# stage: its script, student, teacher and flags
STAGES = {
    "dpt": (dpt, "small", "large", ["--no-caption_only", *KD]),
    "sft": (sft, "large", None, []),
    "dft": (dft, "small", "large", KD),
    "dft, columns": (dft, "large", "small", [*KD, "--relation", "columns"]),
    "d2d": (mod_distill, "small", "large",
            "--step d2d --distill response+instruction --ar 0.7 --kl 0.3".split()),
    "d2s": (mod_distill, "small", "large",
            "--step d2s --ar 0.7 --kl 0.3 --balance 0.5 --no-renormalise".split()),
    "pd": (mod_distill, "sparse", "large", PD),
    "pd, dpo": (mod_distill, "sparse", "large", [*PD, "--po", "dpo"]),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory, world, checkpoints) -> dict[str, str]:
    """Students, a sparse one with experts that differ, teachers that prepare images otherwise, and data."""
    root = tmp_path_factory.mktemp("gradients")
    for name, path in checkpoints.items():
        teacher = Llava.from_checkpoint(path)
        how = teacher.processor.image_processor
        how.resample, how.image_mean = Image.Resampling.NEAREST, [0.4, 0.5, 0.6]
        teacher.save(root / f"{name}-teacher")
    diverse(checkpoints["small"])[0].save(root / "sparse")
    samples = json.loads((world / "train.json").read_text())[:4]
    pairs = []
    for sample in samples[2:4] + samples[:1] + samples[2:3]:
        question, answer = (turn["value"] for turn in sample["conversations"][:2])
        pairs.append({"image": sample["image"], "chosen": turns(question, answer),
                      "rejected": turns(question, "top left cross " + "red " * len(pairs))})
    for name, records in ("samples", samples), ("pairs", pairs):
        (root / f"{name}.json").write_text(json.dumps(records))
    files = "small-teacher", "large-teacher", "sparse", "samples.json", "pairs.json"
    return checkpoints | {name: str(root / name) for name in files}


def gradients_of(script, argv: list[str], monkeypatch) -> tuple[Llava, dict[str, torch.Tensor]]:
    """The student of a run and the gradients of its first step, by name, as the optimizer gets them."""
    students, seen = [], []
    monkeypatch.setattr(script, "save_student", lambda run, student: students.append(student))
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(
        {id(p): p.grad.double() for group in optimizer.param_groups for p in group["params"]}))
    try:
        script.main(argv)
    finally:
        hook.remove()
    (student,), (grads,) = students, seen
    named = {name: grads.pop(id(p)) for name, p in student.named_parameters() if id(p) in grads}
    assert not grads
    return student, named


def read(path: str, world, student: str, teacher: str, pairs: bool):
    """Of every sequence: ids and y (T,), the student's pixels and the teacher's; chosen answers first."""
    processors = [AutoProcessor.from_pretrained(p) for p in (student, teacher)]
    data = open_data(path, world / "images", processors[0], pairs=pairs)
    sequences = []
    for i, record in enumerate(json.loads(open(path).read())):
        names = record.get("image", [])
        names = [names] if isinstance(names, str) else names
        images = [Image.open(world / "images" / name).convert("RGB") for name in names]
        pixels = [p.image_processor(images, return_tensors="pt") if images else {} for p in processors]
        sequences.append([(torch.tensor(ids), y, *pixels) for ids, y in data[i]["rows"]])
    return [sequence for kind in zip(*sequences) for sequence in kind]


def terms_of(student, teacher, sequences) -> dict[str, list[torch.Tensor]]:
    """The value of every row (image, answer) that the papers' losses are sums of."""
    terms = defaultdict(list)
    for ids, y, *pixels in sequences:
        with torch.no_grad():
            t = teacher(input_ids=ids[None], **pixels[1]).logits[0].double()
        s = student(input_ids=ids[None], **pixels[0]).logits[0].double()
        v, log_s, log_t = min(s.shape[1], t.shape[1]), s.log_softmax(-1), t.log_softmax(-1)
        p_s, p_t = s[:, :v].softmax(-1), t[:, :v].softmax(-1)
        kl, visual, ratio = (p_t * (p_t / p_s).log()).sum(-1), (ids == IMAGE).tolist(), 0
        for k in range(len(ids)):
            if y[k] != -100:
                terms["ar"].append(-log_s[k, y[k]])
                terms["response"].append(kl[k])
                ratio = ratio + log_s[k, y[k]] - log_t[k, y[k]]
            elif visual[k]:
                terms["visual"].append(kl[k])
            elif k + 1 < len(ids) and not visual[k + 1]:
                terms["prompt"].append(kl[k])
        terms["ratio"].append(ratio)
        at = [k for k in range(len(ids)) if visual[k]]
        for first in range(0, len(at), NP):
            r_s, r_t = (x[at[first : first + NP], :v] @ x[at[first : first + NP], :v].T for x in (s, t))
            terms["matrix"].append(1 - (r_s * r_t).sum() / (r_s.norm() * r_t.norm()))
            cosines = [r_s[:, j] @ r_t[:, j] / (r_s[:, j].norm() * r_t[:, j].norm()) for j in range(NP)]
            terms["columns"].append(1 - sum(cosines) / NP)
    return terms


def balance(inputs: dict[torch.nn.Module, list[torch.Tensor]]) -> torch.Tensor:
    """The mean over layers of E sum_i f_i P_i, of what was fed to each layer's router."""
    losses = []
    for router, xs in inputs.items():
        r = (torch.cat(xs) @ router.weight.T).double().softmax(-1)  # (tokens, 4)
        share = r.topk(2).indices.flatten().bincount(minlength=4) / (2 * len(r))
        losses.append(4 * (share * r.mean(0)).sum())
    return sum(losses) / len(losses)


def loss_by_hand(stage: str, terms: dict[str, list[torch.Tensor]], inputs) -> torch.Tensor:
    mean = lambda *names: torch.stack([value for name in names for value in terms[name]]).mean()
    if stage == "sft":
        return mean("ar")
    if stage == "d2d":
        return 0.7 * mean("ar") + 0.3 * mean("response", "prompt")
    if stage == "d2s":
        return 0.7 * mean("ar") + 0.3 * mean("response") + 0.5 * balance(inputs)
    if stage.startswith("d"):
        relation = mean("columns" if "columns" in stage else "matrix")
        mimic = 0.3 * mean("response") + 0.7 * mean("visual") + 0.4 * mean("prompt")
        return mean("ar") + mimic + 2 * relation
    chosen, rejected = torch.stack(terms["ratio"]).chunk(2)
    sigma = lambda x: 1 / (1 + (-0.05 * x).exp())
    if "dpo" in stage:
        return -sigma(chosen - rejected).log().mean() + 0.5 * balance(inputs)
    z_chosen, z_rejected = (max(x.mean().item(), 0) for x in (chosen, rejected))
    assert z_chosen or z_rejected
    kto = (1 - sigma(chosen - z_rejected) + 1 - sigma(z_chosen - rejected)) / 2
    return kto.mean() + 0.5 * balance(inputs)


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradients_of_step_0_are_those_of_the_papers_losses(world, paths, tmp_path, monkeypatch, stage):
    script, student, teacher, flags = STAGES[stage]
    pairs, seeing = stage.startswith("pd"), paths[f"{teacher or 'small'}-teacher"]
    data = paths["pairs.json" if pairs else "samples.json"]
    given = {"student": paths[student], "data": data, "out": tmp_path / "out"}
    given |= {"teacher": seeing} if teacher else {}
    size = {"global_batch": 4, "micro_batch": 2, "lr": 0, "max_grad_norm": 0}
    trained, got = gradients_of(script, [*flags, *data_flags(world, **given, **size)], monkeypatch)
    trained.save(tmp_path / "saved")  # as it was in step 0: the rate is 0

    stock, other = (LlavaForConditionalGeneration.from_pretrained(p) for p in (tmp_path / "saved", seeing))
    inputs = defaultdict(list)
    for name, module in stock.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda router, x, _: inputs[router].append(x[0].flatten(0, -2)))
    terms = terms_of(stock, other, read(data, world, paths[student], seeing, pairs))
    loss_by_hand(stage, terms, inputs).backward()
    want = {name.removeprefix("model."): p.grad for name, p in stock.named_parameters()}
    parts = {"dpt": ("projector",), "d2s": ("projector", "mlp.experts.", "mlp.gate.")}
    parts = parts.get("d2s" if pairs else stage, ("projector", "language_model", "lm_head"))
    assert got.keys() == {name for name in want if any(part in name for part in parts)}
    for name, grad in got.items():
        assert want[name].norm() > 1e-6, name
        assert (grad - want[name]).norm() <= 1e-4 * want[name].norm(), name
