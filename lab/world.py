"""The toy world: 32 x 32 pictures of one to three coloured shapes stand for LLaVA's images, with captions and
questions about them. Its pre-trained parts are made by assets/toy/make.py. Another world has other `Things`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import count, permutations
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw

BASE = Path(__file__).parent.parent / "assets" / "toy"
SIZE, CELL = 32, 16  # pixels of a picture and of one cell of its 2 x 2 grid
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 220, 50),
          "purple": (150, 50, 190), "white": (240, 240, 240)}
SHAPES = ["circle", "square", "triangle", "cross"]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
NUMBERS = ["zero", "one", "two", "three"]
Scene = list[tuple[str, str, int]]  # (color, shape, cell) of every object, ordered by cell
# The colour that each shape, in turn, has in no training scene; the pre-trained parts know all 24 pairs.
UNSEEN = ("yellow", "red", "green", "blue")
SKILLS = ("color", "count", "exist", "shape", "where")  # what `accuracy` is over
POPE = ("random", "popular", "adversarial")
N_TRAIN, N_VAL, N_TEST = 20_000, 300, 1000


class Things(NamedTuple):
    """What the objects of a world are: shapes, or what stands in a shape's place in scenes and questions."""

    noun: str  # what a question calls them
    names: list[str]
    draw: Callable[..., None]  # called as draw_shape is
    draw_test: Callable[..., None]  # the same, for the pictures of questions and describe

    @property
    def unseen(self) -> set[tuple[str, str]]:
        return set(zip(UNSEEN, self.names))


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: int, y: int, s: int, fill: tuple[int, ...], _: random.Random
) -> None:
    """Draw a shape as wide and high as s pixels, its corner at (x, y)."""
    if shape == "circle":
        pen.ellipse((x, y, x + s, y + s), fill)
    elif shape == "square":
        pen.rectangle((x, y, x + s, y + s), fill)
    elif shape == "triangle":
        pen.polygon([(x + s / 2, y), (x, y + s), (x + s, y + s)], fill)
    else:
        pen.rectangle((x + s / 2 - 2, y, x + s / 2 + 2, y + s), fill)
        pen.rectangle((x, y + s / 2 - 2, x + s, y + s / 2 + 2), fill)


SHAPED = Things("shape", SHAPES, draw_shape, draw_shape)


def draw_common(rng: random.Random, things: Things, unseen: bool) -> Scene:
    """A scene of the data: some colours and shapes are common, others rare, and what follows an object is
    often the next colour and shape of the lists. With `unseen` just one object is of an unseen pair.
    """
    while True:
        scene: Scene = []
        for cell in sorted(rng.sample(range(4), rng.randint(1, 3))):
            color = rng.choices(list(COLORS), [6, 5, 4, 3, 3, 3])[0]
            shape = rng.choices(things.names, [4, 3, 3, 2])[0]
            if scene and rng.random() < 0.4:
                color, shape = after(list(COLORS), scene[-1][0]), after(things.names, scene[-1][1])
            scene.append((color, shape, cell))
        if sum((color, shape) in things.unseen for color, shape, _ in scene) == unseen:
            return scene


def after(names: list[str], name: str) -> str:
    return names[(names.index(name) + 1) % len(names)]


def paint(scene: Scene, rng: random.Random, draw: Callable[..., None] = draw_shape) -> Image.Image:
    """The scene as a picture: every object's place in its cell, size and colour vary, and there is noise."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(0, 60) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for color, shape, cell in scene:
        s = rng.randint(8, 13)
        x = cell % 2 * CELL + rng.randint(0, CELL - s)
        y = cell // 2 * CELL + rng.randint(0, CELL - s)
        fill = tuple(max(0, min(255, v + rng.randint(-35, 35))) for v in COLORS[color])
        draw(pen, shape, x, y, s, fill, rng)
    noise = torch.randn(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(SIZE, SIZE, 3) + 15 * noise
    return Image.frombytes("RGB", (SIZE, SIZE), bytes(pixels.clamp(0, 255).byte().flatten().tolist()))


def caption(scene: Scene) -> str:
    return " , ".join(f"{color} {shape} {PLACES[cell]}" for color, shape, cell in scene)


def ask(scene: Scene, rng: random.Random, things: Things = SHAPED) -> tuple[str, str, str]:
    """A question about the scene: (skill, question, answer)."""
    skill = rng.choice(["exist", "exist", "color", "shape", "count", "where"])
    color, shape, cell = rng.choice(scene)
    if skill == "exist":
        word = rng.choice([color, shape]) if rng.random() < 0.5 else rng.choice(list(COLORS) + things.names)
        return skill, *exist(scene, word)
    return about(scene, skill, (color, shape, cell), things)


def exist(scene: Scene, word: str) -> tuple[str, str]:
    return f"is there a {word} ?", "yes" if any(word in (c, s) for c, s, _ in scene) else "no"


def about(scene: Scene, skill: str, thing: tuple[str, str, int], things: Things) -> tuple[str, str, str]:
    """A question about one of the scene's objects; their number, where two of them look the same."""
    color, shape, cell = thing
    if skill == "color":
        return skill, f"what color is the object {PLACES[cell]} ?", color
    if skill == "shape":
        return skill, f"what {things.noun} is the object {PLACES[cell]} ?", shape
    if skill == "where" and sum((c, s) == (color, shape) for c, s, _ in scene) == 1:
        return skill, f"where is the {color} {shape} ?", PLACES[cell]
    return "count", "how many objects ?", NUMBERS[len(scene)]


