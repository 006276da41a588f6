"""Checkpoints: loading what the user names, checking that it can be used, and the names they are saved by."""

import contextlib
from collections.abc import Iterator

import torch
import transformers as hf
from torch import nn

from support import tinyllava
from support.chat import IMAGE_TOKEN, PROBE
from support.flags import InputError, require

hf.utils.logging.disable_progress_bar()  # the stages have one of their own
hf.utils.logging.set_verbosity_error()  # what matters of loading is checked in `complete`


def load_stock(path: str, dtype: torch.dtype, weights: bool = True) -> tuple[nn.Module, hf.LlavaProcessor]:
    """Model and processor of a LLaVA-format checkpoint, or an InputError; without weights only its shapes."""
    with loading(f"the checkpoint {path}"):
        config, processor, how = tinyllava.read(path) or (hf.AutoConfig.from_pretrained(path), None, {})
        kind = config.model_type
        require(kind == "llava", f"{path} holds a '{kind}' model: give a LLaVA-format checkpoint")
        layer = config.vision_feature_layer
        require(isinstance(layer, int), f"{path} reads several vision layers {layer}; only one is possible")
        check_tower(path, config.vision_config)
        processor = processor or hf.AutoProcessor.from_pretrained(path)
        a, b = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), config.image_token_index
        require(a == b, f"{path}: its tokenizer must have {IMAGE_TOKEN} as token {b} of config.json, not {a}")
        # How many tokens an image becomes is the model's to say: older files of processors leave it out.
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(config.vision_config.model_type == "clip_vision_model")
        if weights:
            return complete(path, hf.LlavaForConditionalGeneration, dtype=dtype, **how), processor
        with torch.device("meta"):
            return hf.LlavaForConditionalGeneration(config), processor


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
        how.append((m.processor.image_processor.to_dict(), m.config.vision_feature_select_strategy))
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
    options |= {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}  # others can hold code
    model, report = kind.from_pretrained(path, **options)
    missing = [k for k in report["missing_keys"] if model.state_dict()[k].numel()]  # an empty one may be
    lost = sorted(map(str, [*missing, *report["mismatched_keys"]]))
    require(not lost, f"{path} lacks {len(lost)} of the model's weights, the first is {lost[:1]}")
    return model


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Whatever transformers says when it cannot load something, as one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a missing file, a cut one, shapes that differ: each has a type of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot load {what}: {lines[0]}") from None
