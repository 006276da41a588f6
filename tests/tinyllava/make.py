"""Makes the checkpoints of this folder with TinyLLaVA's own code, and notes what that code says of them.

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 transformers==4.40.1 accelerate==0.27.2 \\
        peft==0.10.0 "numpy<2" pillow requests einops einops-exts
    git clone https://github.com/TinyLLaVA/TinyLLaVA_Factory && git -C TinyLLaVA_Factory checkout 53f12c7
    ENV/bin/python tests/tinyllava/make.py TinyLLaVA_Factory WORK

WORK is a folder for what is made on the way; what is kept goes beside this file, in about four minutes.
Stubbed are deepspeed, with which TinyLLaVA gathers weights from several GPUs, and of the Trainer all but what
its `save_model` does. Python 3.11 takes only hashable defaults in dataclasses, so formatters are made that.

A model learns to answer about eight pictures with TinyLLaVA's own data set and loss, so that its answers
depend on what it sees, and end. Beside tied embeddings the files have weights of a head, as after training
with ZeRO-3; here they are noise, since TinyLLaVA passes over them. Arithmetic is in fp32, as in its loader.
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import transformers as hf
from PIL import Image
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer

HERE = Path(__file__).resolve().parent
HEAD = "language_model.lm_head.weight"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Tower, language model, how images are made square, and the layer that is read.
MODELS = {
    "base": ("siglip", "qwen2_base", "square", -2),
    "pad": ("siglip", "qwen2_base", "pad", -1),
    "instruct": ("siglip", "qwen2_instruct", "square", -2),
    "clip": ("clip", "qwen2_base", "pad", -2),
}
COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "yellow": (240, 220, 40),
          "white": (250, 250, 250), "black": (8, 8, 8), "orange": (250, 140, 20), "purple": (130, 30, 160)}
QUESTION = "What is in the picture?"
TEXTS = {"Who are you?": "A small model.", "Is it large?": "no"}


def talk(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


# Conversations, and whether they have a picture.
TALKS = [
    (talk(f"<image>\n{QUESTION}", "a red block", "Is it large?", "no"), True),
    (talk("Is it large?", "no", f"<image>\n{QUESTION}", "a blue block"), True),
    (talk(f"{QUESTION}\n<image>", "a red block"), True),
    (talk("<image>", "a red block"), True),
    (talk("Who are you?", "A small model."), False),
    ([{"from": "system", "value": "Answer in verse."}, *talk("<image>\nWho?", "me")], True),
    (talk("<image>\nCafe\u0301, 123?", "caf\u00e9\r\n  3.50 <b", "\u732b\u3068\U0001f431?", "\u732b"), True),
]


def import_from(checkout: Path) -> SimpleNamespace:
    """What TinyLLaVA's packages export, with stubs for what this needs none of."""
    sys.path.insert(0, str(checkout))
    stub, packages = ModuleType("deepspeed"), ["deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero"]
    stub.__spec__, stub.zero, stub.ZeroParamStatus = importlib.util.spec_from_loader("deepspeed", None), 0, 0
    sys.modules |= dict.fromkeys([*packages, "deepspeed.runtime.zero.partition_parameters"], stub)
    path = checkout / "tinyllava/data/template/formatter.py"
    spec = importlib.util.spec_from_file_location("tinyllava.data.template.formatter", path)
    sys.modules[spec.name] = formatter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formatter)
    for kind in formatter.EmptyFormatter, formatter.StringFormatter:
        kind.__hash__ = object.__hash__
    names = ("data", "model", "utils", "training_recipe.base")
    return SimpleNamespace(**{k: v for name in names
                              for k, v in vars(importlib.import_module(f"tinyllava.{name}")).items()})


