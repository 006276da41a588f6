"""The toy world's pre-trained parts, which stand for what a user would download.

    python -m assets.toy.make    make assets/toy again, from a seed

A tiny SigLIP knows shapes and colours; tiny Qwen2s answer the toy world's questions about scenes that are
described in words.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers as hf
from tokenizers import ByteLevelBPETokenizer
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

from lab.world import BASE, COLORS, SHAPES, SIZE, Scene, ask, caption, paint
from support.flags import new_parser
from support.state import set_lr


def draw_scene(rng: random.Random) -> Scene:
    """Any objects, all equally likely: what the pre-trained parts learn from."""
    cells = sorted(rng.sample(range(4), rng.randint(1, 3)))
    return [(rng.choice(list(COLORS)), rng.choice(SHAPES), cell) for cell in cells]


def train(model: torch.nn.Module, steps: int, lr: float, loss_of: Callable[[], torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01, betas=(0.9, 0.98))
    for step in trange(steps):
        set_lr(optimizer, step, steps, lr, warmup=0.03)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"loss {loss.item():.4f}")


def make_tower(out: Path) -> None:
    """A SigLIP whose second last hidden state tells colour and shape of the object in every cell."""
    torch.manual_seed(0)
    config = hf.SiglipVisionConfig(
        image_size=SIZE, patch_size=8, hidden_size=48, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, vision_use_head=False,
    )
    tower, rng = hf.SiglipVisionModel(config), random.Random(3)
    processor = hf.SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    scenes = [draw_scene(rng) for _ in range(30_000)]  # fewer are learned by heart
    pictures = processor([paint(scene, rng) for scene in scenes], return_tensors="pt")["pixel_values"]
    tags = torch.zeros(len(scenes), 4, len(COLORS) + len(SHAPES))
    for i, scene in enumerate(scenes):
        for color, shape, cell in scene:
            tags[i, cell, list(COLORS).index(color)] = tags[i, cell, len(COLORS) + SHAPES.index(shape)] = 1
    head = torch.nn.Linear(16 * 48, tags[0].numel())
    features = lambda x: tower(pixel_values=x, output_hidden_states=True).hidden_states[-2]

    def loss_of() -> torch.Tensor:
        pick = torch.tensor(rng.sample(range(len(scenes)), 96))
        y = head(features(pictures[pick]).flatten(1))
        return F.binary_cross_entropy_with_logits(y, tags[pick].flatten(1))

    train(torch.nn.ModuleList([tower, head]), 3000, 1e-3, loss_of)
    with torch.no_grad():  # bring the features to unit scale: LayerNorms do not notice what all writers share
        scale = 1 / features(pictures[:500]).std()
        writers = [tower.embeddings.patch_embedding, tower.embeddings.position_embedding]
        writers += [w for layer in tower.encoder.layers for w in (layer.self_attn.out_proj, layer.mlp.fc2)]
        for p in torch.nn.ModuleList(writers).parameters():
            p *= scale
    tower.save_pretrained(out)
    processor.save_pretrained(out)


def as_text(scene: Scene, question: str, answer: str) -> tuple[str, str]:
    """Prompt and answer as the chat template renders them, the scene described where an image would be."""
    return f"USER: {caption(scene)}\n{question} ASSISTANT:", f" {answer}"


def make_tokenizer() -> hf.Qwen2Tokenizer:
    """A byte-level BPE in which every word of the world is one token, with Qwen's special tokens."""
    rng = random.Random(4)
    scenes = [draw_scene(rng) for _ in range(500)]
    bpe = ByteLevelBPETokenizer()
    texts = ["".join(as_text(scene, *ask(scene, rng)[1:])) for scene in scenes]
    bpe.train_from_iterator(texts, vocab_size=440, show_progress=False)
    trained = json.loads(bpe.to_str())["model"]
    return hf.Qwen2Tokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]])


def make_llm(out: Path, tokenizer: hf.Qwen2Tokenizer, width: int, layers: int, steps: int, lr: float) -> None:
    """A Qwen2 that answers questions about scenes described in words, and can repeat a description."""
    torch.manual_seed(1)
    config = hf.Qwen2Config(
        vocab_size=512, hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model, rng = hf.Qwen2ForCausalLM(config), random.Random(9)

    def loss_of() -> torch.Tensor:
        rows, kinds = [], []
        for _ in range(64):
            scene = draw_scene(rng)
            question, answer = ask(scene, rng)[1:] if rng.random() < 0.75 else ("describe", caption(scene))
            prompt, answer = (tokenizer(text)["input_ids"] for text in as_text(scene, question, answer))
            rows.append(torch.tensor([*prompt, *answer, tokenizer.eos_token_id]))
            kinds.append(torch.arange(len(rows[-1])) >= len(prompt))
        ids = pad_sequence(rows, batch_first=True, padding_value=-100)  # (B, T)
        logits = model(ids.clamp_min(0), attention_mask=(ids >= 0).long()).logits[:, :-1]
        y, is_answer = ids[:, 1:], pad_sequence(kinds, batch_first=True)[:, 1:]
        nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        return nll[is_answer].mean() + 0.05 * nll[~is_answer & (y >= 0)].mean()

    train(model, steps, lr, loss_of)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(argv: list[str] | None = None) -> None:
    new_parser(__doc__).parse_args(argv)
    make_tower(BASE / "siglip")
    tokenizer = make_tokenizer()
    make_llm(BASE / "qwen-16x1", tokenizer, width=16, layers=1, steps=3000, lr=8e-3)
    make_llm(BASE / "qwen-16x2", tokenizer, width=16, layers=2, steps=3000, lr=6e-3)
    make_llm(BASE / "qwen-24x2", tokenizer, width=24, layers=2, steps=3000, lr=5e-3)
    make_llm(BASE / "qwen-small", tokenizer, width=32, layers=2, steps=3000, lr=4e-3)
    make_llm(BASE / "qwen-middle", tokenizer, width=56, layers=2, steps=3000, lr=3e-3)
    make_llm(BASE / "qwen-large", tokenizer, width=96, layers=3, steps=2500, lr=2e-3)


if __name__ == "__main__":
    main()
