"""Checkpoints: loading what the user names, checking that it can be used, and the names they are saved by."""

import contextlib
import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import torch
import transformers as hf
from PIL import Image
from torch import nn
from transformers.utils import has_file

from support import tinyllava
from support.chat import IMAGE_TOKEN, PROBE
from support.flags import InputError, require

hf.utils.logging.disable_progress_bar()  # the stages have one of their own
hf.utils.logging.set_verbosity_error()  # what matters of loading is checked in `complete`
# Of a tower's config: what decides, beside its weights, how it sees.
KIND = "model_type", "image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps"
kind_of = attrgetter(*KIND)


def load_stock(path: str, dtype: torch.dtype, weights: bool = True) -> tuple[nn.Module, hf.LlavaProcessor]:
    """Model and processor of a LLaVA-format checkpoint, or an InputError; without weights only its shapes."""
    with loading("the checkpoint", path):
        config = read_config(path)
        config, processor, how = tinyllava.read(path) or (config, None, {})
        kind = config.model_type
        require(kind == "llava", f"{path} holds a '{kind}' model: give a LLaVA-format checkpoint")
        layer = config.vision_feature_layer
        require(isinstance(layer, int), f"{path} reads several vision layers {layer}; only one is possible")
        check_tower(path, config.vision_config)
        n = config.vision_config.num_hidden_layers
        require(-n - 1 <= layer <= n, f"{path} has vision_feature_layer {layer} of a tower of {n} layers")
        processor = processor or hf.AutoProcessor.from_pretrained(path, trust_remote_code=False)
        check_processor(path, processor, config)
        # How many tokens an image becomes is the model's to say: older files of processors leave it out.
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(config.vision_config.model_type == "clip_vision_model")
        if weights:
            return complete(path, hf.LlavaForConditionalGeneration, dtype=dtype, **how), processor
        with torch.device("meta"):
            return hf.LlavaForConditionalGeneration(config), processor


def read_config(path: str) -> hf.PretrainedConfig:
    """The config of what transformers can load; of what it cannot, an InputError that says what it needs."""
    for file in (f for f in Path(path).glob("*") if f.is_file() and f.stat().st_size < 1000):
        pointer = file.read_bytes().startswith(b"version https://git-lfs")
        require(not pointer, f"{file} is only a pointer to the file: run `git lfs pull` in its folder")
    gguf = any(Path(path).glob("*.gguf")) and not any(Path(path).glob("*.safetensors"))
    gguf |= path.lower().endswith("gguf") and not os.path.isdir(path)  # a file, or a name of the hub
    require(not gguf, f"{path} is in GGUF, which is for inference: give the model that it was made from")
    adapter = f"{path} holds a LoRA adapter: merge it into its model (merge_and_unload of peft) and save that"
    require(not has_file(path, "adapter_config.json"), adapter)
    given, _ = hf.PretrainedConfig.get_config_dict(path)
    advice = "give those that they were made from, or dequantise them"
    require("quantization_config" not in str(given), f"{path} holds quantised weights: {advice}")
    kind = given.get("model_type")
    if kind == "tinyllava":
        return tinyllava.read_config(path)
    tiles = str(kind).startswith(("llava_next", "llava_onevision"))
    tiles |= "anyres" in str(given.get("image_aspect_ratio"))
    told = f"{path} is a '{kind}' model of any resolution, to which an image is several tiles"
    require(not tiles, f"{told}; here it is one square: give a checkpoint like LLaVA-1.5's")
    stock = kind in hf.CONFIG_MAPPING and "mm_vision_tower" not in given  # that is in the original LLaVA's
    form = f"{path} holds a '{kind}' model in a form of its own, and code of a checkpoint is never run"
    require(stock, f"{form}: give one that transformers knows, of LLaVA as llava-hf's, or convert it")
    return hf.AutoConfig.from_pretrained(path, trust_remote_code=False)


def check_processor(path: str, processor: hf.ProcessorMixin, config: hf.LlavaConfig) -> None:
    """Refuse a processor whose token ids or pixels the model would not take, or would take for others."""
    kind, side = type(processor).__name__, config.vision_config.image_size
    require(kind == "LlavaProcessor", f"{path} has a {kind}, and LLaVA a LlavaProcessor: give another one")
    image, tokenizer = Image.new("RGB", (2 * side, side)), processor.tokenizer
    made = processor.image_processor(image, return_tensors="pt")["pixel_values"].shape
    wrong = f"{path} makes {tuple(made)} of an image, and its tower takes {(1, 3, side, side)}"
    require(made == (1, 3, side, side), f"{wrong}: set size and crop_size of its preprocessor_config.json")
    a, b = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), config.image_token_index
    require(a == b, f"{path}: its tokenizer must have {IMAGE_TOKEN} as token {b} of config.json, not {a}")
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    rows = config.text_config.vocab_size
    wrong = f"{path}: its tokenizer has {token!r} as id {last}, and its embedding has {rows} rows"
    require(last < rows, f"{wrong}: resize the embedding, or take the token out")
    wrong = f"{path}: its tokenizer pads with {IMAGE_TOKEN}, which stands for an image"
    require(tokenizer.pad_token != IMAGE_TOKEN, f"{wrong}: set another pad_token")


