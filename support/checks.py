"""Checking what the user brings: samples of several forms, and their images."""

import contextlib
import os
from typing import NamedTuple

from PIL import Image, ImageOps

from support.chat import IMAGE_TOKEN, turn
from support.flags import InputError, require

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LONGEST = 200  # ratio of an image's sides: resized by its short side a longer one would fill the memory


class Sample(NamedTuple):
    """A checked record."""

    conversations: list[list[dict]]  # of chat messages; a preference pair has two
    images: list[str]  # paths below the image folder
    unmarked: bool = False  # whether it has images but no <image>; they go first in the first question


def check_sample(where: str, record: object, image_root: str, exist: bool = True) -> Sample:
    """A LLaVA record (or one with `messages`, `role` and `content`); `exist`: whether its images must."""
    require(isinstance(record, dict), f"{where} is a JSON {type(record).__name__}, not a sample object")
    turns, images = record.get("conversations", record.get("messages")), images_of(where, record)
    require(isinstance(turns, list) and turns, f"{where} has no 'conversations' list; it has {[*record]}")
    messages, n_markers = [], 0
    for k, one in enumerate(turns):
        at, one = f"{where}, turn {k},", one if isinstance(one, dict) else {}
        speaker, text = one.get("from", one.get("role")), one.get("value", one.get("content"))
        role, before = ROLES.get(str(speaker).lower()), messages[-1]["role"] if messages else "system"
        told = f"{at} needs 'from' (human, gpt or system) and 'value' (a string)"
        require(role and isinstance(text, str), told)
        require(is_text(text), f"{at} holds half of a surrogate pair, which is no character")
        n = text.count(IMAGE_TOKEN) if images else 0
        if (before, role, n) == ("system", "assistant", 0):
            continue  # as LLaVA-1.5, whose data has conversations that begin with an answer
        in_turn = role == ("assistant" if before == "user" else "user") or (role == "system" and k == 0)
        require(in_turn, f"{at} is '{speaker}': turns go human, gpt, human, gpt, ...")
        require(not n or role == "user", f"{at} has {IMAGE_TOKEN}, but only human turns may hold images")
        n_markers += n
        messages.append(turn(role, without_markers(text, bool(images)).strip(), n))
    answers = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    require(answers, f"{where} has no 'gpt' turn that answers a human one: there is nothing to learn")
    unmarked = bool(images) and not n_markers
    if unmarked:
        question = next(m for m in messages if m["role"] == "user")
        question["content"] = [{"type": "image"}] * len(images) + question["content"]
    check_images(where, images, n_markers, image_root, exist)
    return Sample([messages[: answers[-1] + 1]], images, unmarked)


def check_pair(where: str, record: object, image_root: str, exist: bool = True) -> Sample:
    """A preference record: `chosen`, `rejected`: conversations, or as RLAIF-V answers to a `question`."""
    pair, record = [], record if isinstance(record, dict) else {}
    for key in "chosen", "rejected":
        turns = record.get(key)
        require(turns, f"{where} has no '{key}' answer or conversation: a preference needs both")
        if isinstance(turns, str):
            turns = [{"from": "human", "value": record.get("question")}, {"from": "gpt", "value": turns}]
        one = record | {"conversations": turns}
        (talk,), *images = check_sample(f"{where}, {key}", one, image_root, exist)
        require(len(talk) == len(turns), f"{where}, {key}, must begin with a question and end with an answer")
        pair.append(talk)
    a, b = pair
    require(a[:-1] == b[:-1], f"{where}: 'chosen' and 'rejected' may not differ before their last answer")
    require(a != b, f"{where}: 'chosen' and 'rejected' are the same answer; leave this record out")
    return Sample(pair, *images)


def without_markers(text: str, images: bool) -> str:
    """The text beside images; of text alone, a form of `<image>` that no tokenizer takes for a picture."""
    while images and IMAGE_TOKEN in text:  # taking one out may make another: "<im<image>age>"
        text = text.replace(IMAGE_TOKEN, "")
    return text.replace(IMAGE_TOKEN, "< image>")


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON can hold halves of surrogate pairs."""
    return value.encode("utf-8", "replace").decode() == value


def images_of(where: str, record: dict) -> list[str]:
    """The paths under `image` or `images`: one, a list, or none."""
    films = [key for key in ("video", "videos") if record.get(key)]
    require(not films, f"{where} has {films[:1]}: films cannot be read, give pictures or leave it out")
    given = [record.get(key) or [] for key in ("image", "images")]
    a, b = ([one] if isinstance(one, str) else one for one in given)
    require(not (a and b) or a == b, f"{where} has 'image' {a} and 'images' {b}; give one of them")
    images = a or b
    paths = isinstance(images, list) and all(isinstance(p, str) and p and is_text(p) for p in images)
    require(paths, f"{where}: 'image' must be a path or a list of paths")
    return images


def check_images(where: str, images: list[str], n_markers: int, image_root: str, exist: bool = True) -> None:
    """Paths stay inside `image_root`; links in there are the user's own, and followed."""
    require(n_markers in (0, len(images)), f"{where} has {n_markers} {IMAGE_TOKEN} for {len(images)} images")
    for path in images:
        full = os.path.normpath(os.path.join(image_root, path))
        inside = os.path.relpath(full, image_root).split(os.sep)[0] != ".." and "\0" not in path
        require(inside, f"{where}: image path {path!r} leaves the image folder {image_root}")
        require(not exist or os.path.exists(full), f"{where}: image {full} does not exist")


def load_image(where: str, image_root: str, path: str) -> Image.Image:
    """The image as RGB, upright, on white where it is transparent; an InputError names sample and file."""
    full = os.path.normpath(os.path.join(image_root, path))  # as it was checked: "link/.." is elsewhere
    try:
        with Image.open(full) as image:
            (short, long), limit = sorted(image.size), Image.MAX_IMAGE_PIXELS or float("inf")
            size = f"{image.width} x {image.height} pixels"
            require(short * long <= limit, f"{size}, Pillow's limit is {limit}")  # it warns up to twice that
            require(long <= LONGEST * short, f"{size} are out of proportion")
            image.load()
            with contextlib.suppress(Exception):  # a broken EXIF block says nothing of how it lies
                image = ImageOps.exif_transpose(image)
            known = image.mode != "F" and (image.mode != "I" or image.getextrema()[1] <= 0xFFFF)
            require(known, f"pixels of mode {image.mode!r} have no known white; save it with 8 or 16 bits")
            if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion cuts them at 255
                image = image.convert("I").point(lambda v: v * (1 / 257) + 0.5).convert("L")
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises whatever its decoders do
        raise InputError(f"{where}: image {full} cannot be read ({error})") from None
