"""What distillation silently depends on: which ids, pixels, layers, samples take part, and their order."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import data_flags, log_of, open_data, turns
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import dft
import dpt
import evaluate
import mod_distill
import sft
from data import LlavaData, schedule
from model import Llava
from support.flags import InputError

STAGES = {  # the script, its flags, and what its log calls the KL of the answers
    "dpt": (dpt, ["--no-caption_only"], "l_res"),
    "dft": (dft, [], "l_res"),
    "d2d": (mod_distill, ["--step", "d2d"], "l_kl"),
}


def kl_of(stage, world, out, student, teacher) -> float:
    """The KL of the answers in one step on all samples at once."""
    script, words, term = STAGES[stage]
    script.main(["--student", str(student), "--teacher", str(teacher), *words,
                 *data_flags(world, out=out, global_batch=24, micro_batch=24)])
    (line,) = log_of(out)
    return line[term]


def kl_by_hand(world, student, teacher) -> float:
    """The same from stock models, each with pixels of its own image processor."""
    log_p = []
    for path in student, teacher:
        data = open_data(world / "train.json", world / "images", AutoProcessor.from_pretrained(path))
        batch = data.collate([data[i] for i in range(24)])
        stock = LlavaForConditionalGeneration.from_pretrained(path)
        pixels = Llava.from_checkpoint(str(path)).normalise(batch.pixel_values)
        with torch.no_grad():
            logits = stock(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                           pixel_values=pixels).logits
        log_p.append(logits[batch.response][:, :448].double().log_softmax(-1))
    log_s, log_t = log_p
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean().item()


def test_ids_that_only_the_student_has_take_no_part(world, checkpoints, tmp_path):
    """The KL is over the 448 ids of both heads: the student's other 64 get no gradient but rounding."""
    student, teacher = checkpoints["large"], checkpoints["small"]
    kl = kl_of("d2d", world, tmp_path / "out", student, teacher)  # whose loss is this alone
    assert kl == pytest.approx(kl_by_hand(world, student, teacher), rel=1e-4)
    name = "language_model.lm_head.weight"
    before, after = (load_file(f"{path}/model.safetensors")[name] for path in (student, tmp_path / "out"))
    assert len(before) == 512
    moved = (after - before).abs() / 0.02  # AdamW's first step is the learning rate for any true gradient
    assert moved[:448].mean() > 0.5
    assert moved[448:].max() < 0.1


@pytest.fixture(scope="module")
def alike(world, checkpoints) -> float:
    """The KL to a teacher that sees as the student does."""
    return kl_by_hand(world, checkpoints["small"], checkpoints["large"])


@pytest.mark.parametrize("what, stage", [(what, stage) for what in ("resample", "crop") for stage in STAGES]
                         + [(what, "dft") for what in ("mean", "layer", "same")])
def test_a_teacher_sees_by_its_own_tower_unless_both_see_alike(
    world, checkpoints, alike, tmp_path, what, stage
):
    """The towers' weights are the same: how an image is prepared and which layer is read decide. The mean is
    subtracted by the model, all else is in the bytes, which must then be the teacher's own.
    """
    student, teacher = checkpoints["small"], Llava.from_checkpoint(checkpoints["large"])
    how = teacher.processor.image_processor
    if what == "mean":
        how.image_mean = [0.9, 0.1, 0.4]
    if what == "resample":
        how.resample = Image.Resampling.NEAREST
    if what == "crop":
        how.size, how.crop_size, how.do_center_crop = {"height": 24, "width": 24}, how.size, True
    if what == "layer":
        teacher.config.vision_feature_layer = 1
    teacher.save(tmp_path / "teacher")
    kl = kl_of(stage, world, tmp_path / "out", student, tmp_path / "teacher")
    assert kl == pytest.approx(kl_by_hand(world, student, tmp_path / "teacher"), rel=1e-4)
    if what != "same":
        assert kl != pytest.approx(alike, rel=1e-3)


def test_a_teacher_whose_image_is_another_id_is_refused(world, checkpoints, tmp_path):
    teacher = Llava.from_checkpoint(checkpoints["large"])
    teacher.config.image_token_index = 99
    teacher.save(tmp_path / "teacher")
    with pytest.raises(InputError, match="<image>") as error:
        kl_of("dft", world, tmp_path / "out", checkpoints["small"], tmp_path / "teacher")
    assert "99" in str(error.value)
    assert "372" in str(error.value)


