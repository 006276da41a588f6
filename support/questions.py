"""Questions files, read and checked; and files of answers, which are kept while a model gives them."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers as hf
from torch import nn

from support.chat import IMAGE_TOKEN
from support.checks import check_images, images_of, is_text, load_image, without_markers
from support.flags import InputError, require
from support.index import records
from support.metrics import METRICS, plain
from support.run import writing


def read_questions(path: str, image_root: str, metric: str, skip_bad: int = 0) -> tuple[list, list]:
    """The good questions of a file, and what is wrong with the others. A question's `images` are a list then,
    and its reference is as the metric reads it.
    """

    def read(numbered: tuple) -> dict | InputError:
        k, (where, q) = numbered
        try:
            if isinstance(q, InputError):  # its line is no JSON
                return q
            text = q.get("text", q.get("question")) if isinstance(q, dict) else None
            require(isinstance(text, str), f"{where} is not a question: it needs 'text' (a string)")
            whole = is_text(json.dumps(q, ensure_ascii=False))
            require(whole, f"{where} holds half of a surrogate pair, which is no character")
            require(not q.get("system"), f"{where}: its 'system' is not read, write it into 'text'")
            images = images_of(where, q)
            check_images(where, images, text.count(IMAGE_TOKEN) if images else 0, image_root)
            for image in images:
                load_image(where, image_root, image)
            text = without_markers(text, bool(images)).strip()
            q = {"question_id": k} | q | {"text": text, "images": images, "where": where}
            return q | METRICS[metric][1](q)
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool:  # every image is decoded, so that all bad ones are known beforehand
        found = list(pool.map(read, enumerate(records(path, skip_bad=True))))
    bad, good = ([q for q in found if isinstance(q, kind)] for kind in (InputError, dict))
    n_bad = f"{len(bad)} of {len(found)} questions are bad, more than --skip_bad {skip_bad}"
    require(len(bad) <= skip_bad, f"{n_bad}; the first: {bad and bad[0]}")
    require(good, f"{path} holds no question")
    return good, bad


def identity(model: nn.Module, processor: hf.LlavaProcessor, *more: object, images: list[str]) -> str:
    """A hash of what answers depend on: the weights, how they are used, the images' files, and `more`."""
    settings = model.config.to_json_string(), processor.image_processor.to_json_string(), *more
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in images:
        digest.update(Path(os.path.normpath(path)).read_bytes())  # the file that `load_image` opens
    for weights in model.parameters():
        digest.update(weights.reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()[:16]


def kept_answers(file: Path, questions: list[dict], run: str) -> list[str]:
    """The answers to the first questions that the same run, interrupted, has left in `file`."""
    lines = [line for _, line in records(file, skip_bad=True)] if file.exists() else []
    if lines and isinstance(lines[-1], InputError):  # it was killed while it wrote
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
        lines.pop()
    of = [isinstance(line, dict) and (line.get("run"), line.get("question_id")) for line in lines]
    same = of == [(run, q["question_id"]) for q in questions[: len(lines)]]
    others = "other questions, images, weights, end tokens, or of another --suffix, --max_new_tokens, --dtype"
    require(same, f"{file} holds answers to {others}: take another --out, or delete it")
    return [line["text"] for line in lines]


def add_answers(file: Path, questions: list[dict], answers: list[dict], **more: str | float) -> None:
    """Add a line for each answer, as LLaVA's files of answers have it."""
    with writing(file), open(file, "a") as added:
        for q, answer in zip(questions, answers):
            line = {"question_id": q["question_id"], "prompt": q["text"]} | answer | more
            added.write(json.dumps(line) + "\n")


def count_cut(file: Path) -> int:
    """How many answers have no end within --max_new_tokens."""
    return sum("cut" in line for _, line in records(file))


def compare(file: Path, answers: list[str], first: list[str]) -> dict[str, float | None]:
    """Percent of answers equal to the first model's; seconds for one, or None if some in `file` have none."""
    n, same = len(answers), sum(plain(a) == plain(b) for a, b in zip(answers, first))
    took = [line.get("seconds") for _, line in records(file)]
    return {"agreement": 100 * same / n, "seconds": None if None in took else sum(took) / n}
