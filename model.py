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
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from support.checks import IMAGE_TOKEN, complete, load_stock, loading
from support.flags import require
from support.run import precision

# One template for training masks, generation and every outside tool. The answer's leading space is inside the
# generation block: after "ASSISTANT: " a BPE would merge it into the first answer token in training only.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- set parts = [{'type': 'text', 'text': message.content}] -%}
    {%- if message.content is not string -%}{%- set parts = message.content -%}{%- endif -%}
    {%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
    {%- set images = '<image>\\n' * (parts | selectattr('type', 'equalto', 'image') | list | length) -%}
    {%- if message.role == 'assistant' -%}
        {{ 'ASSISTANT:' }}{% generation %}{{ ' ' + text + eos_token }}{% endgeneration %}
    {%- else -%}{{ ('USER: ' if message.role == 'user' else '') + images + text + ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


class Llava(nn.Module):
    """The parts under the names of the stock model, so that each can be frozen or shared by itself."""

    def __init__(self, config: hf.LlavaConfig, processor: hf.LlavaProcessor, *parts: nn.Module):
        super().__init__()
        self.config, self.processor = config, processor
        # An LLM with tied weights has one matrix in lm_head and language_model.embed_tokens.
        self.vision_tower, self.multi_modal_projector, self.language_model, self.lm_head = parts
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    @classmethod
    def from_parts(cls, vision: str, llm: str) -> Llava:
        """A new model from a pre-trained tower and LLM (hub names or folders) and a fresh projector."""
        with loading(f"--vision {vision}"):
            tower_config = hf.AutoConfig.from_pretrained(vision)
            tower_config = getattr(tower_config, "vision_config", tower_config)  # the image half of a SigLIP
            tower_config.vision_use_head = False  # the pooling head is never read
            tower = complete(vision, hf.AutoModel, config=tower_config)
            image_processor = hf.AutoImageProcessor.from_pretrained(vision)
        with loading(f"--llm {llm}"):
            language = complete(llm, hf.AutoModelForCausalLM)
            tokenizer = hf.AutoTokenizer.from_pretrained(llm)
            body = language.model  # as Qwen, Llama and their kin call it
        tokenizer.add_tokens(hf.AddedToken(IMAGE_TOKEN, special=True, normalized=False))
        tokenizer.chat_template = CHAT_TEMPLATE
        if len(tokenizer) > language.config.vocab_size:  # Qwen's padding rows have room; others may not
            language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        has_cls = hasattr(tower.embeddings, "class_embedding")  # CLIP's; of SigLIP all tokens are patches
        select = {"vision_feature_select_strategy": "default" if has_cls else "full"}
        config = hf.LlavaConfig(  # of copies: it would reset the attention of the configs it is given
            vision_config=copy.deepcopy(tower_config), text_config=copy.deepcopy(language.config),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), vision_feature_layer=-2, **select,
            image_seq_length=(tower_config.image_size // tower_config.patch_size) ** 2,
            projector_hidden_act="gelu", tie_word_embeddings=language.config.tie_word_embeddings,
        )  # fmt: skip
        processor = hf.LlavaProcessor(
            image_processor, tokenizer, patch_size=tower_config.patch_size, **select,
            num_additional_image_tokens=int(has_cls), chat_template=CHAT_TEMPLATE,
        )  # fmt: skip
        projector = LlavaMultiModalProjector(config)  # an MLP of two layers with a GELU between
        return cls(config, processor, tower, projector, body, language.lm_head)

    @classmethod
    def from_checkpoint(cls, path: str, dtype: torch.dtype = torch.float32, weights: bool = True) -> Llava:
        """A LLaVA-format checkpoint, own or published (hub name or folder), or only its shapes."""
        llava, processor = load_stock(path, dtype, weights)
        parts = llava.model.vision_tower, llava.model.multi_modal_projector, llava.model.language_model
        return cls(llava.config, processor, *parts, llava.lm_head)

    @property
    def n_visual_tokens(self) -> int:
        """Np: the tokens that one image becomes."""
        drops_cls = self.config.vision_feature_select_strategy == "default"
        return self.vision_tower.embeddings.num_positions - drops_cls

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (n, 3, H, W) -> Z_v (n, Np, C), the tower's hidden state at vision_feature_layer; the
        layers above that one are not computed. n may be 0.
        """
        if not len(pixel_values):  # the tower's attention cannot reshape nothing
            return pixel_values.new_zeros(0, self.n_visual_tokens, self.config.vision_config.hidden_size)
        layers = self.vision_tower.encoder.layers
        x = self.vision_tower.embeddings(pixel_values.to(self.vision_tower.dtype))  # hidden state 0
        if hasattr(self.vision_tower, "pre_layrnorm"):  # CLIP has one, SigLIP has none
            x = self.vision_tower.pre_layrnorm(x)
        for layer in layers[: range(len(layers) + 1)[self.config.vision_feature_layer]]:
            x = layer(x, attention_mask=None)
        return x[:, 1:] if self.config.vision_feature_select_strategy == "default" else x

    def forward(self, input_ids: Tensor, attention_mask: Tensor, features: Tensor) -> Tensor:
        """input_ids, attention_mask (B, T), features Z_v (n, Np, C) in reading order -> h (B, T, D).

        With n = 0 the projector still runs, on no rows: its gradient is zero rather than missing, so ranks
        whose batch has no image take part in the gradient exchange like any other.
        """
        h = self.language_model.embed_tokens(input_ids)  # (B, T, D)
        h_v = self.multi_modal_projector(features.to(h.dtype))  # (n, Np, D)
        at_image = (input_ids == self.config.image_token_index).unsqueeze(-1)  # (B, T, 1)
        h = h.masked_scatter(at_image, h_v.to(h.dtype))
        out = self.language_model(inputs_embeds=h, attention_mask=attention_mask, use_cache=False)
        return out.last_hidden_state

    def check_teacher(self, teacher: Llava) -> None:
        """Refuse a teacher that does not see the student's sequence or does not speak its tokens."""
        mine, theirs = self.processor.tokenizer.get_vocab(), teacher.processor.tokenizer.get_vocab()
        token = min((t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)), default=None)
        whose = f"{token!r} is id {mine.get(token)} for the student and {theirs.get(token)} for the teacher"
        sizes = f"the student's has {len(mine)} tokens, the teacher's {len(theirs)}"
        require(token is None, f"teacher and student must share the tokenizer: {sizes}; {whose}")
        ids = [m.config.image_token_index for m in (self, teacher)]
        require(ids[0] == ids[1], "<image> is token {} for the student and {} for the teacher".format(*ids))
        n = [m.n_visual_tokens for m in (self, teacher)]
        counts = f"an image is {n[0]} tokens for the student and {n[1]} for the teacher"
        require(n[0] == n[1], f"{counts}: both must see the same sequence")

    def sees_like(self, teacher: Llava) -> bool:
        """Whether both turn an image into the same features Z_v."""
        how = [(m.processor.image_processor.to_dict(), m.config.vision_feature_layer,
                m.config.vision_feature_select_strategy) for m in (self, teacher)]  # fmt: skip
        a, b = self.vision_tower.state_dict(), teacher.vision_tower.state_dict()
        same_shapes = {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
        return how[0] == how[1] and same_shapes and all(torch.equal(a[k].to(b[k].dtype), b[k]) for k in a)

    def save(self, out: str | Path) -> None:
        """Write a checkpoint that `LlavaForConditionalGeneration` and `AutoProcessor` load unchanged."""
        Path(out).mkdir(parents=True, exist_ok=True)
        # The names of published checkpoints, which every version of transformers and vLLM reads.
        names = {"vision_tower.vision_model": self.vision_tower, "language_model.model": self.language_model,
                 "multi_modal_projector": self.multi_modal_projector}  # fmt: skip
        if not self.config.tie_word_embeddings:
            names["language_model.lm_head"] = self.lm_head
        weights = {f"{name}.{k}": v for name, part in names.items() for k, v in part.state_dict().items()}
        for name in [k for k in weights if ".mlp.experts." in k]:  # stacked in memory, published one by one
            stem, kind = name.rsplit(".", 1)
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for e, expert in enumerate(weights.pop(name).unbind()):
                for part, weight in zip(parts, expert.chunk(len(parts))):
                    weights[f"{stem}.{e}.{part}.weight"] = weight.clone()  # memory of its own
        save_torch_state_dict(weights, str(out))  # safetensors, in shards if it must be
        config = copy.deepcopy(self.config)
        config.architectures = ["LlavaForConditionalGeneration"]
        rope = getattr(config.text_config, "rope_parameters", None) or {}
        config.text_config.rope_theta = rope.get("rope_theta", 10_000.0)  # where transformers 4 looks for it
        config.save_pretrained(out)
        ends = {
            f"{end}_token_id": getattr(self.processor.tokenizer, f"{end}_token_id") for end in ("eos", "pad")
        }
        hf.GenerationConfig(**ends).save_pretrained(out)
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
