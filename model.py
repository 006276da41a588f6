"""SigLIP + 2-layer GELU MLP + Qwen, assembled in the open (LLaVA-KD §3.1, arXiv 2410.16236v1).

    image -> vision tower -> Z_v (n, Np, C) -> projector -> H_v (n, Np, D)
    text  -> embedding    -> H_t (B, T, D), with H_v written over its <image> positions -> LLM -> hidden (B,
    T, D)

The towers and language models themselves are those of transformers; so is the format on disk: `Llava.save`
writes what stock `LlavaForConditionalGeneration` and `AutoProcessor` load, and `Llava.from_checkpoint`
reads any checkpoint in that format. What is frozen is decided by the stage scripts, not here.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from common import InputError

transformers.utils.logging.disable_progress_bar()  # the stages have one of their own
IMAGE_TOKEN = "<image>"

# One template for training masks, generation and every outside tool. The answer's leading space is inside
# the generation block: with "ASSISTANT: " a BPE would merge that space into the first answer token in
# training only.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- set text = namespace(value='') -%}
    {%- if message.role == 'user' -%}{{ 'USER: ' }}{%- endif -%}
    {%- if message.content is string -%}{%- set text.value = message.content -%}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}{{ '<image>\\n' }}
            {%- else -%}{%- set text.value = text.value + part.text -%}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}
        {{ 'ASSISTANT:' }}{% generation %}{{ ' ' + text.value + eos_token }}{% endgeneration %}
    {%- else -%}{{ text.value + ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


class Llava(nn.Module):
    """The parts under the names of the stock model, so that each can be frozen, shared and forked by
    itself."""

    def __init__(self, stock: LlavaForConditionalGeneration, processor: LlavaProcessor):
        super().__init__()
        self.config = stock.config
        self.processor = processor
        self.vision_tower = stock.model.vision_tower
        self.multi_modal_projector = stock.model.multi_modal_projector
        self.language_model = stock.model.language_model
        self.lm_head = (
            stock.lm_head
        )  # shares its weight with language_model.embed_tokens where the LLM ties them

    # ------------------------------------------------------------------ where it comes from

    @classmethod
    def from_parts(cls, vision: str, llm: str) -> Llava:
        """A new model from a pre-trained tower and LLM (hub names or folders) and a fresh projector."""
        try:
            tower_config = AutoConfig.from_pretrained(vision)
            tower_config = getattr(tower_config, "vision_config", tower_config)  # the image half of a SigLIP
            tower_config.vision_use_head = False  # the pooling head is never read
            tower = AutoModel.from_pretrained(vision, config=tower_config, dtype=torch.float32)
            image_processor = AutoImageProcessor.from_pretrained(vision)
            language = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(llm)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load --vision {vision} or --llm {llm}: {_first_line(error)}") from None
        tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if len(tokenizer) > language.config.vocab_size:  # Qwen's padding rows have room; others may not
            language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        has_cls = hasattr(
            tower.embeddings, "class_embedding"
        )  # CLIP's; SigLIP has none, all its tokens are used
        strategy = "default" if has_cls else "full"
        n_patches = (tower_config.image_size // tower_config.patch_size) ** 2
        config = LlavaConfig(
            vision_config=tower_config,
            text_config=language.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=n_patches,
            projector_hidden_act="gelu",
            vision_feature_layer=-2,
            vision_feature_select_strategy=strategy,
            tie_word_embeddings=language.config.tie_word_embeddings,
        )
        with torch.device("meta"):
            stock = LlavaForConditionalGeneration(config)
        stock.model.vision_tower = tower
        stock.model.multi_modal_projector = Projector(tower_config.hidden_size, language.config.hidden_size)
        stock.model.language_model = language.model
        stock.lm_head = language.lm_head
        processor = LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=tower_config.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(has_cls),
            chat_template=CHAT_TEMPLATE,
            image_token=IMAGE_TOKEN,
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        return cls(stock, processor)

    @classmethod
    def from_checkpoint(cls, path: str, dtype: torch.dtype = torch.float32) -> Llava:
        """A LLaVA-format checkpoint, own or published (hub name or folder)."""
        try:
            config = AutoConfig.from_pretrained(path)
            if config.model_type != "llava":
                raise InputError(
                    f"{path} holds a '{config.model_type}' model: give a LLaVA-format checkpoint"
                )
            stock, report = LlavaForConditionalGeneration.from_pretrained(
                path, dtype=dtype, output_loading_info=True
            )
            processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the checkpoint {path}: {_first_line(error)}") from None
        if report["missing_keys"] or report["mismatched_keys"]:
            lost = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            raise InputError(f"{path} lacks {len(lost)} of the model's weights, the first is {lost[0]}")
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return cls(stock, processor)

    # ------------------------------------------------------------------ what it computes

    @property
    def n_visual_tokens(self) -> int:
        """Np: the tokens that one image becomes."""
        tower = self.config.vision_config
        cls_tokens = self.vision_tower.embeddings.num_positions - (tower.image_size // tower.patch_size) ** 2
        dropped = 1 if self.config.vision_feature_select_strategy == "default" else 0
        return (tower.image_size // tower.patch_size) ** 2 + cls_tokens - dropped

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (n, 3, H, W) -> Z_v (n, Np, C), the frozen tower's hidden state at
        `vision_feature_layer`.

        The layers above that one and the pooling head are not computed. n may be 0.
        """
        if not len(pixel_values):  # the tower's attention cannot reshape nothing
            return pixel_values.new_zeros(0, self.n_visual_tokens, self.config.vision_config.hidden_size)
        n_layers = len(self.vision_tower.encoder.layers)
        depth = range(n_layers + 1)[self.config.vision_feature_layer]  # hidden state 0 is the embedding
        x = self.vision_tower.embeddings(pixel_values.to(self.vision_tower.dtype))
        if hasattr(self.vision_tower, "pre_layrnorm"):  # CLIP has one, SigLIP has none
            x = self.vision_tower.pre_layrnorm(x)
        for layer in self.vision_tower.encoder.layers[:depth]:
            x = layer(x, attention_mask=None)
        return x[:, 1:] if self.config.vision_feature_select_strategy == "default" else x

    def forward(self, input_ids: Tensor, attention_mask: Tensor, features: Tensor) -> Tensor:
        """input_ids, attention_mask (B, T), features Z_v (n, Np, C) in reading order -> hidden (B, T, D).

        With n = 0 the projector still runs, on no rows: its gradient is zero rather than missing, so ranks
        whose batch has no image take part in the gradient exchange like any other.
        """
        h = self.language_model.embed_tokens(input_ids)  # (B, T, D)
        h_v = self.multi_modal_projector(
            features.to(self.multi_modal_projector.linear_1.weight.dtype)
        )  # (n, Np, D)
        at_image = (input_ids == self.config.image_token_index).unsqueeze(-1)  # (B, T, 1)
        h = h.masked_scatter(at_image, h_v.to(h.dtype))
        return self.language_model(
            inputs_embeds=h, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    # ------------------------------------------------------------------ teacher and student together

    def check_teacher(self, teacher: Llava) -> None:
        """Refuse a teacher that does not see the student's sequence or does not speak its tokens."""
        mine, theirs = self.processor.tokenizer.get_vocab(), teacher.processor.tokenizer.get_vocab()
        if mine != theirs:
            token = min(t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t))
            raise InputError(
                "teacher and student must share the tokenizer: the student's has "
                f"{len(mine)} tokens, the teacher's {len(theirs)}; {token!r} is id {mine.get(token)} for the "
                f"student and {theirs.get(token)} for the teacher. Take both from one LLM family"
            )
        if self.n_visual_tokens != teacher.n_visual_tokens:
            raise InputError(
                f"an image is {self.n_visual_tokens} tokens for the student and {teacher.n_visual_tokens} "
                "for the teacher: both must see the same sequence. Take vision towers with as many patches"
            )

    def shares_encoder(self, teacher: Llava) -> bool:
        """True if `teacher` computes the same visual features Z_v, so that one pass through the tower
        serves both."""
        if type(self.vision_tower) is not type(teacher.vision_tower):
            return False
        a, b = self.vision_tower.state_dict(), teacher.vision_tower.state_dict()
        return (
            self.processor.image_processor.to_dict() == teacher.processor.image_processor.to_dict()
            and self.config.vision_feature_layer == teacher.config.vision_feature_layer
            and self.config.vision_feature_select_strategy == teacher.config.vision_feature_select_strategy
            and a.keys() == b.keys()
            and all(a[k].shape == b[k].shape and torch.equal(a[k].to(b[k].dtype), b[k]) for k in a)
        )

    # ------------------------------------------------------------------ where it goes

    def save(self, out: str | Path) -> None:
        """Write a checkpoint that `LlavaForConditionalGeneration` and `AutoProcessor` load unchanged."""
        with torch.device("meta"):
            stock = LlavaForConditionalGeneration(self.config)
        stock.model.vision_tower = self.vision_tower
        stock.model.multi_modal_projector = self.multi_modal_projector
        stock.model.language_model = self.language_model
        stock.lm_head = self.lm_head
        tokenizer = self.processor.tokenizer
        stock.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        stock.save_pretrained(out)
        self.processor.save_pretrained(out)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class Projector(nn.Module):
    """MLP of two layers with a GELU between (LLaVA-KD §3.1): Z_v (n, Np, C) -> H_v (n, Np, D)."""

    def __init__(self, vision_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(z)))  # (n, Np, D)
