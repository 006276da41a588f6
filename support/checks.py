"""Checking what the user brings: samples of several forms, and their images."""

import contextlib
import os
import re
from typing import NamedTuple

from PIL import Image, ImageOps

from support.chat import IMAGE_TOKEN, turn
from support.flags import InputError, require

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
MARKS = "weight", "loss", "loss_mask", "loss_scale", "train", "training"  # of a turn: 0 if it is not learned
# Keys of a sample or a turn that mean something and are not read, and pictures' keys. All others are notes.
UNREAD = ("video videos audio audios history tools tool_calls function_call reasoning reasoning_content "
          "thinking system_prompt mask train_detail rejected_response rejected_conversations").split()
PICTURES = re.compile(r"(?!images?$).*(?i:image|img|picture|photo|pixel|video|media|file_?name|\bpics?\b)")
FILMS = ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"
LONGEST = 200  # ratio of an image's sides: resized by its short side a longer one would fill the memory


class Sample(NamedTuple):
    """A checked record."""

    conversations: list[list[dict]]  # of chat messages; a preference pair has two
    images: list[str]  # paths below the image folder
    unmarked: bool = False  # whether it has images but no <image>; they go first in the first question


def check_sample(where: str, record: object, image_root: str, exist: bool = True) -> Sample:
    """A LLaVA record (or one with `messages`, `role` and `content`); `exist`: whether its images must."""
    require(isinstance(record, dict), f"{where} is a JSON {type(record).__name__}, not a sample object")
    turns, other = record.get("conversations"), record.get("messages")
    require(not (turns and other) or turns == other, f"{where} has 'conversations' and 'messages'; give one")
    turns, images, has = turns or other, images_of(where, record), str([*record])[:200]
    require(isinstance(turns, list) and turns, f"{where} has no 'conversations' list; it has {has}")
    marks = record.get("loss_mask")
    marks = [None] * len(turns) if marks in (None, []) else marks
    each = isinstance(marks, list) and len(marks) == len(turns)
    require(each, f"{where}: 'loss_mask' must be a list of 0 or 1, one for each of its {len(turns)} turns")
    of_all = [record[key] for key in MARKS if key != "loss_mask" and record.get(key) not in (None, 1)]
    require(not of_all, f"{where} is marked {str(of_all)[:200]} as a whole: leave it out or mark its answers")
    if system := record.get("system"):
        turns, marks = [{"from": "system", "value": system}, *turns], [None, *marks]
    messages, n_markers = [], 0
    for k, (one, mark) in enumerate(zip(turns, marks)):
        at, one = f"{where}, turn {k},", one if isinstance(one, dict) else {}
        speaker, text = one.get("from", one.get("role")), one.get("value", one.get("content"))
        role, before = ROLES.get(str(speaker).lower()), messages[-1]["role"] if messages else "system"
        told = f"{at} needs 'from' (human, gpt or system) and 'value' (a string, with <image> for a picture)"
        require(role and isinstance(text, str), told)
        require(is_text(text), f"{at} holds half of a surrogate pair, which is no character")
        require(not images_of(at, one), f"{at} names a picture; name it under 'image' of the sample")
        given = [m for m in (mark, *map(one.get, MARKS)) if m is not None]
        plain = all(m in (0, 1) for m in given) and (role == "assistant" or not any(given))
        require(plain, f"{at} is marked {str(given)[:200]}; read is 0: not learned, or 1: an answer that is")
        n = text.count(IMAGE_TOKEN) if images or role == "user" else 0
        require(images or not n, f"{at} has {IMAGE_TOKEN}, but no 'image' is read; the mere word is < image>")
        if (before, role, n) == ("system", "assistant", 0):
            continue  # as LLaVA-1.5, whose data has conversations that begin with an answer
        in_turn = role == ("assistant" if before == "user" else "user") or (role == "system" and k == 0)
        require(in_turn, f"{at} is '{speaker}': turns go human, gpt, human, gpt, ...")
        require(not n or role == "user", f"{at} has {IMAGE_TOKEN}, but only human turns may hold images")
        n_markers += n
        messages.append(turn(role, without_markers(text, bool(images)).strip(), n, all(given)))
    answers = [k for k, m in enumerate(messages) if m["learned"]]
    require(answers, f"{where} has no 'gpt' turn that answers a human one and is learned: nothing to learn")
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
        turns, asked = record.get(key), record.get("question") or record.get("prompt")
        has = f"it has {str([*record])[:200]}; wanted is a conversation, or a text that answers a 'question'"
        known = turns and isinstance(turns, str | list)
        require(known, f"{where} has no '{key}' answer or conversation: {has}")
        if isinstance(turns, str):
            turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": turns}]
        one = record | {"conversations": turns, "messages": None}
        (talk,), *images = check_sample(f"{where}, {key}", one, image_root, exist)
        whole = len(talk) == len(turns) + bool(record.get("system"))
        require(whole, f"{where}, {key}, must begin with a question and end with an answer")
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
    unread = [key for key in UNREAD if record.get(key)]
    advice = "write it into the turns (films as pictures into 'image'), or leave it out"
    require(not unread, f"{where} has {unread}, which is not read: {advice}")
    given = [record.get(key) or [] for key in ("image", "images")]
    a, b = ([one] if isinstance(one, str) else [] if one == [None] else one for one in given)
    require(not (a and b) or a == b, f"{where} has 'image' and 'images', {str([a, b])[:200]}; give one")
    images = a or b
    paths = isinstance(images, list) and all(isinstance(p, str) and p and is_text(p) for p in images)
    require(paths, f"{where}: 'image' must be a path or a list of paths: write pictures into files")
    named = [k for k, v in record.items() if v and isinstance(v, str | list | dict) and PICTURES.match(k)]
    blind = f"{where} has {str(named)[:200]}, but pictures are read from 'image': name them there"
    require(images or not named, blind)
    return images


def check_images(where: str, images: list[str], n_markers: int, image_root: str, exist: bool = True) -> None:
    """Paths stay inside `image_root`; links in there are the user's own, and followed."""
    require(n_markers in (0, len(images)), f"{where} has {n_markers} {IMAGE_TOKEN} for {len(images)} images")
    for path in images:
        told, is_path = f"{where}: image path {path[:200]!r}", "://" not in path and path[:5] != "data:"
        require(is_path, f"{told} is an address or the picture itself: write that into a file, and name it")
        require(not path.lower().endswith(FILMS), f"{told} is a film, which is not read: give pictures of it")
        full = os.path.normpath(os.path.join(image_root, path))
        inside = os.path.relpath(full, image_root).split(os.sep)[0] != ".." and "\0" not in path
        require(inside, f"{told} leaves the image folder {image_root}")
        require(not exist or os.path.exists(full), f"{where}: image {full[:200]} does not exist")


def load_image(where: str, image_root: str, path: str) -> Image.Image:
    """The image as RGB, upright, on white where it is transparent; an InputError names sample and file."""
    full = os.path.normpath(os.path.join(image_root, path))  # as it was checked: "link/.." is elsewhere
    try:
        require(os.path.isfile(full) or not os.path.exists(full), "it is no regular file")
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
                require(not 0 < image.getextrema()[1] < 4096, "as if of 12 bits; scale white to 65535")
                image = image.convert("I").point(lambda v: v * (1 / 257) + 0.5).convert("L")
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises whatever its decoders do
        raise InputError(f"{where}: image {full[:200]} cannot be read ({str(error)[:200]})") from None
