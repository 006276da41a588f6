"""Reading and checking what the user brings: data files, samples, images, checkpoints."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import torch
import transformers as hf
from PIL import Image, ImageOps
from torch import nn

from support.flags import InputError

hf.utils.logging.disable_progress_bar()  # the stages have one of their own
hf.utils.logging.set_verbosity_error()  # what matters of loading is checked in `complete`

IMAGE_TOKEN = "<image>"
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def check_sample(where: str, record: object, image_root: str) -> tuple[list[dict], list[str]]:
    """A LLaVA record -> (chat messages, image paths), or an InputError that says what is wrong with it."""
    if not isinstance(record, dict):
        raise InputError(f"{where} is a JSON {type(record).__name__}, not a sample object")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where} has no 'conversations' list of turns")
    messages, n_markers = [], 0
    for k, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise InputError(f"{where}, turn {k}, needs 'from' (human, gpt or system) and 'value' (a string)")
        if not is_text(turn["value"]):
            raise InputError(f"{where}, turn {k}, holds half of a surrogate pair, which is no character")
        talk = [m["role"] for m in messages if m["role"] != "system"]
        if role == "assistant" and not talk and IMAGE_TOKEN not in turn["value"]:
            continue  # as LLaVA-1.5, whose data has conversations that begin with an answer
        if role != ("user", "assistant")[len(talk) % 2] and not (role == "system" and k == 0):
            raise InputError(f"{where}, turn {k}, is '{speaker}': turns go human, gpt, human, gpt, ...")
        *pieces, last = turn["value"].split(IMAGE_TOKEN)
        if pieces and role != "user":
            raise InputError(f"{where}, turn {k}, has {IMAGE_TOKEN}, but only human turns may hold images")
        n_markers += len(pieces)
        text = "".join([*pieces, last]).replace(IMAGE_TOKEN, "").strip()
        content = [{"type": "image"}] * len(pieces) + [{"type": "text", "text": text}]
        messages.append({"role": role, "content": content})
    if not any(m["role"] == "assistant" for m in messages):
        raise InputError(f"{where} has no 'gpt' turn that answers a human one: there is nothing to learn")
    images = check_images(where, record.get("image"), n_markers, image_root)
    return messages, images


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON can hold halves of surrogate pairs."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_pair(where: str, record: object, image_root: str) -> tuple[list[list[dict]], list[str]]:
    """A preference record (`chosen` and `rejected` conversations, as MoD's of RLAIF-V) -> both, images."""
    pair = []
    for key in "chosen", "rejected":
        if not isinstance(record, dict) or not record.get(key):
            raise InputError(f"{where} has no '{key}' conversation: a preference needs both")
        one = {"conversations": record[key], "image": record.get("image")}
        messages, images = check_sample(f"{where}, {key}", one, image_root)
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{where}, {key}, ends without an answer")
        pair.append(messages)
    if pair[0][:-1] != pair[1][:-1]:
        raise InputError(f"{where}: 'chosen' and 'rejected' differ before their last answer; they must not")
    if pair[0] == pair[1]:
        raise InputError(f"{where}: 'chosen' and 'rejected' are the same answer; leave this record out")
    return pair, images


def check_images(where: str, images: object, n_markers: int, image_root: str) -> list[str]:
    """The record's image paths: inside `image_root`, and as many as there are `<image>` markers."""
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(p, str) and p and is_text(p) for p in images):
        raise InputError(f"{where}: 'image' must be a path or a list of paths")
    if len(images) != n_markers:
        raise InputError(f"{where} has {n_markers} {IMAGE_TOKEN} marker(s) and {len(images)} image(s)")
    for path in images:
        inside = os.path.relpath(os.path.normpath(os.path.join(image_root, path)), image_root)
        if os.path.isabs(path) or "\0" in path or inside.startswith(".."):
            raise InputError(f"{where}: image path {path!r} leaves the image folder {image_root}")
    return images


def load_image(where: str, image_root: str, path: str) -> Image.Image:
    """The image as RGB, upright; an InputError names the sample and the file."""
    full = os.path.realpath(os.path.join(image_root, path))
    if not full.startswith(os.path.join(os.path.realpath(image_root), "")):
        raise InputError(
            f"{where}: image {path} leads out of {image_root} by a link; point --images higher or copy it"
        )
    try:
        with Image.open(full) as image:
            if image.width * image.height > (
                Image.MAX_IMAGE_PIXELS or math.inf
            ):  # Pillow warns up to twice that
                raise ValueError(
                    f"{image.width} x {image.height} pixels, Pillow's limit is {Image.MAX_IMAGE_PIXELS}"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{where}: image {full} does not exist") from None
    except Exception as error:  # Pillow raises whatever its decoders do
        raise InputError(f"{where}: image {full} cannot be read ({error})") from None


# ---------------------------------------------------------------------------------- checkpoints


def load_stock(
    path: str, dtype: torch.dtype, weights: bool = True
) -> tuple[hf.LlavaForConditionalGeneration, hf.LlavaProcessor]:
    """Model and processor of a LLaVA-format checkpoint, or an InputError; without weights only its shapes."""
    with loading(f"the checkpoint {path}"):
        config = hf.AutoConfig.from_pretrained(path)
        if config.model_type != "llava":
            raise InputError(f"{path} holds a '{config.model_type}' model: give a LLaVA-format checkpoint")
        if not isinstance(config.vision_feature_layer, int):
            raise InputError(
                f"{path} reads several vision layers {config.vision_feature_layer}; only one is possible"
            )
        if weights:
            llava = complete(path, hf.LlavaForConditionalGeneration, dtype=dtype)
        else:
            with torch.device("meta"):
                llava = hf.LlavaForConditionalGeneration(config)
        return llava, hf.AutoProcessor.from_pretrained(path)


def complete(path: str, kind: type, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """`kind.from_pretrained(path)`, or an InputError if any weight is missing there and would be random."""
    model, report = kind.from_pretrained(
        path, dtype=dtype, output_loading_info=True, use_safetensors=True, **options
    )  # other formats can hold code
    lost = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lost:
        raise InputError(f"{path} lacks {len(lost)} of the model's weights, the first is {lost[0]}")
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