def check_positions(max_len: int, *models: nn.Module) -> None:
    """Refuse a --max_len beyond the positions that a language model has learned."""
    for m in models:
        most = getattr(m.config.text_config, "max_position_embeddings", max_len)
        where = f"{m.processor.tokenizer.name_or_path} has max_position_embeddings {most}"
        require(max_len <= most, f"{where}, and --max_len is {max_len}: give --max_len {most} or less")


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that does not see the student's sequence or does not speak its tokens."""
    both = student, teacher
    check_vocabularies(*zip(("the student", "the teacher"), (m.processor.tokenizer for m in both)))
    a, b = (m.config.image_token_index for m in both)
    require(a == b, f"{IMAGE_TOKEN} is token {a} for the student and {b} for the teacher: give another one")
    a, b = (m.n_visual_tokens for m in both)
    require(a == b, f"an image is {a} tokens for the student and {b} for the teacher: give another one")
    a, b = (m.chat.encode(PROBE) for m in both)
    texts = " and ".join(f"{m.chat.render(PROBE)!r} with end token {m.chat.end_id}" for m in both)
    advice = "a new student by dpt.py --vision --llm --teacher takes its teacher's template"
    require(a == b, f"student and teacher write a conversation differently, {texts}; {advice}")


def see_alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models turn an image into the same features Z_v; layers that are not read may differ."""
    how, weights = [], []
    for m in a, b:
        tower, images = kind_of(m.config.vision_config), m.processor.image_processor.to_dict()
        how.append((tower, images, m.config.vision_feature_select_strategy))
        norm = getattr(m.vision_tower, "pre_layrnorm", nn.Identity())  # CLIP's
        seeing = m.vision_tower.embeddings, norm, *m.layers_that_see()
        weights.append([p for part in seeing for p in part.parameters()])
    alike = how[0] == how[1] and len(weights[0]) == len(weights[1])
    return alike and all(torch.equal(p.to(q.dtype), q) for p, q in zip(*weights))


def published_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights by the names of published checkpoints, which all of transformers and vLLM reads."""
    names = {"vision_tower.vision_model": model.vision_tower, "language_model.model": model.language_model,
             "multi_modal_projector": model.multi_modal_projector}
    if not model.config.tie_word_embeddings:
        names["language_model.lm_head"] = model.lm_head
    weights = {f"{name}.{k}": v for name, part in names.items() for k, v in part.state_dict().items()
               if v.numel()}  # vLLM has no place for those of a shared expert of width 0
    for name in [k for k in weights if ".mlp.experts." in k]:  # stacked in memory, published one by one
        stem, kind = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for e, expert in enumerate(weights.pop(name).unbind()):
            for part, weight in zip(parts, expert.chunk(len(parts))):
                weights[f"{stem}.{e}.{part}.weight"] = weight.to("cpu", copy=True)  # memory of its own
    return weights


def check_vocabularies(*models: tuple[str, hf.PreTrainedTokenizerBase]) -> None:
    """Refuse two (name, tokenizer) where an id means two tokens; either may have more than the other."""
    (name, a), (other, b) = ((name, tokenizer.get_vocab()) for name, tokenizer in models)
    ids = {i: token for token, i in b.items()}
    for token, i in a.items():
        theirs, their_id = ids.get(i, token), b.get(token, i)
        differ = f"{token!r} is id {i} for {name} and {their_id} for {other}, where {i} is {theirs!r}"
        require((theirs, their_id) == (token, i), f"student and teacher must share the tokenizer: {differ}")


def check_tower(path: str, config: hf.PretrainedConfig) -> None:
    """Only towers that the model can run layer by layer."""
    kind, known = config.model_type, ("siglip_vision_model", "clip_vision_model")
    require(kind in known, f"{path} has a '{kind}' vision tower; SigLIP's (not NaFlex) and CLIP's work")


def complete(path: str, kind: type, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """`kind.from_pretrained(path)`, or an InputError if any weight is missing there and would be random."""
    safe = any(has_file(path, f"model.safetensors{more}") for more in ("", ".index.json"))
    never = "others can hold code and are never read: load it where you trust it, and save_pretrained it"
    require(safe, f"{path} has no weights in model.safetensors; {never}")
    options |= {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
    model, report = kind.from_pretrained(path, trust_remote_code=False, **options)
    missing = [k for k in report["missing_keys"] if model.state_dict()[k].numel()]  # an empty one may be
    lost = sorted(map(str, [*missing, *report["mismatched_keys"]]))
    require(not lost, f"{path} lacks {len(lost)} of the model's weights, the first is {lost[:1]}")
    return model


@contextlib.contextmanager
def loading(what: str, path: str) -> Iterator[None]:
    """Whatever transformers says when it cannot load something, as one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a missing file, a cut one, shapes that differ: each has a type of its own
        (why, *_) = str(error).strip().splitlines() or [type(error).__name__]
        if "trust_remote_code" in str(error):
            why = "it needs code of its own, which is never run: give one of a kind that transformers knows"
        elif not os.path.isdir(path):
            why = f"there is no such folder, and as a name of the hub: {why}"
        raise InputError(f"cannot load {what} {path}: {why[:300]}") from None
