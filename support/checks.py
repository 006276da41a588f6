"""Reading and checking what the user brings: samples, images, checkpoints."""

import contextlib
import math
import os
from collections.abc import Iterator

import torch
import transformers as hf
from PIL import Image, ImageOps
from torch import nn

from support.flags import InputError, require

hf.utils.logging.disable_progress_bar()  # the stages have one of their own
hf.utils.logging.set_verbosity_error()  # what matters of loading is checked in `complete`

IMAGE_TOKEN = "<image>"
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
Sample = tuple[list[list[dict]], list[str]]  # conversations, each a list of chat messages; image paths


def check_sample(where: str, record: object, image_root: str, exist: bool = True) -> Sample:
    """A LLaVA record, checked; `exist`: whether its images must."""
    require(isinstance(record, dict), f"{where} is a JSON {type(record).__name__}, not a sample object")
    turns, messages, n_markers = record.get("conversations"), [], 0
    require(isinstance(turns, list) and turns, f"{where} has no 'conversations' list of turns")
    for k, turn in enumerate(turns):
        at, turn = f"{where}, turn {k},", turn if isinstance(turn, dict) else {}
        speaker, text = turn.get("from"), turn.get("value")
        known = isinstance(speaker, str) and speaker in ROLES and isinstance(text, str)
        require(known, f"{at} needs 'from' (human, gpt or system) and 'value' (a string)")
        require(is_text(text), f"{at} holds half of a surrogate pair, which is no character")
        role, talk = ROLES[speaker], [m["role"] for m in messages if m["role"] != "system"]
        if role == "assistant" and not talk and IMAGE_TOKEN not in text:
            continue  # as LLaVA-1.5, whose data has conversations that begin with an answer
        in_turn = role == ("user", "assistant")[len(talk) % 2] or (role == "system" and k == 0)
        require(in_turn, f"{at} is '{speaker}': turns go human, gpt, human, gpt, ...")
        n = text.count(IMAGE_TOKEN)
        require(not n or role == "user", f"{at} has {IMAGE_TOKEN}, but only human turns may hold images")
        while IMAGE_TOKEN in text:  # taking one out may make another: "<im<image>age>"
            text = text.replace(IMAGE_TOKEN, "")
        n_markers += n
        content = [{"type": "image"}] * n + [{"type": "text", "text": text.strip()}]
        messages.append({"role": role, "content": content})
    learned = any(m["role"] == "assistant" for m in messages)
    require(learned, f"{where} has no 'gpt' turn that answers a human one: there is nothing to learn")
    return [messages], check_images(where, record.get("image"), n_markers, image_root, exist)


def check_pair(where: str, record: object, image_root: str, exist: bool = True) -> Sample:
    """A preference record: `chosen` and `rejected` conversations with one `image`, as MoD's of RLAIF-V."""
    pair = []
    for key in "chosen", "rejected":
        there = isinstance(record, dict) and record.get(key)
        require(there, f"{where} has no '{key}' conversation: a preference needs both")
        one = {"conversations": record[key], "image": record.get("image")}
        (messages,), images = check_sample(f"{where}, {key}", one, image_root, exist)
        require(messages[-1]["role"] == "assistant", f"{where}, {key}, ends without an answer")
        pair.append(messages)
    alike = pair[0][:-1] == pair[1][:-1]
    require(alike, f"{where}: 'chosen' and 'rejected' differ before their last answer; they must not")
    same = pair[0] == pair[1]
    require(not same, f"{where}: 'chosen' and 'rejected' are the same answer; leave this record out")
    return pair, images


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON can hold halves of surrogate pairs."""
    return value.encode("utf-8", "replace").decode() == value


def check_images(
    where: str, images: object, n_markers: int, image_root: str, exist: bool = True
) -> list[str]:
    """The record's image paths: inside `image_root`, and as many as there are `<image>` markers."""
    images = [] if images is None else [images] if isinstance(images, str) else images
    paths = isinstance(images, list) and all(isinstance(p, str) and p and is_text(p) for p in images)
    require(paths, f"{where}: 'image' must be a path or a list of paths")
    n = len(images)
    require(n == n_markers, f"{where} has {n_markers} {IMAGE_TOKEN} marker(s) and {n} image(s)")
    for path in images:
        full = os.path.join(image_root, path)
        outside = os.path.relpath(os.path.normpath(full), image_root).startswith("..")
        inside = not (os.path.isabs(path) or "\0" in path or outside)
        require(inside, f"{where}: image path {path!r} leaves the image folder {image_root}")
        require(not exist or os.path.exists(full), f"{where}: image {full} does not exist")
    return images


def load_image(where: str, image_root: str, path: str) -> Image.Image:
    """The image as RGB, upright; an InputError names the sample and the file."""
    full, root = (os.path.realpath(p) for p in (os.path.join(image_root, path), image_root))
    advice = "leads out of it by a link; point --images higher or copy it"
    require(full.startswith(os.path.join(root, "")), f"{where}: image {path} in {image_root} {advice}")
    try:
        with Image.open(full) as image:
            limit = Image.MAX_IMAGE_PIXELS or math.inf  # Pillow only warns up to twice that
            if image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels, Pillow's limit is {limit}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises whatever its decoders do
        raise InputError(f"{where}: image {full} cannot be read ({error})") from None


def load_stock(path: str, dtype: torch.dtype, weights: bool = True) -> tuple[nn.Module, hf.LlavaProcessor]:
    """Model and processor of a LLaVA-format checkpoint, or an InputError; without weights only its shapes."""
    with loading(f"the checkpoint {path}"):
        config = hf.AutoConfig.from_pretrained(path)
        kind = config.model_type
        require(kind == "llava", f"{path} holds a '{kind}' model: give a LLaVA-format checkpoint")
        layer = config.vision_feature_layer
        require(isinstance(layer, int), f"{path} reads several vision layers {layer}; only one is possible")
        with torch.device("cpu" if weights else "meta"):
            model = hf.LlavaForConditionalGeneration
            model = complete(path, model, dtype=dtype) if weights else model(config)
        return model, hf.AutoProcessor.from_pretrained(path)


def complete(path: str, kind: type, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """`kind.from_pretrained(path)`, or an InputError if any weight is missing there and would be random."""
    options |= {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}  # others can hold code
    model, report = kind.from_pretrained(path, **options)
    lost = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
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
