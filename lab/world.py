"""The toy world: pictures, captions and questions, and the pre-trained parts that a user would download.

    python -m lab.world        make the base weights in assets/toy again, from a seed

32 x 32 pictures of one to three coloured shapes stand for LLaVA's images, with captions and questions about
them; a tiny SigLIP that knows shapes and colours, and tiny Qwen2s that answer the same questions about scenes
described in words, for the pre-trained tower and language models.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image, ImageDraw
from tokenizers import ByteLevelBPETokenizer

from support.flags import new_parser
from support.run import set_lr

BASE = Path(__file__).parent.parent / "assets" / "toy"
SIZE, CELL = 32, 16  # pixels of a picture and of one cell of its 2 x 2 grid
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 220, 50),
          "purple": (150, 50, 190), "white": (240, 240, 240)}  # fmt: skip
SHAPES = ["circle", "square", "triangle", "cross"]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
NUMBERS = ["zero", "one", "two", "three"]
Scene = list[tuple[str, str, int]]  # (color, shape, cell) of every object, ordered by cell


# ---------------------------------------------------------------------------------- the world


def draw_scene(rng: random.Random) -> Scene:
    cells = sorted(rng.sample(range(4), rng.randint(1, 3)))
    return [(rng.choice(list(COLORS)), rng.choice(SHAPES), cell) for cell in cells]


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as a picture: every object's place in its cell, size and colour vary, and there is noise."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(0, 60) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for color, shape, cell in scene:
        s = rng.randint(8, 13)
        x = cell % 2 * CELL + rng.randint(0, CELL - s)
        y = cell // 2 * CELL + rng.randint(0, CELL - s)
        fill = tuple(max(0, min(255, v + rng.randint(-35, 35))) for v in COLORS[color])
        if shape == "circle":
            pen.ellipse((x, y, x + s, y + s), fill)
        elif shape == "square":
            pen.rectangle((x, y, x + s, y + s), fill)
        elif shape == "triangle":
            pen.polygon([(x + s / 2, y), (x, y + s), (x + s, y + s)], fill)
        else:
            pen.rectangle((x + s / 2 - 2, y, x + s / 2 + 2, y + s), fill)
            pen.rectangle((x, y + s / 2 - 2, x + s, y + s / 2 + 2), fill)
    noise = torch.randn(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(SIZE, SIZE, 3) + 15 * noise
    return Image.frombytes("RGB", (SIZE, SIZE), bytes(pixels.clamp(0, 255).byte().flatten().tolist()))


def caption(scene: Scene) -> str:
    return " , ".join(f"{color} {shape} {PLACES[cell]}" for color, shape, cell in scene)


def ask(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """A question about the scene: (category, question, answer)."""
    kind = rng.choice(["exist", "exist", "color", "shape", "count", "where"])
    color, shape, cell = rng.choice(scene)
    if kind == "exist":
        word = rng.choice([color, shape]) if rng.random() < 0.5 else rng.choice(list(COLORS) + SHAPES)
        there = any(word in (c, s) for c, s, _ in scene)
        return kind, f"is there a {word} ?", "yes" if there else "no"
    if kind == "color":
        return kind, f"what color is the object {PLACES[cell]} ?", color
    if kind == "shape":
        return kind, f"what shape is the object {PLACES[cell]} ?", shape
    if kind == "where" and sum((c, s) == (color, shape) for c, s, _ in scene) == 1:
        return kind, f"where is the {color} {shape} ?", PLACES[cell]
    return "count", "how many objects ?", NUMBERS[len(scene)]


def wrong_caption(scene: Scene, rng: random.Random) -> str:
    """A description with one lie: an object that is not there, or one with another colour or shape."""
    free = [cell for cell in range(4) if cell not in [c for *_, c in scene]]
    seen = {(color, shape) for color, shape, _ in scene}
    while True:
        lie = (rng.choice(list(COLORS)), rng.choice(SHAPES))
        k = rng.randrange(len(scene))
        color, shape, cell = scene[k]
        if lie in seen:
            continue
        if rng.random() < 0.4:
            return caption(sorted([*scene, (*lie, rng.choice(free))], key=lambda thing: thing[2]))
        changed = (lie[0], shape) if rng.random() < 0.5 else (color, lie[1])
        if changed not in seen:
            return caption([*scene[:k], (*changed, cell), *scene[k + 1 :]])


def write_world(root: Path, n_train: int = 4000, n_few: int = 400, n_test: int = 1000) -> None:
    """LLaVA-format files: images; captions (pretrain), questions (finetune) and both (mixed) to train on;
    pairs of a true and a false description (preference); questions and descriptions to score.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    rng, liar = random.Random(1), random.Random(2)
    pretrain, finetune, preference, questions, describe = [], [], [], [], []
    for i in range(n_train + n_test):
        scene, name = draw_scene(rng), f"{i:05d}.png"
        paint(scene, rng).save(root / "images" / name)
        asked = [ask(scene, rng) for _ in range(2)]
        if i < n_train:
            pretrain.append(sample(f"{i}", name, "<image>\ndescribe", caption(scene)))
            lie = sample("", name, "<image>\ndescribe", wrong_caption(scene, liar))
            both = {"chosen": pretrain[-1]["conversations"], "rejected": lie["conversations"]}
            preference.append({"id": f"{i}", "image": name} | both)
            for k, (_, q, a) in enumerate(asked):
                finetune.append(sample(f"{i}-{k}", name, f"<image>\n{q}", a))
        else:
            objects = [f"{color} {shape}" for color, shape, _ in scene]
            describe.append({"question_id": f"{i}", "image": name, "text": "describe", "objects": objects})
            questions += [{"question_id": f"{i}-{k}", "image": name, "text": q, "label": a, "category": kind}
                          for k, (kind, q, a) in enumerate(asked)]  # fmt: skip
    for name, records in (("pretrain", pretrain), ("finetune", finetune), ("mixed", [*pretrain, *finetune]),
                          ("preference", preference)):  # fmt: skip
        (root / f"{name}.json").write_text(json.dumps(records))
        few = [r for r in records if int(r["image"][:5]) < n_few]
        (root / f"{name}_few.json").write_text(json.dumps(few))
    for name, records in ("describe", describe), ("questions", questions):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in records))


