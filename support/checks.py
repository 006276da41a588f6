"""Checking what the user brings: samples of several forms, and their images."""

import contextlib
import os
from typing import NamedTuple

from PIL import Image, ImageOps

from support.chat import IMAGE_TOKEN, turn
from support.flags import InputError, require

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LONGEST = 200  # sides of an image whose ratio is larger are out of proportion


class Sample(NamedTuple):
    """A checked record."""

    conversations: list[list[dict]]  # of chat messages; a preference pair has two
    images: list[str]  # paths below the image folder
    unmarked: bool = False  # whether it has images but no <image>; they go first in the first question


def check_sample(where: str, record: object, image_root: str, exist: bool = True) -> Sample:
    """A LLaVA record (or one with `messages`, `role` and `content`); `exist`: whether its images must."""
    require(isinstance(record, dict), f"{where} is a JSON {type(record).__name__}, not a sample object")
    turns, images = record.get("conversations", record.get("messages")), images_of(where, record)
    keys = f"no 'conversations' list of turns; its keys are {', '.join(map(repr, record)) or 'none'}"
    require(isinstance(turns, list) and turns, f"{where} has {keys}")
    messages, n_markers = [], 0
    for k, one in enumerate(turns):
        at, one = f"{where}, turn {k},", one if isinstance(one, dict) else {}
        speaker, text = one.get("from", one.get("role")), one.get("value", one.get("content"))
        known = isinstance(speaker, str) and speaker.lower() in ROLES and isinstance(text, str)
        require(known, f"{at} needs 'from' (human, gpt or system) and 'value' (a string)")
        require(is_text(text), f"{at} holds half of a surrogate pair, which is no character")
        role, talk = ROLES[speaker.lower()], [m["role"] for m in messages if m["role"] != "system"]
        if role == "assistant" and not talk and not (images and IMAGE_TOKEN in text):
            continue  # as LLaVA-1.5, whose data has conversations that begin with an answer
        in_turn = role == ("user", "assistant")[len(talk) % 2] or (role == "system" and k == 0)
        require(in_turn, f"{at} is '{speaker}': turns go human, gpt, human, gpt, ...")
        n = text.count(IMAGE_TOKEN) if images else 0
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
    """A preference record: `chosen` and `rejected` conversations, or as RLAIF-V a `question` and two strings;
    with one `image`.
    """
    pair, record = [], record if isinstance(record, dict) else {}
    for key in "chosen", "rejected":
        turns = record.get(key)
        require(turns, f"{where} has no '{key}' answer or conversation: a preference needs both")
        if isinstance(turns, str):
            turns = [{"from": "human", "value": record.get("question")}, {"from": "gpt", "value": turns}]
        one = {k: v for k, v in record.items() if k not in ("messages", *pair)} | {"conversations": turns}
        sample = check_sample(f"{where}, {key}", one, image_root, exist)
        whole = len(sample.conversations[0]) == len(turns)
        require(whole, f"{where}, {key}, must begin with a question and end with an answer")
        pair.append(sample.conversations[0])
    alike = pair[0][:-1] == pair[1][:-1]
    require(alike, f"{where}: 'chosen' and 'rejected' differ before their last answer; they must not")
    same = pair[0] == pair[1]
    require(not same, f"{where}: 'chosen' and 'rejected' are the same answer; leave this record out")
    return sample._replace(conversations=pair)


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
    """As many as the `<image>` markers, if there are any. What a data file says stays inside `image_root`;
    links in there are the user's own, and followed.
    """
    counts = f"{n_markers} {IMAGE_TOKEN} marker(s) and {len(images)} image(s)"
    require(n_markers in (0, len(images)), f"{where} has {counts}")
    for path in images:
        full = os.path.normpath(os.path.join(image_root, path))
        outside = os.path.relpath(full, image_root).split(os.sep)[0] == ".."
        inside = not (outside or "\0" in path)
        require(inside, f"{where}: image path {path!r} leaves the image folder {image_root}")
        require(not exist or os.path.exists(full), f"{where}: image {full} does not exist")


def load_image(where: str, image_root: str, path: str) -> Image.Image:
    """The image as RGB, upright, on white where it is transparent; an InputError names sample and file."""
    full = os.path.normpath(os.path.join(image_root, path))  # as it was checked: "link/.." is elsewhere
    try:
        return as_rgb(Image.open(full))
    except Exception as error:  # Pillow raises whatever its decoders do
        raise InputError(f"{where}: image {full} cannot be read ({error})") from None


def as_rgb(image: Image.Image) -> Image.Image:
    with image:
        (short, long), limit = sorted(image.size), Image.MAX_IMAGE_PIXELS or float("inf")
        if short * long > limit:  # Pillow only warns up to twice that
            raise OSError(f"{image.width} x {image.height} pixels, Pillow's limit is {limit}")
        if long > LONGEST * short:  # resized by its short side it would fill the memory
            raise OSError(f"{image.width} x {image.height} pixels are out of proportion")
        image.load()
        with contextlib.suppress(Exception):  # a broken EXIF block says nothing of how it lies
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 0xFFFF):
            raise OSError(f"pixels of mode {image.mode!r} have no known white; save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion cuts them at 255
            image = image.convert("I").point(lambda v: v * (1 / 257) + 0.5).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
