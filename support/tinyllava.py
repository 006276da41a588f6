"""TinyLLaVA's checkpoints (of its Factory, and of LLaVA-KD, which is built on it) read as stock LLaVA ones.

Nothing is written to disk, and no code of a checkpoint is run. Two things do not stand in its files: the
template, one text for all models up to the end token, and how images are prepared, which follows from the
tower. Its strategy `patch` drops the first token of SigLIP too, which has no class token: 728 of 729 patches
are seen, in training and after it. Stock LLaVA's `default` does the same.
"""

import transformers as hf
from transformers.utils import has_file

from support.chat import IMAGE_TOKEN
from support.flags import require

# Prompts end without a space, and nothing stands between an end token and the next turn. As there, a system
# turn is left out. The template among the tokenizer's files is Qwen's, which was never trained.
TEMPLATE = """\
{{- "A chat between a curious user and an artificial intelligence assistant. " -}}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- for m in messages if m.role != 'system' -%}
    {%- set parts = [{'type': 'text', 'text': m.content}] if m.content is string else m.content -%}
    {%- set images = parts | selectattr('type', 'equalto', 'image') | list | length -%}
    {%- set text = '<image>\\n' * images + parts | map(attribute='text', default='') | join -%}
    {%- if m.role == 'user' -%}{{ 'USER: ' + text | trim + ' ' }}{%- else -%}
    {{ 'ASSISTANT:' }}{% generation %}{{ ' ' + text + eos_token }}{% endgeneration %}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
ENDS = ["<|endoftext|>", "<|im_end|>"]
STRATEGIES = {"patch": "default", "cls_patch": "full"}
# Of the keys of config.json the values that were compared with TinyLLaVA's own code, and why no others.
READABLE = {
    "auto_map": ([None], "it names code, which is never run; without this key the weights can be read"),
    "connector_config": ([None], "TinyLLaVA's later form has other names for its weights"),
    "connector_type": (["mlp2x_gelu"], "stock LLaVA's projector has two layers with a GELU between"),
    "vision_model_name_or_path2": ([None], "stock LLaVA has one tower"),
    "text_config.model_type": (["qwen2"], "other language models have other tokens, templates and heads"),
    "vision_feature_select_strategy": ([*STRATEGIES], "it says which tokens of the tower are seen"),
    "image_aspect_ratio": (["square", "pad"], "stock LLaVA sees an image as one square"),
}
# What a folder holds that has this file, in the order of looking; None: a whole model.
FORMS = {"model.safetensors": None, "model.safetensors.index.json": None,
         "language_model/config.json": "its parts in folders (language_model/, vision_tower/, connector/)"}
NAMES = {r"^vision_tower\._vision_tower": "vision_tower",
         r"^connector\._connector\.0": "multi_modal_projector.linear_1",
         r"^connector\._connector\.2": "multi_modal_projector.linear_2"}


def own_config(path: str) -> dict | None:
    """What config.json says, if it is TinyLLaVA's."""
    given, _ = hf.PretrainedConfig.get_config_dict(path)
    return given if given.get("model_type") == "tinyllava" else None


def read_config(path: str) -> hf.PretrainedConfig:
    """The config of a TinyLLaVA checkpoint as stock LLaVA's, in which the image token is not set yet."""
    given = own_config(path)
    for key, (readable, why) in READABLE.items():
        section, _, name = key.rpartition(".")
        value = (given.get(section, {}) if section else given).get(name) or None
        wanted = " or ".join("absent" if v is None else repr(v) for v in readable)
        wrong = f"{path}: {key} is {value!r} in its config.json and must be {wanted}"
        require(value in readable, f"{wrong}: {why}; give another checkpoint")
    tower = given.get("vision_model_name_or_path") or ""
    other = f"{path} has the tower {tower}, and SigLIP 2 resizes images otherwise; give one with SigLIP"
    require("siglip2" not in tower.lower(), other)
    keys = {"vision_feature_layer": given.get("vision_feature_layer"), "dtype": given.get("torch_dtype"),
            "vision_feature_select_strategy": STRATEGIES[given["vision_feature_select_strategy"]]}
    return hf.LlavaConfig(text_config=given["text_config"], vision_config=given["vision_config"], **keys)


def read(path: str) -> tuple[hf.LlavaConfig, hf.LlavaProcessor, dict] | None:
    """Of a TinyLLaVA checkpoint: config, processor, and what `from_pretrained` needs to load the weights."""
    given = own_config(path)
    if given is None:
        return None
    config, none = read_config(path), "no model.safetensors (.bin files can hold code)"
    form = next((form for file, form in FORMS.items() if has_file(path, file)), none)
    advice = "put it together in TinyLLaVA, and save model and tokenizer with save_pretrained"
    require(form is None, f"{path} has {form}, where one whole model is needed: {advice}")
    tokenizer = hf.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    end = f"{path}: its tokenizer's end token is {tokenizer.eos_token!r} and must be {' or '.join(ENDS)}"
    require(tokenizer.eos_token in ENDS, f"{end}: with that its answers were trained to end")
    tokenizer.add_tokens(hf.AddedToken(IMAGE_TOKEN, special=True, normalized=False))
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    side, half = config.vision_config.image_size, [0.5] * 3
    square = {"height": side, "width": side}
    kind, how = hf.SiglipImageProcessorPil, {"size": square, "image_mean": half, "image_std": half}
    if config.vision_config.model_type == "clip_vision_model":
        kind, how = hf.CLIPImageProcessorPil, {"size": {"shortest_edge": side}, "crop_size": square}
    if given["image_aspect_ratio"] == "pad":
        kind, how = hf.LlavaImageProcessorPil, how | {"do_pad": True, "do_center_crop": False}
    processor = hf.LlavaProcessor(kind(**how), tokenizer, chat_template=TEMPLATE)
    # A copy of a tied head may be stored. TinyLLaVA passes over it; here it would be no longer tied.
    names = NAMES | ({r"^language_model\.lm_head": "unused"} if config.tie_word_embeddings else {})
    ends = {tokenizer.eos_token_id, config.text_config.eos_token_id} - {None}
    stops = hf.GenerationConfig(eos_token_id=[*ends], pad_token_id=tokenizer.pad_token_id)
    return config, processor, {"config": config, "key_mapping": names, "generation_config": stops}