def write_parts() -> None:
    """Pictures, two language models (tied with one end token, untied with the other) and two towers."""
    (HERE / "pictures").mkdir(exist_ok=True)
    for k, color in enumerate(COLORS.values()):
        picture = Image.new("RGB", (20 + 7 * k % 30, 44 - 9 * k % 31), (90, 100, 110))
        picture.paste(color, (2 + k, 3, 14 + k, 17 - k // 2))
        picture.save(HERE / f"pictures/{k}.png")
    system = "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: "
    texts = [QUESTION, *TEXTS, *TEXTS.values(), *(f"a {color} block" for color in COLORS), system]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts * 2, vocab_size=330, min_frequency=2, show_progress=False)
    bpe.save_model(".")
    tokenizer = hf.Qwen2Tokenizer("vocab.json", "merges.txt", pad_token="<|endoftext|>",
                                  additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    for name, end in ("qwen2_base", "<|endoftext|>"), ("qwen2_instruct", "<|im_end|>"):
        tokenizer.eos_token = end
        tokenizer.save_pretrained(name)
        config = hf.Qwen2Config(
            vocab_size=336, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=512,
            initializer_range=0.2, tie_word_embeddings=name == "qwen2_base",
            eos_token_id=tokenizer.eos_token_id,
        )
        hf.Qwen2ForCausalLM(config).save_pretrained(name)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
             "image_size": 24, "patch_size": 8}
    hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes)).save_pretrained("siglip")
    hf.SiglipImageProcessor(size={"height": 24, "width": 24}).save_pretrained("siglip")
    hf.CLIPVisionModel(hf.CLIPVisionConfig(**sizes, initializer_factor=4.0)).save_pretrained("clip")
    hf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24).save_pretrained("clip")


def train(tiny: SimpleNamespace, model: torch.nn.Module, template: str) -> None:
    samples = [{"image": f"{k}.png", "conversations": talk(f"<image>\n{QUESTION}", f"a {color} block")}
               for k, color in enumerate(COLORS)]
    samples += [{"conversations": talk(*pair)} for pair in TEXTS.items()]
    samples += [{"image": "0.png", "conversations": TALKS[0][0]}]
    Path("data.json").write_text(json.dumps(samples))
    aspect, image_processor = model.config.image_aspect_ratio, model.vision_tower._image_processor
    module = tiny.make_supervised_data_module(model.tokenizer, SimpleNamespace(
        data_path="data.json", image_folder=HERE / "pictures", conv_version=template, is_multimodal=True,
        image_processor=image_processor, image_aspect_ratio=aspect))
    batch = module["data_collator"](list(module["train_dataset"]))
    model.requires_grad_(True).vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(500):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"last loss {loss.item():.4f}")


def write_checkpoint(tiny: SimpleNamespace, name: str) -> str:
    """As TinyLLaVA's train.py does: from its arguments to its recipe's `save` after fine-tuning."""
    tower, llm, aspect, layer = MODELS[name]
    config = tiny.TinyLlavaConfig()
    config.load_from_config(tiny.ModelArguments(
        model_name_or_path=llm, vision_tower=tower, connector_type="mlp2x_gelu", mm_vision_select_layer=layer,
        model_max_length=2048))
    model = tiny.TinyLlavaForConditionalGeneration(config)
    model.load_llm(model_name_or_path=llm, attn_implementation=None, torch_dtype=torch.float32)
    model.load_vision_tower(model_name_or_path=tower)
    model.load_connector(connector_type="mlp2x_gelu")
    recipe = tiny.BaseTrainingRecipe(SimpleNamespace(
        tune_type_llm="full", tune_type_vision_tower="frozen", tune_type_connector="full",
        tune_vision_tower_from_layer=0, gradient_checkpointing=False, output_dir=f"{name}-finetune",
        pretrained_model_path=f"{name}-pretrain"))
    model = recipe(model)
    model.config.image_aspect_ratio = aspect
    train(tiny, model, llm)
    tied = config.text_config.tie_word_embeddings
    dtype, shards = (torch.float16, "5GB") if tied else (torch.bfloat16, "30KB")
    model.to(dtype).config.text_config.torch_dtype = dtype
    weights = model.state_dict()
    weights |= {HEAD: torch.randn_like(weights[HEAD])} if tied else {}
    save = lambda out: model.save_pretrained(out, state_dict=weights, max_shard_size=shards)
    recipe.save(model, SimpleNamespace(deepspeed=False, save_state=lambda: None, save_model=save))
    return f"{name}-finetune"


