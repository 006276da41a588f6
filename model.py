"""SigLIP + 2-layer GELU MLP + Qwen, assembled in the open (LLaVA-KD §3.1, arXiv 2410.16236v1).

    image -> vision tower -> Z_v (n, Np, C) -> projector -> H_v (n, Np, D)
    text  -> embedding    -> H_t (B, T, D), H_v written over its <image> positions -> LLM -> h (B, T, D)

The towers and language models themselves are those of transformers, and so is the format on disk: stock
`LlavaForConditionalGeneration` and `AutoProcessor` load what is saved here. The stages decide what is frozen.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers as hf
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from support.chat import Chat
from support.checkpoints import check_teacher, load_stock, published_names, see_alike
from support.flags import require


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

    def stock(self) -> hf.LlavaForConditionalGeneration:
        """The stock model around the same modules, which can generate: `student.stock().generate(...)`."""
        with torch.device("meta"):
            stock = hf.LlavaForConditionalGeneration(copy.deepcopy(self.config))
        stock.model.vision_tower, stock.model.language_model = self.vision_tower, self.language_model
        stock.model.multi_modal_projector, stock.lm_head = self.multi_modal_projector, self.lm_head
        return stock

    @property
    def n_visual_tokens(self) -> int:
        """Np: the tokens that one image becomes."""
        drops_cls = self.config.vision_feature_select_strategy == "default"
        return self.vision_tower.embeddings.num_positions - drops_cls

    def layers_that_see(self) -> list[nn.Module]:
        """The tower's layers up to vision_feature_layer (-2: all but the last); the others are not run."""
        layers = list(self.vision_tower.encoder.layers)
        return layers[: self.config.vision_feature_layer % (len(layers) + 1)]

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (n, 3, H, W), as data.py prepares them -> Z_v (n, Np, C); n may be 0.

        Departure: the paper says "the final transformer layer"; here it is the one before, as in LLaVA.
        """
        tower = self.vision_tower
        if not len(pixel_values):  # the tower's attention cannot reshape nothing
            shape = 0, self.n_visual_tokens, self.config.vision_config.hidden_size
            return torch.zeros(shape, dtype=tower.dtype, device=pixel_values.device)
        x = tower.embeddings(self.normalise(pixel_values).to(tower.dtype))
        if hasattr(tower, "pre_layrnorm"):  # CLIP's
            x = tower.pre_layrnorm(x)
        for layer in self.layers_that_see():
            x = layer(x, attention_mask=None)
        return x[:, 1:] if self.config.vision_feature_select_strategy == "default" else x

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """Bytes -> what the tower takes: the image processor's own last steps, done on the model's device."""
        how = self.processor.image_processor
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        x = pixel_values.float() * (how.rescale_factor if how.do_rescale else 1)  # (n, 3, H, W)
        if how.do_normalize:  # by numbers: tensors of them would have to be sent to the device each time
            x = torch.stack([(x[:, c] - how.image_mean[c]) / how.image_std[c] for c in range(3)], dim=1)
        return x

    def embed(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """input_ids (B, T), features Z_v (n, Np, C) in reading order -> H_t with H_v in it (B, T, D).

        With n = 0 the projector still runs, on no rows: its gradient is zero rather than missing, so ranks
        whose batch has no image take part in the gradient exchange like any other.
        """
        h = self.language_model.embed_tokens(input_ids)  # (B, T, D)
        h_v = self.multi_modal_projector(features.to(h.dtype))  # (n, Np, D)
        at_image = (input_ids == self.config.image_token_index).unsqueeze(-1)  # (B, T, 1)
        return h.masked_scatter(at_image, h_v.to(h.dtype))

    def forward(self, input_ids: Tensor, features: Tensor, **options) -> Tensor | hf.utils.ModelOutput:
        """The LLM's last hidden states h (B, T, D) of what `embed` gives: MoD Eq. (1) without its head. With
        options of the LLM, such as `output_hidden_states=True`, all of its outputs.

        Batches are padded on the right and attention is causal: no token sees padding, and no mask is needed.
        """
        config = self.language_model.config
        layers = [layer for layer in self.language_model.layers if hasattr(layer, "self_attn")]
        kinds = {c._attn_implementation for c in (config, *(layer.self_attn.config for layer in layers))}
        mixed = f"some layers attend by {' and some by '.join(sorted(kinds))}, which is not causal"
        require(len(kinds) == 1, f"{mixed}: language_model.set_attn_implementation('eager') is for all")
        mask = None
        if kinds == {"sdpa"} and set(getattr(config, "layer_types", ())) == {"full_attention"}:
            mask = {"full_attention": None}  # the same, but transformers looks for nothing in the batch
        h = self.embed(input_ids, features)
        outputs = self.language_model(inputs_embeds=h, attention_mask=mask, use_cache=False, **options)
        return outputs if options else outputs.last_hidden_state

    def save(self, out: str | Path) -> None:
        """Write a checkpoint that `LlavaForConditionalGeneration` and `AutoProcessor` load unchanged."""
        Path(out).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(published_names(self), str(out))  # safetensors, in shards if it must be
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


def load_teacher(path: str, student: Llava, dtype: torch.dtype) -> Llava:
    """The checkpoint `path`: frozen, on the student's device, checked against the student.

    It has no vision tower if it sees like the student: then one pass through the student's serves both.
    """
    teacher = Llava.from_checkpoint(path, dtype)
    teacher.to(student.lm_head.weight.device).eval().requires_grad_(False)
    check_teacher(student, teacher)
    if see_alike(student, teacher):
        teacher.vision_tower = None
    return teacher
