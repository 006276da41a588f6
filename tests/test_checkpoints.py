"""Checkpoints as people have them: read as meant, or refused by a sentence that says what to do.

python -m pytest tests/test_checkpoints.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import NP, data_flags, new_student, text_config, vision_config
from test_chat import processor_of
from test_model import assert_equal_logits
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma4TextConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    Qwen3Config,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

import dpt
import mod_distill
import moe
import sft
from model import Llava, load_teacher
from support.chat import IMAGE_TOKEN
from support.checkpoints import loading, see_alike
from support.flags import InputError

# ---------------------------------------------------------------------------------- folders


def says(load, path) -> str:
    """The sentence that refuses it."""
    with pytest.raises(InputError) as refused:
        load(str(path))
    sentence = str(refused.value)
    assert len(sentence) < 600 and "\n" not in sentence
    return sentence


def set_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


@pytest.mark.parametrize("path", ["/tmp/nothing/here", "~/models/x", "out/not-there", "not-there"])
def test_a_folder_that_is_not_there(path, parts, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in Llava.from_checkpoint, lambda p: new_student(p, parts["small"]), lambda p: new_student(p, p):
        assert f"{path}: there is no such folder, and as a name of the hub:" in says(load, path)


@pytest.mark.parametrize("change, sentence", [
    ({"file": "adapter_config.json"}, "holds a LoRA adapter: merge it into its model"),
    ({"config": {"quantization_config": {"quant_method": "awq"}}}, "holds quantised weights: give those"),
    ({"config": {"model_type": "llava_llama"}}, "a 'llava_llama' model in a form of its own, .* llava-hf's"),
    ({"config": {"model_type": "bunny-qwen2"}}, "a 'bunny-qwen2' model in a form of its own"),
    ({"config": {"mm_vision_tower": "openai/clip"}}, "in a form of its own, .* llava-hf's, or convert it"),
    ({"bin": True}, "has no weights in model.safetensors; others can hold code .* save_pretrained it"),
    ({"gguf": True}, "is in GGUF, which is for inference: give the model that it was made from"),
    ({"config": {"model_type": "llava_next"}}, "a 'llava_next' model of any resolution, "),
    ({"config": {"model_type": "llava_onevision"}}, "a 'llava_onevision' model of any resolution, "),
    ({"config": {"image_aspect_ratio": "anyres_max_9"}}, "here it is one square: give a checkpoint like"),
    ({"pointer": "model.safetensors"}, "model.safetensors is only a pointer to the file: run `git lfs pull`"),
    ({"pointer": "tokenizer.json"}, "tokenizer.json is only a pointer to the file: run `git lfs pull`"),
])
def test_folders_that_are_no_model_yet(change, sentence, parts, checkpoints, tmp_path):
    """As whole models, as language models, and as towers."""
    loads = {checkpoints["small"]: Llava.from_checkpoint,
             parts["small"]: lambda p: new_student(parts["vision"], p),
             parts["vision"]: lambda p: new_student(p, parts["small"])}
    for k, (source, load) in enumerate(loads.items()):
        folder = Path(shutil.copytree(source, tmp_path / f"{k}"))
        weights = folder / "model.safetensors"
        if "file" in change:
            (folder / change["file"]).write_text("{}")
        if "bin" in change:
            weights.rename(folder / "pytorch_model.bin")
        if "gguf" in change:
            assert load(str(folder))
            weights.rename(folder / "model-Q4_K_M.gguf")
        if "pointer" in change:
            (folder / change["pointer"]).write_text("version https://git-lfs.github.com/spec/v1\noid 0\n")
        set_json(folder / "config.json", **change.get("config", {}))
        said = says(load, folder)
        assert str(folder) in said
        with pytest.raises(AssertionError, match=sentence):
            raise AssertionError(said)


def test_gguf_as_a_file_as_a_name_and_beside_weights_that_are_read(parts, checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints["small"], tmp_path / "it-gguf"))
    (folder / "q4.gguf").write_bytes(b"GGUF")
    assert Llava.from_checkpoint(str(folder))
    for path in folder / "q4.gguf", "Qwen/Qwen2.5-0.5B-Instruct-GGUF":
        for load in Llava.from_checkpoint, lambda p: new_student(parts["vision"], p):
            assert f"{path} is in GGUF" in says(load, path)


def test_the_parts_of_a_quantised_model(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints["small"], tmp_path / "it"))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    set_json(folder / "config.json", text_config=text | {"quantization_config": {"quant_method": "fp8"}})
    assert "quantised weights" in says(Llava.from_checkpoint, folder)


def test_of_a_long_message_the_beginning_is_shown(tmp_path):
    def load(path):
        with loading("--llm", path):
            raise ValueError("a" * 9999)

    assert says(load, tmp_path) == f"cannot load --llm {tmp_path}: " + "a" * 300


# ---------------------------------------------------------------------------------- what a model cannot take


def changed(checkpoints, folder, change) -> str:
    model = Llava.from_checkpoint(checkpoints["small"])
    change(model)
    model.save(folder)
    return folder


def with_tokens(model):
    model.processor.tokenizer.add_tokens([f"<more {k}>" for k in range(100)])


@pytest.mark.parametrize("change, sentence", [
    (with_tokens, "its tokenizer has '<more 99>' as id 472, and its embedding has 448 rows: resize"),
    (lambda m: setattr(m.config, "vision_feature_layer", 7), "vision_feature_layer 7 of a tower of 3 layer"),
    (lambda m: setattr(m.config, "vision_feature_layer", -9), "vision_feature_layer -9 of a tower of 3 lay"),
    (lambda m: setattr(m.processor.tokenizer, "pad_token", IMAGE_TOKEN), "its tokenizer pads with <image>"),
    (lambda m: setattr(m.processor.image_processor, "size", {"height": 8, "width": 32}),
     r"makes \(1, 3, 8, 32\) of an image, and its tower takes \(1, 3, 16, 16\): set size and crop_size"),
    (lambda m: setattr(m.processor, "image_processor",
                       CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)),
     r"makes \(1, 3, 16, 32\) of an image"),
    (lambda m: setattr(m.processor, "image_processor", LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32]])),
     r"makes \(1, 3, 3, 16, 16\) of an image"),
    (lambda m: setattr(m, "processor",
                       LlavaNextProcessor(m.processor.image_processor, m.processor.tokenizer)),
     "has a LlavaNextProcessor, and LLaVA a LlavaProcessor"),
])
def test_what_the_model_would_not_take_is_refused(change, sentence, checkpoints, tmp_path):
    folder = changed(checkpoints, tmp_path, change)
    with pytest.raises(InputError, match=sentence):
        Llava.from_checkpoint(str(folder))


def test_an_image_processor_of_another_size_than_its_tower(parts, tmp_path):
    folder = shutil.copytree(parts["vision"], tmp_path / "it")
    SiglipImageProcessorPil(size={"height": 16, "width": 24}).save_pretrained(folder)
    assert "makes (1, 3, 16, 24) of an image" in says(lambda p: new_student(p, parts["small"]), folder)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_samples_longer_than_the_positions_that_were_learned(who, checkpoints, world, tmp_path):
    short = changed(checkpoints, tmp_path / "it",
                    lambda m: setattr(m.config.text_config, "max_position_embeddings", 64))
    both = {"student": checkpoints["small"], "teacher": checkpoints["large"]} | {who: str(short)}
    argv = ["--student", both["student"], "--teacher", both["teacher"], "--caption_only"]
    flags = lambda most: data_flags(world, out=tmp_path / "out", max_steps=1, max_len=most)
    with pytest.raises(InputError, match="has max_position_embeddings 64, and --max_len is 65: give"):
        dpt.main([*argv, *flags(65)])
    dpt.main([*argv, *flags(64)])


# ---------------------------------------------------------------------------------- towers


def test_towers_of_equal_weights_that_compute_otherwise(checkpoints):
    student, teacher = (Llava.from_checkpoint(checkpoints[name]) for name in ("small", "large"))
    assert see_alike(student, teacher)
    for key, value in ("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5), ("num_attention_heads", 4):
        told = teacher.config.vision_config
        was = getattr(told, key)
        setattr(told, key, value)
        assert not see_alike(student, teacher), key
        setattr(told, key, was)
    teacher.config.vision_feature_layer = -1
    assert not see_alike(student, teacher)


def test_a_teacher_of_another_activation_sees_for_itself(checkpoints, tmp_path):
    quick = lambda m: setattr(m.config.vision_config, "hidden_act", "quick_gelu")
    other = changed(checkpoints, tmp_path, quick)
    student = Llava.from_checkpoint(checkpoints["small"])
    teacher = load_teacher(str(other), student, torch.float32)
    pixels = torch.randn(1, 3, 16, 16)
    assert (teacher.encode_images(pixels) - student.encode_images(pixels)).abs().max() > 1e-3


@pytest.mark.parametrize("change", [{"image_mean": [0.1, 0.2, 0.3]}, {"image_std": [0.2, 0.2, 0.2]}, {}])
def test_a_tower_keeps_its_own_mean_and_std(change, parts, checkpoints, tmp_path):
    """Its teacher's picture may be cut and padded in another way, but not be of other colours."""
    tower = shutil.copytree(parts["vision"], tmp_path / "tower")
    set_json(tower / "preprocessor_config.json", resample=0, **change)
    student = new_student(str(tower), parts["small"], checkpoints["large"])
    own = student.processor.image_processor
    for key, value in change.items():
        assert list(getattr(own, key)) == value
    assert (own.resample == 0) == bool(change)  # the teacher's is 2 or 3