def test_a_photograph_is_turned_as_its_exif_says(checkpoints, tmp_path):
    picture = Image.effect_noise((24, 40), 90).convert("RGB")
    picture.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # held sideways: to be turned by 90 degrees clockwise
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=exif)
    samples = [{"image": f"{name}.png", "conversations": turns("<image>", "red")} for name in
               ("upright", "sideways")]
    (tmp_path / "d.json").write_text(json.dumps(samples))
    data = open_data(tmp_path / "d.json", tmp_path, AutoProcessor.from_pretrained(checkpoints["small"]))
    a, b = data.collate([data[0], data[1]]).pixel_values
    assert torch.equal(a, b)
    assert not torch.equal(a, a.flip(1))


def test_batches_and_their_order_are_shuffled(checkpoints, tmp_path):
    """64 samples with images, then 64 without, as such files often are."""
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    samples = [{"conversations": turns("is there a cross ?", "yes")} for _ in range(128)]
    samples[:64] = [{"image": "0.png", "conversations": turns("<image>", "red")} for _ in range(64)]
    (tmp_path / "d.json").write_text(json.dumps(samples))
    data = open_data(tmp_path / "d.json", tmp_path, AutoProcessor.from_pretrained(checkpoints["small"]))
    args = {"seed": 0, "epochs": 1, "max_steps": 0, "global_batch": 4, "data": ""}
    steps = schedule(data, SimpleNamespace(**args, group_by_modality=True))
    assert sorted(i for batch in steps for i in batch) == list(range(128))
    assert sum(max(batch) - min(batch) > 16 for batch in steps) > 16  # of 32: not neighbours in the file
    sees = [batch[0] < 64 for batch in steps]
    assert sum(a != b for a, b in zip(sees, sees[1:])) > 8  # not first the ones, then the others
    mixed = schedule(data, SimpleNamespace(**args, group_by_modality=False))
    assert sum(len({i < 64 for i in batch}) == 2 for batch in mixed) > 16


def test_data_processes_prepare_the_samples(world, checkpoints, tmp_path, monkeypatch):
    get, seen = LlavaData.__getitem__, tmp_path / "processes"
    seen.mkdir()
    monkeypatch.setattr(LlavaData, "__getitem__", lambda *a: (seen / f"{os.getpid()}").touch() or get(*a))
    for n in 0, 2:
        flags = data_flags(world, out=tmp_path / str(n), max_steps=1, workers=n, micro_batch=4)
        sft.main(["--student", checkpoints["small"], *flags])
        assert len({path.name for path in seen.iterdir()} - {str(os.getpid())}) == n


def test_an_unreadable_pair_is_not_in_the_mean(world, checkpoints, tmp_path):
    """Nor in KTO's baselines: the losses are those of a run whose data never had it."""
    sparse, images = tmp_path / "sparse", tmp_path / "images"
    shutil.copytree(world / "images", images)
    (images / "8.png").write_bytes(b"\x89PNG broken")
    flags = {"student": checkpoints["small"], "teacher": checkpoints["large"]}
    mod_distill.main(["--step", "d2s", *data_flags(world, out=sparse, max_steps=1, **flags)])
    pairs = [{"image": f"{k}.png", "chosen": turns("<image>", "red"),
              "rejected": turns("<image>", "green " * (1 + k % 3))} for k in (0, 4, 8, 12, 16)]
    lines = []
    for k, kept in enumerate((pairs, pairs[:2] + pairs[3:])):
        (tmp_path / f"{k}.json").write_text(json.dumps(kept))
        flags |= {
            "student": sparse,
            "data": tmp_path / f"{k}.json",
            "out": tmp_path / f"out{k}",
            "skip_bad": 1,
        }
        size = {"global_batch": len(kept), "micro_batch": len(kept), "images": images}
        mod_distill.main(["--step", "pd", *data_flags(world, **flags | size)])
        lines += log_of(tmp_path / f"out{k}")
    for term in "l_po", "margin", "ranked_right", "saturated":
        assert lines[0][term] == pytest.approx(lines[1][term], rel=1e-4), term


def test_the_suffix_is_a_part_of_every_question(world, checkpoints, tmp_path):
    """Given as a flag, with a line break as a shell passes it, or written into the question: one answer."""
    answers = []
    for k, (end, suffix) in enumerate((("", ""), ("", r"\nyes or no ?"), ("\nyes or no ?", ""))):
        lines = [{"text": f"{text}{end}", "image": f"{i}.png", "label": "?"}
                 for i, text in ((0, "is there a red circle ?"), (4, "how many objects"))]
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
        evaluate.main(["--model", checkpoints["small"], "--questions", str(tmp_path / "q.jsonl"), "--images",
                       str(world / "images"), "--suffix", suffix, "--max_new_tokens", "8", "--out",
                       str(tmp_path / str(k))])
        answers.append([json.loads(line)["text"] for line in open(tmp_path / str(k) / "small.jsonl")])
    plain, by_flag, written = answers
    assert by_flag == written
    assert all(a != b for a, b in zip(plain, by_flag))
