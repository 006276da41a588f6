"""Mutated samples through data.py: a batch or a clear error, never a hang, a crash or a wrong label."""

import copy
import io
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import open_data
from PIL import Image

ROOT = Path(__file__).parent.parent
TEXTS = ["", " ", "\0", "\ud800", "a" * 70_000, "é漢字🙂\u202e", "<image>", "<|endoftext|>", "ASSISTANT:",
         "{{ 7*7 }}", "{% generation %}", "\\u0000", "\n\n", "x\u0301" * 50]
VALUES = [None, 0, -1, 1e308, True, [], {}, "text", [[]], {"from": "gpt"}, float("nan")]


def pictures(root: Path) -> list[str]:
    """Images of every odd kind, good and bad, and paths that are none."""
    root.mkdir(parents=True, exist_ok=True)
    plain = Image.frombytes("RGB", (9, 7), bytes(range(189)))
    for name, image in {"cmyk.jpg": plain.convert("CMYK"), "palette.png": plain.convert("P"), "ok.png": plain,
                        "gray16.png": Image.new("I;16", (5, 5), 40_000), "alpha.png": plain.convert("RGBA"),
                        "bit.png": plain.convert("1"), "one.png": plain.resize((1, 1))}.items():
        image.save(root / name)
    plain.save(root / "animated.gif", save_all=True, append_images=[plain.rotate(90)] * 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.save(root / "turned.jpg", exif=exif)
    data = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(data, "png")
    (root / "cut.png").write_bytes(data.getvalue()[:-300])
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("no image")
    (root / "zero.ppm").write_bytes(b"P6 0 0 255\n")
    (root / "folder.png").mkdir()
    (root / "out.png").symlink_to("/etc/hostname")
    names = sorted(p.name for p in root.iterdir())
    return [*names, "../ok.png", "/etc/hostname", "none.png", "a\0b.png", "", "x" * 5000]


def mutate(rng: random.Random, names: list[str]) -> object:
    turns = [{"from": who, "value": text} for who, text in (("human", "<image>\nhow many ?"), ("gpt", "two"))]
    sample = {
        "id": rng.choice([1, "a", *VALUES]),
        "image": rng.choice(names),
        "conversations": turns * rng.choice([1, 1, 2]),
    }
    sample = copy.deepcopy(sample)
    keys = ["image_path", "Image", "history", "system", "tools", "loss_mask", "messages", "images", "weight"]
    if len(sample["conversations"]) > 2:
        sample["conversations"][2]["value"] = "again ?"
    for _ in range(rng.choice([0, 1, 1, 2])):
        kind = rng.randrange(9)
        turn = (
            rng.choice(sample["conversations"] or [{}])
            if isinstance(sample.get("conversations"), list)
            else {}
        )
        if kind == 0 and isinstance(turn, dict):
            turn["value"] = rng.choice([*TEXTS, *VALUES])
        elif kind == 1 and isinstance(turn, dict):
            turn["from"] = rng.choice(["human", "gpt", "system", "user", *VALUES])
        elif kind == 2:
            sample[rng.choice(list(sample))] = rng.choice(VALUES)
        elif kind == 3:
            sample.pop(rng.choice(list(sample)))
        elif kind == 4 and isinstance(turn, dict) and isinstance(turn.get("value"), str):
            turn["value"] += rng.choice(TEXTS)
        elif kind == 5:
            sample["image"] = [rng.choice(names) for _ in range(rng.randrange(3))]
        elif kind == 6:
            sample[rng.choice(keys)] = rng.choice([*VALUES, "ok.png", [0, 1], [0, 0]])
        elif kind == 7 and isinstance(turn, dict):
            turn[rng.choice(["weight", "loss", "train", "mask", *keys])] = rng.choice([*VALUES, 1, False])
        elif isinstance(sample.get("conversations"), list):
            sample["conversations"] = sample["conversations"][: rng.randrange(3)]
        if not sample:
            break
    return sample if rng.random() < 0.95 else rng.choice(VALUES)


def fuzz_samples(n: int, root: Path, seed: int) -> str:
    from transformers import AutoTokenizer, LlavaProcessor, SiglipImageProcessorPil

    from support.chat import CHAT_TEMPLATE
    from support.chat import IMAGE_TOKEN
    from support.flags import InputError

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/toy/qwen-small")
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    processor = LlavaProcessor(image_processor, tokenizer, patch_size=8, chat_template=CHAT_TEMPLATE,
                               vision_feature_select_strategy="full")
    rng, seen = random.Random(seed), Counter()
    names = pictures(root / "images")
    turns = [{"from": "human", "value": "<image>\nhow many ?"}, {"from": "gpt", "value": "two"}]
    good = {"id": "good", "image": "ok.png", "conversations": turns}
    path = root / "data.json"
    for _ in range(n):
        record = mutate(rng, names)
        text = json.dumps([good, record])
        deep = rng.random()
        if deep < 0.03:
            text = "[" * rng.choice([50, 100_000]) + text
        elif deep < 0.1:
            text = text[: rng.randrange(len(text))]
        data = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.05:
            data = data.replace(b"how", rng.choice([b"\xff\xfe", b"\0", b"\xc3"]))
        path.write_bytes(data)
        try:
            dataset = open_data(path, root / "images", processor, max_len=64)
            batch = dataset.collate([dataset[i] for i in range(len(dataset))])
        except InputError as error:
            assert str(error).strip(), record
            seen["refused"] += 1
            continue
        if batch.bad:  # `check_samples` stops here unless --skip_bad allows it
            seen["unreadable image"] += 1
        else:
            seen["batch"] += 1
        assert torch.isfinite(batch.pixel_values).all()
        assert batch.visual.sum() == 4 * len(batch.pixel_values)
        for i in range(len(dataset)):
            learned = batch.y[i][batch.response[i]].tolist()
            if learned:  # the answers and nothing else, cut where max_len cuts
                conversations = dataset.sample(int(dataset.usable[i]))[1][0]
                answers = [m["content"][-1]["text"] for m in conversations if m["learned"]]
                whole = [t for a in answers for t in tokenizer(f" {a}{tokenizer.eos_token}")["input_ids"]]
                assert learned == whole[: len(learned)], record
            assert not (batch.input_ids[i][1:][batch.response[i][:-1]] == 372).any()
    return f"{n} mutations (seed {seed}): " + ", ".join(f"{v} {k}" for k, v in seen.most_common())


@pytest.mark.parametrize("seed", [0, 1])
def test_mutated_samples_give_a_batch_or_a_clear_error(tmp_path, seed):
    summary = fuzz_samples(150, tmp_path, seed)
    assert all(f" {kind}" in summary for kind in ("batch", "refused", "unreadable image")), summary