def sample(name: str, image: str, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


# ---------------------------------------------------------------------------------- the pre-trained parts


def train(model: torch.nn.Module, steps: int, lr: float, loss_of: callable) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        set_lr(optimizer, step, steps, lr, warmup=0.03)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.4f}", flush=True)


def make_tower(out: Path, steps: int) -> None:
    """A SigLIP whose second last hidden state tells colour and shape of the object in every cell."""
    torch.manual_seed(0)
    config = hf.SiglipVisionConfig(
        image_size=SIZE, patch_size=8, hidden_size=48, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, vision_use_head=False,
    )  # fmt: skip
    tower, rng = hf.SiglipVisionModel(config), random.Random(3)
    processor = hf.SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    scenes = [draw_scene(rng) for _ in range(30_000)]  # fewer are learned by heart
    pictures = processor([paint(scene, rng) for scene in scenes], return_tensors="pt")["pixel_values"]
    tags = torch.zeros(len(scenes), 4, len(COLORS) + len(SHAPES))
    for i, scene in enumerate(scenes):
        for color, shape, cell in scene:
            tags[i, cell, list(COLORS).index(color)] = tags[i, cell, len(COLORS) + SHAPES.index(shape)] = 1
    head = torch.nn.Linear(16 * 48, tags[0].numel())
    features = lambda x: tower(pixel_values=x, output_hidden_states=True).hidden_states[-2]  # noqa: E731

    def loss_of() -> torch.Tensor:
        pick = torch.tensor(rng.sample(range(len(scenes)), 96))
        y = head(features(pictures[pick]).flatten(1))
        return F.binary_cross_entropy_with_logits(y, tags[pick].flatten(1))

    train(torch.nn.ModuleList([tower, head]), steps, 1e-3, loss_of)
    with torch.no_grad():  # bring the features to unit scale: LayerNorms do not notice what all writers share
        scale = 1 / features(pictures[:500]).std()
        writers = [tower.embeddings.patch_embedding, tower.embeddings.position_embedding]
        writers += [w for layer in tower.encoder.layers for w in (layer.self_attn.out_proj, layer.mlp.fc2)]
        for p in (p for w in writers for p in w.parameters()):
            p *= scale
    tower.save_pretrained(out)
    processor.save_pretrained(out)


def make_tokenizer() -> hf.Qwen2Tokenizer:
    """A byte-level BPE in which every word of the world is one token, with Qwen's special tokens."""
    rng = random.Random(4)
    scenes = [draw_scene(rng) for _ in range(500)]
    bpe = ByteLevelBPETokenizer()
    text = [as_text(scene, *ask(scene, rng)[1:]) for scene in scenes]
    text = [t.replace("<|endoftext|>", "") for t in text]
    bpe.train_from_iterator(text, vocab_size=440, show_progress=False)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split()) for pair in trained["merges"]]
    return hf.Qwen2Tokenizer(vocab=trained["vocab"], merges=merges)


def as_text(scene: Scene, question: str, answer: str) -> str:
    """A training sample as the chat template renders it, the scene described where the image would stand."""
    return f"USER: {caption(scene)}\n{question} ASSISTANT: {answer}<|endoftext|>"


def make_llm(out: Path, tokenizer: hf.Qwen2Tokenizer, width: int, layers: int, steps: int, lr: float) -> None:
    """A Qwen2 that answers questions about scenes described in words, and can repeat a description."""
    torch.manual_seed(1)
    config = hf.Qwen2Config(
        vocab_size=512, hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model, rng = hf.Qwen2ForCausalLM(config), random.Random(9)
    marker = tokenizer(" ASSISTANT:")["input_ids"]

    def loss_of() -> torch.Tensor:
        texts = []
        for _ in range(64):
            scene = draw_scene(rng)
            question, answer = ask(scene, rng)[1:] if rng.random() < 0.75 else ("describe", caption(scene))
            texts.append(as_text(scene, question, answer))
        rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)  # (B, T)
        starts = [next(k for k in range(len(r)) if r[k : k + len(marker)].tolist() == marker) for r in rows]
        answers = torch.arange(1, ids.shape[1]) >= torch.tensor(starts).unsqueeze(1) + len(marker)
        logits = model(ids.clamp_min(0), attention_mask=(ids >= 0).long()).logits[:, :-1]
        nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none", ignore_index=-100)
        is_answer, is_text = (((ids[:, 1:] >= 0) & rows).flatten() for rows in (answers, ~answers))
        return nll[is_answer].mean() + 0.05 * nll[is_text].mean()

    train(model, steps, lr, loss_of)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(argv: list[str] | None = None) -> None:
    new_parser(__doc__).parse_args(argv)
    print("SigLIP tower")
    make_tower(BASE / "siglip", steps=3000)
    tokenizer = make_tokenizer()
    for name, *shape_and_steps in (
        ("qwen-small", 32, 2, 3000, 4e-3), ("qwen-middle", 56, 2, 3000, 3e-3),
        ("qwen-large", 96, 3, 2500, 2e-3),
    ):  # fmt: skip
        print(name)
        make_llm(BASE / name, tokenizer, *shape_and_steps)


if __name__ == "__main__":
    main()