@pytest.mark.parametrize("whole", [True, False])
def test_siglip_2_of_fixed_resolution(whole, parts, tmp_path):
    """Published as model_type siglip, with a text tower beside it and few keys in its config.json."""
    torch.manual_seed(0)
    if whole:
        text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2}
        config = SiglipConfig(text_config=text, vision_config=vision_config().to_dict())
        SiglipModel(config).save_pretrained(tmp_path)
        told = json.loads((tmp_path / "config.json").read_text())
        told["vision_config"].pop("vision_use_head", None)
        (tmp_path / "config.json").write_text(json.dumps(told))
        SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model = new_student(str(tmp_path) if whole else parts["vision"], parts["small"])
    model.save(tmp_path / "out")
    stock, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert_equal_logits(model, stock, AutoProcessor.from_pretrained(tmp_path / "out"))


# ---------------------------------------------------------------------------------- language models


TINY = {"vocab_size": 448, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 371, "pad_token_id": 371}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory, parts, tokenizer) -> Llava:
    """Its heads are wider than its width says, and queries and keys have a norm."""
    folder = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**TINY, head_dim=12, tie_word_embeddings=True))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    new_student(parts["vision"], str(folder)).save(folder / "llava")
    return str(folder / "llava")


def test_qwen3(qwen3):
    stock, report = LlavaForConditionalGeneration.from_pretrained(qwen3, output_loading_info=True)
    assert not any(report.values())
    assert stock.config.text_config.head_dim == 12
    assert_equal_logits(Llava.from_checkpoint(qwen3), stock, AutoProcessor.from_pretrained(qwen3))


