"""SigLIP + 2-layer GELU MLP + Qwen, assembled in the open (LLaVA-KD §3.1, arXiv 2410.16236v1).

    image -> vision tower -> Z_v (n, Np, C) -> projector -> H_v (n, Np, D)
    text  -> embedding    -> H_t (B, T, D), H_v written over its <image> positions -> LLM -> h (B, T, D)

The towers and language models themselves are those of transformers, and so is the format on disk: stock
`LlavaForConditionalGeneration` and `AutoProcessor` load what is saved here. The stages decide what is frozen.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import transformers as hf
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from support.chat import PROBE, Chat
from support.checks import check_vocabularies, load_stock
from support.flags import require
from support.run import precision


class Llava(nn.Module):
    """The parts under the names of the stock model, so that each can be frozen or shared by itself."""

    def __init__(self, stock: nn.Module, processor: hf.LlavaProcessor):
        super().__init__()
        self.config, self.processor, self.chat = stock.config, processor, Chat(processor)
        # An LLM with tied weights has one matrix in lm_head and language_model.embed_tokens.
        self.vision_tower, self.language_model = stock.model.vision_tower, stock.model.language_model
        self.multi_modal_projector, self.lm_head = stock.model.multi_modal_projector, stock.lm_head
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    @classmethod
    def from_checkpoint(cls, path: str, dtype: torch.dtype = torch.float32, weights: bool = True) -> Llava:
        """A LLaVA-format checkpoint, own or published, hub name or folder; or its shapes alone."""
        return cls(*load_stock(path, dtype, weights))

    @property
    def n_visual_tokens(self) -> int:
        """Np: the tokens that one image becomes."""
        drops_cls = self.config.vision_feature_select_strategy == "default"
        return self.vision_tower.embeddings.num_positions - drops_cls

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (n, 3, H, W), as data.py prepares them -> Z_v (n, Np, C), the tower's hidden state at
        vision_feature_layer; the layers above that one are not computed. n may be 0.
        """
        if not len(pixel_values):  # the tower's attention cannot reshape nothing
            shape = 0, self.n_visual_tokens, self.config.vision_config.hidden_size
            return torch.zeros(shape, dtype=self.vision_tower.dtype, device=pixel_values.device)
        before, layers = self.parts_that_see()
        x = self.normalise(pixel_values).to(self.vision_tower.dtype)
        for part in before:
            x = part(x)  # hidden state 0
        for layer in layers:
            x = layer(x, attention_mask=None)
        return x[:, 1:] if self.config.vision_feature_select_strategy == "default" else x

    def parts_that_see(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The tower's parts that are run: those before its layers, and layers up to vision_feature_layer."""
        tower, layers = self.vision_tower, list(self.vision_tower.encoder.layers)
        before = [tower.embeddings] + ([tower.pre_layrnorm] if hasattr(tower, "pre_layrnorm") else [])
        return before, layers[: range(len(layers) + 1)[self.config.vision_feature_layer]]

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """Bytes -> what the tower takes: the image processor's own last steps, done on the model's device."""
        how = self.processor.image_processor
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        x = pixel_values.float() * (how.rescale_factor if how.do_rescale else 1)
        mean, std = (x.new_tensor(c).view(-1, 1, 1) for c in (how.image_mean, how.image_std))
        return (x - mean) / std if how.do_normalize else x

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """input_ids (B, T), features Z_v (n, Np, C) in reading order -> h (B, T, D).

        Batches are padded on the right and attention is causal: no token sees padding, and no mask is needed.
        With n = 0 the projector still runs, on no rows: its gradient is zero rather than missing, so ranks
        whose batch has no image take part in the gradient exchange like any other.
        """
        h = self.language_model.embed_tokens(input_ids)  # (B, T, D)
        h_v = self.multi_modal_projector(features.to(h.dtype))  # (n, Np, D)
        at_image = (input_ids == self.config.image_token_index).unsqueeze(-1)  # (B, T, 1)
        h = h.masked_scatter(at_image, h_v.to(h.dtype))
        return self.language_model(inputs_embeds=h, use_cache=False).last_hidden_state

    def check_teacher(self, teacher: Llava) -> None:
        """Refuse a teacher that does not see the student's sequence or does not speak its tokens."""
        both = ("student", self), ("teacher", teacher)
        check_vocabularies(*(("the " + name, m.processor.tokenizer) for name, m in both))
        ids = [m.config.image_token_index for _, m in both]
        require(ids[0] == ids[1], "<image> is token {} for the student and {} for the teacher".format(*ids))
        n = [m.n_visual_tokens for _, m in both]
        counts = f"an image is {n[0]} tokens for the student and {n[1]} for the teacher"
        require(n[0] == n[1], f"{counts}: both must see the same sequence")
        said = [m.chat.encode(PROBE) for _, m in both]
        texts = [f"{m.chat.render(PROBE)!r} with {m.chat.end_id} as its end token" for _, m in both]
        advice = "a new student by dpt.py --vision --llm --teacher takes its teacher's template"
        differ = f"student and teacher write a conversation differently, {' and '.join(texts)}; {advice}"
        require(said[0] == said[1], differ)

    def sees_like(self, teacher: Llava) -> bool:
        """Whether both turn an image into the same features Z_v; layers that are not read may differ."""
        how = [(m.processor.image_processor.to_dict(), m.config.vision_feature_select_strategy)
               for m in (self, teacher)]
        a, b = ([p for parts in m.parts_that_see() for part in parts for p in part.parameters()]
                for m in (self, teacher))
        same_shapes = [p.shape for p in a] == [p.shape for p in b]
        return how[0] == how[1] and same_shapes and all(torch.equal(p.to(q.dtype), q) for p, q in zip(a, b))

    def save(self, out: str | Path) -> None:
        """Write a checkpoint that `LlavaForConditionalGeneration` and `AutoProcessor` load unchanged."""
        Path(out).mkdir(parents=True, exist_ok=True)
        # The names of published checkpoints, which every version of transformers and vLLM reads.
        names = {"vision_tower.vision_model": self.vision_tower, "language_model.model": self.language_model,
                 "multi_modal_projector": self.multi_modal_projector}
        if not self.config.tie_word_embeddings:
            names["language_model.lm_head"] = self.lm_head
        weights = {f"{name}.{k}": v for name, part in names.items() for k, v in part.state_dict().items()
                   if v.numel()}  # vLLM has no place for those of a shared expert of width 0
        for name in [k for k in weights if ".mlp.experts." in k]:  # stacked in memory, published one by one
            stem, kind = name.rsplit(".", 1)
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for e, expert in enumerate(weights.pop(name).unbind()):
                for part, weight in zip(parts, expert.chunk(len(parts))):
                    weights[f"{stem}.{e}.{part}.weight"] = weight.to("cpu", copy=True)  # memory of its own
        save_torch_state_dict(weights, str(out))  # safetensors, in shards if it must be
        config = copy.deepcopy(self.config)
        config.architectures = ["LlavaForConditionalGeneration"]
        rope = getattr(config.text_config, "rope_parameters", None) or {}
        config.text_config.rope_theta = rope.get("rope_theta", 10_000.0)  # where transformers 4 looks for it
        config.save_pretrained(out)
        tokenizer = self.processor.tokenizer
        ends = list(dict.fromkeys([self.chat.end_id, tokenizer.eos_token_id]))  # generation stops at either
        ends = ends if len(ends) > 1 else ends[0]
        hf.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(out)
        self.processor.save_pretrained(out)


def load_teacher(args: argparse.Namespace, student: Llava, dtype: torch.dtype) -> Llava | None:
    """--teacher, if there is one: frozen, on the student's device, checked against the student.

    It has no vision tower if it sees like the student: then one pass through the student's serves both.
    """
    if not args.teacher:
        return None
    teacher = Llava.from_checkpoint(args.teacher, precision(args.teacher_dtype, dtype))
    teacher.to(student.lm_head.weight.device).eval().requires_grad_(False)
    student.check_teacher(teacher)
    if student.sees_like(teacher):
        teacher.vision_tower = None
    return teacher