@torch.no_grad()
def look(tiny: SimpleNamespace, name: str, checkpoint: str) -> tuple[dict, dict]:
    """Ids, learned positions and answers; logits and pixels. Of TinyLLaVA's loader, template and model."""
    model, tokenizer, image_processor, _ = tiny.load_pretrained_model(checkpoint, device="cpu")
    write = tiny.TextPreprocess(tokenizer, MODELS[name][1])
    pictures = [Image.open(HERE / f"pictures/{k}.png").convert("RGB") for k in range(len(COLORS))]
    see = lambda k: tiny.ImagePreprocess(image_processor, model.config)(pictures[k])[None]
    prompts, answers, talks, tensors = {}, [], [], {}
    asked = [(QUESTION, k) for k in range(len(COLORS))] + [(text, None) for text in TEXTS]
    for text, k in [*asked, ("Is it large?", 5), ("Who are you?", 2), ("What is it?", 7)]:  # untrained ones
        message = tiny.Message()
        message.add_message(text if k is None else f"<image>\n{text}")
        ids = write(message.messages, mode="eval")["input_ids"]
        new = model.generate(
            ids[None], images=None if k is None else see(k).half(), pad_token_id=tokenizer.pad_token_id,
            do_sample=False, num_beams=1, max_new_tokens=16, use_cache=True)
        answer = tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip()
        answers.append({"text": text, "image": k, "answer": answer})
        prompts[message.messages[0]["value"]] = ids.tolist()
    for messages, has_image in TALKS:
        coded = write(json.loads(json.dumps(messages)))
        ids, labels = coded["input_ids"][None], coded["labels"][None]
        *_, labels = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, labels, see(0))
        labels = labels[0].tolist()
        talks.append({"conversations": messages, "image": has_image, "ids": ids[0].tolist(), "n": len(labels),
                      "learned": [[t, label] for t, label in enumerate(labels) if label != -100]})
    caption = tiny.TextPreprocess(tokenizer, "pretrain")(talk("<image>\nSay.", "a red block"))["input_ids"]

    def note(what: str, k: int, **override: object) -> None:
        given = {key: getattr(model.config, key) for key in override}
        model.config.update(override)
        logits = model(input_ids=torch.tensor([talks[k]["ids"]]), images=see(0)).logits
        tensors[f"{name} logits {what}"] = logits[0, -24:, ::8].contiguous()
        model.config.update(given)

    note("picture", 0)
    note("text", 4)
    note("layer -3", 0, vision_feature_layer=-3)
    note("cls_patch", 0, vision_feature_select_strategy="cls_patch")
    for aspect in "square", "pad":
        model.config.image_aspect_ratio = aspect
        tensors[f"{name} pixels {aspect}"] = torch.cat([see(0), see(3)])[..., ::4].contiguous()
    values = {"prompts": prompts, "answers": answers, "talks": talks, "caption": caption.tolist()}
    return values, tensors


def main(checkout: str, work: str) -> None:
    tiny = import_from(Path(checkout).resolve())
    Path(work).mkdir(parents=True, exist_ok=True)
    os.chdir(work)  # so that config.json has no machine's paths
    torch.manual_seed(0)
    torch.set_num_threads(1)
    write_parts()
    values, tensors = {}, {}
    for name in MODELS:
        checkpoint = write_checkpoint(tiny, name)
        values[name], noted = look(tiny, name, checkpoint)
        tensors |= noted
        shutil.copytree(checkpoint, HERE / name, dirs_exist_ok=True)
    (HERE / "values.json").write_text(json.dumps(values, separators=(",", ":")) + "\n")
    save_file(tensors, HERE / "values.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