def test_a_sparse_qwen3(qwen3, checkpoints, world, tmp_path):
    """Copies of an FFN are that FFN; what d2s leaves is a stock Qwen3-MoE, which goes on learning."""
    model = Llava.from_checkpoint(qwen3)
    ids = torch.tensor([[372] * NP + [5, 6, 7, 8]])
    z = model.encode_images(torch.randn(1, 3, 16, 16))
    want = model(ids, z)
    moe.sparsify(model, 4, 2, "1")
    assert (model(ids, z) - want).abs().max() < 1e-5
    teacher = ["--teacher", checkpoints["large"]]
    flags = lambda out: data_flags(world, out=tmp_path / out, max_steps=2)
    mod_distill.main(["--step", "d2s", "--student", qwen3, *teacher, "--moe_layers", "1", *flags("d2s")])
    path = tmp_path / "d2s"
    stock, report = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not any(report.values())
    assert type(stock.model.language_model).__name__ == "Qwen3MoeModel"
    assert stock.config.text_config.head_dim == 12
    assert stock.config.text_config.architectures == ["Qwen3MoeForCausalLM"]
    assert [hasattr(layer.mlp, "experts") for layer in stock.model.language_model.layers] == [False, True]
    mine = Llava.from_checkpoint(str(path))
    assert moe.is_sparse(mine)
    assert_equal_logits(mine, stock, AutoProcessor.from_pretrained(path))
    sft.main(["--student", str(path), *flags("sft")])


def test_a_qwen3_of_sliding_windows_is_not_made_sparse(qwen3):
    model = Llava.from_checkpoint(qwen3)
    model.config.text_config.use_sliding_window = True
    with pytest.raises(InputError, match="'qwen3' language model cannot be made sparse; .* of equal layers"):
        moe.sparsify(model, 4, 2, "all")


def test_a_language_model_that_needs_exact_rows_of_its_embedding(parts, tokenizer, tmp_path):
    """As Gemma 4's small ones, which look the tokens up again in tables of each layer."""
    config = Gemma4TextConfig(**TINY, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=4,
                              vocab_size_per_layer_input=448, num_kv_shared_layers=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "inputs_embeds" in says(lambda p: new_student(parts["vision"], p), tmp_path)
