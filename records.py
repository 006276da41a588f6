"""Reading and checking what the user brings: data files, samples, image paths, images."""

from __future__ import annotations

import json
import os
from pathlib import Path

from PIL import Image, ImageOps

from common import InputError

IMAGE_TOKEN = "<image>"
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def read_records(path: str | Path) -> list[tuple[str, dict]]:
    """The records of a .json (one list) or .jsonl (one object a line) file, each with where it stands."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the data file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); is it a JSON file?") from None
    if str(path).endswith(".jsonl"):
        pieces = [(f"{path} line {k}", line) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(where, _parse(where, piece)) for where, piece in pieces]
    records = _parse(str(path), text)
    if not isinstance(records, list):
        raise InputError(f"{path} holds a JSON {type(records).__name__}, not a list of samples")
    return [(f"{path} sample {i}", record) for i, record in enumerate(records)]


def _parse(where: str, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{where} is not valid JSON: it is nested too deeply") from None


def check_sample(where: str, record: object, image_root: str) -> tuple[list[dict], list[str]]:
    """A LLaVA record -> (chat messages, image paths), or an InputError that says what is wrong with it."""
    if not isinstance(record, dict):
        raise InputError(f"{where} is a JSON {type(record).__name__}, not a sample object")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where} has no 'conversations' list of turns")
    messages, n_markers = [], 0
    for k, turn in enumerate(turns):
        role = ROLES.get(turn.get("from")) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise InputError(f"{where}, turn {k}, needs 'from' (human, gpt or system) and 'value' (a string)")
        expected = ("user", "assistant")[len([m for m in messages if m["role"] != "system"]) % 2]
        if role != expected and not (role == "system" and k == 0):
            raise InputError(f"{where}, turn {k}, is '{turn['from']}': turns go human, gpt, human, gpt, ...")
        count = turn["value"].count(IMAGE_TOKEN)
        if count and role != "user":
            raise InputError(f"{where}, turn {k}, has {IMAGE_TOKEN}, but only human turns may hold images")
        n_markers += count
        text = {"type": "text", "text": turn["value"].replace(IMAGE_TOKEN, "").strip()}
        messages.append({"role": role, "content": [{"type": "image"}] * count + [text]})
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{where} does not end with a 'gpt' turn: there is no answer to learn")
    images = check_images(where, record.get("image"), n_markers, image_root)
    return messages, images


def check_images(where: str, images: object, n_markers: int, image_root: str) -> list[str]:
    """The record's image paths, inside `image_root`, existing, and as many as there are `<image>` markers."""
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(p, str) and p for p in images):
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
        raise InputError(f"{where}: image {path} leaves the image folder {image_root} through a link")
    try:
        with Image.open(full) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{where}: image {full} does not exist") from None
    except Exception as error:  # Pillow raises whatever its decoders do
        raise InputError(f"{where}: image {full} cannot be read ({error})") from None