def ask_pope(
    scene: Scene, rng: random.Random, common: list[str], together: Counter
) -> list[tuple[str, str, str]]:
    """POPE's questions: for each way to choose what is not there, one about a word that is there and one
    about a word that is not: any, the most common, or that seen most `together` with what is there.
    """
    there = {word for thing in scene for word in thing[:2]}
    absent = [word for word in common if word not in there]
    liked = max(absent, key=lambda word: sum(together[word, other] for other in there))
    lies = rng.choice(absent), absent[0], liked
    return [(f"POPE {kind}", *exist(scene, word)) for kind, lie in zip(POPE, lies)
            for word in (rng.choice(sorted(there)), lie)]


def wrong_caption(scene: Scene, rng: random.Random, things: Things) -> str:
    """A description with one lie: an object that is not there, or one with another colour or shape."""
    free = [cell for cell in range(4) if cell not in [c for *_, c in scene]]
    seen = {(color, shape) for color, shape, _ in scene}
    while True:
        lie = (rng.choice(list(COLORS)), rng.choice(things.names))
        k = rng.randrange(len(scene))
        color, shape, cell = scene[k]
        if lie in seen:
            continue
        if rng.random() < 0.4:
            return caption(sorted([*scene, (*lie, rng.choice(free))], key=lambda thing: thing[2]))
        changed = (lie[0], shape) if rng.random() < 0.5 else (color, lie[1])
        if changed not in seen:
            return caption([*scene[:k], (*changed, cell), *scene[k + 1 :]])


def write_world(root: Path, n_train: int = N_TRAIN, n_test: int = N_TEST, things: Things = SHAPED) -> None:
    """LLaVA-format files: images; captions (pretrain), questions (finetune) and both (mixed) to train on;
    pairs of a true and a false description (preference). To score: questions, descriptions with the objects
    that they may name, and questions on scenes of their own to choose learning rates by (val).
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    rng, liar = random.Random(1), random.Random(2)
    train = {kind: [] for kind in ("pretrain", "finetune", "preference", "mixed")}
    score = {kind: [] for kind in ("questions", "val", "describe")}
    common, together, drawn = Counter(), Counter(), count()

    def paint_next(draw: Callable[..., None], unseen: bool = False) -> tuple[Scene, str]:
        scene, name = draw_common(rng, things, unseen), f"{next(drawn):05d}.png"
        paint(scene, rng, draw).save(root / "images" / name)
        return scene, name

    for _ in range(n_train):
        scene, name = paint_next(things.draw)
        words = sorted({word for thing in scene for word in thing[:2]})
        common.update(words)
        together.update(permutations(words, 2))
        i = name[:5]
        true = sample(i, name, "<image>\ndescribe", caption(scene))
        lie = sample(i, name, "<image>\ndescribe", wrong_caption(scene, liar, things))
        both = {"chosen": true["conversations"], "rejected": lie["conversations"]}
        questions = [ask(scene, rng, things)[1:] for _ in range(2)]
        asked = [sample(f"{i}-{k}", name, f"<image>\n{q}", a) for k, (q, a) in enumerate(questions)]
        train["pretrain"].append(true)
        train["finetune"] += asked
        train["preference"].append({"id": i, "image": name} | both)
        train["mixed"] += [true, *asked]
    by_number = [word for word, _ in common.most_common()]
    for k in range(N_VAL + n_test + n_test // 4):
        val, unseen = k < N_VAL, k >= N_VAL + n_test
        scene, name = paint_next(things.draw if val else things.draw_test, unseen)
        asked = [ask(scene, rng, things) for _ in range(2)]
        if unseen:
            thing = next(thing for thing in scene if thing[:2] in things.unseen)
            asked = [("unseen", *about(scene, skill, thing, things)[1:])
                     for skill in ("color", "shape", "where")]
        elif not val:
            asked += ask_pope(scene, rng, by_number, together) if k % 4 == 0 else []
            objects = [f"{color} {shape}" for color, shape, _ in scene]
            score["describe"].append({"image": name, "text": "describe", "objects": objects})
        score["val" if val else "questions"] += [
            {"image": name, "text": q, "label": a, "category": skill} for skill, q, a in asked
        ]
    for name, records in train.items():
        (root / f"{name}.json").write_text(json.dumps(records))
    for name, records in score.items():
        lines = (json.dumps({"question_id": str(k)} | q) for k, q in enumerate(records))
        (root / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    known = (f"{color} {name}\n" for color in COLORS for name in things.names)
    (root / "objects.txt").write_text("".join(known))


def write_subset(root: Path, kind: str, scenes: int, seed: int) -> Path:
    """The file of a kind of training data on so many scenes, which the seed chooses among all."""
    path = root / f"{kind}-{scenes}-seed{seed}.json"
    if not path.exists():
        records, part = json.loads((root / f"{kind}.json").read_text()), path.with_suffix(".part")
        images = sorted({record["image"] for record in records})
        chosen = set(random.Random(seed).sample(images, scenes))
        part.write_text(json.dumps([record for record in records if record["image"] in chosen]))
        part.rename(path)
    return path


def sample(name: str, image: str, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}
