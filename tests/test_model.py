"""The model here against stock transformers, in both directions."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import NP, llava_config, new_student
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
)

from model import Llava, load_teacher
from support.chat import CHAT_TEMPLATE
from support.checkpoints import check_teacher, see_alike
from support.flags import InputError
from support.run import precision

PROMPTS = ["USER: <image>\nis there a red circle ? ASSISTANT:", "USER: how many ? ASSISTANT:",
           "USER: <image>\n<image>\nwhat color is the object top left ? ASSISTANT:"]


def some_images(n: int) -> list[Image.Image]:
    torch.manual_seed(5)
    return [
        Image.frombytes("RGB", (20, 30), bytes(torch.randint(0, 256, (1800,)).tolist())) for _ in range(n)
    ]


def logits(model: Llava, inputs: dict) -> torch.Tensor:
    features = model.encode_images(inputs["pixel_values"])
    hidden = model(inputs["input_ids"], features)
    return hidden @ model.lm_head.weight.T


def assert_equal_logits(model, stock, processor) -> None:
    inputs = processor(
        images=some_images(3), text=PROMPTS, padding=True, padding_side="right", return_tensors="pt"
    )
    with torch.no_grad():
        ours, theirs = logits(model, inputs), stock(**inputs).logits
    mask = inputs["attention_mask"].bool()
    assert (ours - theirs)[mask].abs().max() <= 1e-4 < 0.1 < theirs[mask].abs().max()


@pytest.mark.parametrize("name", ["small", "large"])
def test_a_saved_checkpoint_loads_in_stock_transformers(checkpoints, name):
    path = checkpoints[name]
    stock, report = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    assert (stock.lm_head.weight is stock.model.language_model.embed_tokens.weight) == (name == "small")
    processor = AutoProcessor.from_pretrained(path)
    assert_equal_logits(Llava.from_checkpoint(path), stock, processor)
    names = set(load_file(f"{path}/model.safetensors"))  # the layout of published checkpoints
    assert "vision_tower.vision_model.embeddings.position_embedding.weight" in names
    assert "language_model.model.embed_tokens.weight" in names
    assert ("language_model.lm_head.weight" in names) == (name == "large")
    text = json.loads(Path(path, "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 10_000.0  # where transformers 4 and others look for it
    assert stock.config.vision_feature_layer == -2
    assert stock.config.vision_feature_select_strategy == "full"
    assert stock.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_a_new_model_computes_what_its_saved_copy_computes(tmp_path, parts):
    """Attention must be causal right after assembly, before anything has gone through a save and a load."""
    model = new_student(parts["vision"], parts["small"])
    inputs = model.processor(images=some_images(1), text=PROMPTS[0], return_tensors="pt")
    with torch.no_grad():
        before = logits(model, inputs)
        model.save(tmp_path)
        after = LlavaForConditionalGeneration.from_pretrained(tmp_path)(**inputs).logits
    assert (before - after).abs().max() < 1e-6 < before.abs().max()


def test_a_stock_checkpoint_loads_here(tmp_path, checkpoints):
    torch.manual_seed(2)
    stock = LlavaForConditionalGeneration(llava_config(width=32)).eval()
    stock.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(checkpoints["small"]).save_pretrained(tmp_path)
    teacher = Llava.from_checkpoint(str(tmp_path))
    assert_equal_logits(teacher, stock, teacher.processor)
    student = Llava.from_checkpoint(checkpoints["small"])
    check_teacher(student, teacher)
    assert not see_alike(student, teacher)  # random towers of different seeds
    teacher.vision_tower.load_state_dict(student.vision_tower.state_dict())
    assert see_alike(student, teacher.to(torch.bfloat16))


def test_a_teacher_is_frozen_and_has_a_tower_only_if_it_sees_otherwise(checkpoints, tmp_path):
    student = Llava.from_checkpoint(checkpoints["small"])

    def load(path, kind):
        return load_teacher(path, student, precision(kind, torch.float32))

    assert load(checkpoints["large"], "auto").lm_head.weight.dtype == torch.float32
    teacher = load(checkpoints["large"], "bf16")
    assert teacher.vision_tower is None
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.lm_head.weight.dtype == torch.bfloat16
    other = Llava.from_checkpoint(checkpoints["large"])
    other.vision_tower.encoder.layers[0].mlp.fc1.weight.data += 1e-3
    other.save(tmp_path)
    assert load(str(tmp_path), "fp32").vision_tower is not None


def test_the_last_layer_and_the_head_are_not_computed(checkpoints):
    model = Llava.from_checkpoint(checkpoints["small"])
    assert not hasattr(model.vision_tower, "head")
    model.vision_tower.encoder.layers[-1] = None  # would fail if it were called
    assert model.encode_images(torch.randn(2, 3, 16, 16)).shape == (2, NP, 16)
    assert model.encode_images(torch.randn(0, 3, 16, 16)).shape == (0, NP, 16)


def test_a_clip_tower_drops_its_class_token(tmp_path, parts):
    config = CLIPVisionConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32,
                              num_hidden_layers=3, num_attention_heads=2)
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(tmp_path / "clip")
    model = new_student(str(tmp_path / "clip"), parts["small"])
    assert model.n_visual_tokens == NP
    assert model.encode_images(torch.randn(1, 3, 16, 16)).shape == (1, NP, 16)
    model.save(tmp_path / "out")
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_equal_logits(model, stock, AutoProcessor.from_pretrained(tmp_path / "out"))


def test_padding_and_neighbours_do_not_change_a_sample(checkpoints):
    model = Llava.from_checkpoint(checkpoints["small"])
    processor, images = model.processor, some_images(3)
    together = processor(images=images, text=PROMPTS, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        both = logits(model, together)
        for k, picked in enumerate((images[:1], None, images[1:])):
            alone = processor(images=picked, text=PROMPTS[k], return_tensors="pt")
            alone.setdefault("pixel_values", torch.zeros(0, 3, 16, 16))
            single = logits(model, alone)[0]
            assert (single - both[k, : len(single)]).abs().max() < 1e-5


def test_without_images_the_projector_gets_a_zero_gradient(checkpoints):
    model = Llava.from_checkpoint(checkpoints["small"]).requires_grad_(True)
    ids = torch.tensor([[1, 2, 3]])
    features = model.encode_images(torch.zeros(0, 3, 16, 16))
    model(ids, features).sum().backward()
    for p in model.multi_modal_projector.parameters():
        assert p.grad is not None
        assert (p.grad == 0).all()


def test_a_vocabulary_without_padding_rows_grows(tmp_path, parts, tokenizer):
    from conftest import text_config
    from transformers import Qwen2ForCausalLM

    Qwen2ForCausalLM(text_config(vocab=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = new_student(parts["vision"], str(tmp_path))
    assert model.config.text_config.vocab_size == 384
    model.save(tmp_path / "out")
    stock, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert_equal_logits(model, stock, AutoProcessor.from_pretrained(tmp_path / "out"))


def test_a_checkpoint_without_some_weight_is_refused(tmp_path, parts, checkpoints):
    """Rather than filled with random numbers."""
    for source, load in ((parts["small"], lambda p: new_student(parts["vision"], p)),
                         (parts["vision"], lambda p: new_student(p, parts["small"])),
                         (checkpoints["small"], Llava.from_checkpoint)):
        folder = tmp_path / Path(source).name
        shutil.copytree(source, folder, dirs_exist_ok=True)
        weights = load_file(folder / "model.safetensors")
        lost = next(name for name in weights if "layers.1" in name)
        del weights[lost]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="lacks 1 of the model's weights"):
            load(str(folder))
        (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
        with pytest.raises(InputError, match="only a pointer to the file"):
            load(str(folder))
        shutil.rmtree(folder)


def test_what_cannot_be_loaded_is_named(tmp_path, parts, checkpoints):
    with pytest.raises(InputError, match="nowhere"):
        Llava.from_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="'qwen2' model"):
        Llava.from_checkpoint(parts["small"])
    with pytest.raises(InputError, match="nowhere"):
        new_student(parts["vision"], str(tmp_path / "nowhere"))
    assert CHAT_TEMPLATE == Llava.from_checkpoint(checkpoints["small"]).processor.tokenizer.chat_template
