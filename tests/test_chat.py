"""Training and generation see the same ids, whatever the template; answers are learned to their end.

python -m pytest tests/test_chat.py
"""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import NP, ROOT, new_student
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor, SiglipImageProcessorPil

from data import Encoder
from model import Llava
from support.chat import CHAT_TEMPLATE, IGNORE, IMAGE_TOKEN, PROBE, Chat, turn
from support.checkpoints import check_teacher, see_alike
from support.flags import InputError

PARTS = "{% for c in m.content %}{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + PARTS + "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Roles followed by a blank, a newline inside the generation block, the end token outside of it.
INTERLEAVE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ '\n' + m.content[0].text }}{% endgeneration %}{% else %}{{ '\n' }}" + PARTS +
    "{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No end token anywhere, a blank behind every text.
VICUNA = (
    "{% for m in messages %}{{ 'ASSISTANT: ' if m.role == 'assistant' else 'USER: ' }}" + PARTS + "{{ ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}" + PARTS + "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content[0].text + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
TEMPLATES = {"own": (CHAT_TEMPLATE, "<|endoftext|>"), "chatml": (CHATML, "<|im_end|>"),
             "interleave": (INTERLEAVE, "<|im_end|>"), "vicuna": (VICUNA, ""),
             "llama": (LLAMA, " <|im_end|>")}


def processor_of(template: str, begin: bool = False) -> LlavaProcessor:
    """A byte-level BPE with this template; `begin`: it prepends a begin token, as Llama's does."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/toy/qwen-small")
    tokenizer.add_tokens([IMAGE_TOKEN, "<|im_start|>", "<|im_end|>"], special_tokens=True)
    if begin or template == LLAMA:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    if begin:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return LlavaProcessor(image_processor, tokenizer, patch_size=8, chat_template=template,
                          vision_feature_select_strategy="full")


def with_pictures(talk: list[dict]) -> list[dict]:
    picture = {"type": "image", "image": Image.new("RGB", (16, 16))}
    return [m | {"content": [picture if p["type"] == "image" else p for p in m["content"]]} for m in talk]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_prompt_is_what_stock_generation_is_asked_with(name, begin):
    """And the answer and an end token follow, learned; nothing else is."""
    processor = processor_of(TEMPLATES[name][0], begin)
    chat, tokenizer = Chat(processor), processor.tokenizer
    talk = [turn("user", "is there a cross ?", 1), turn("assistant", "a red circle"),
            turn("user", "left or right ?", 1), turn("assistant", "two")]
    encode = Encoder(SimpleNamespace(chat=chat, n_visual_tokens=NP), 2048)
    for k in 1, 3:
        ids, targets = encode(talk[: k + 1], last_only=True)
        first, n = next((t, t + 1) for t, target in enumerate(targets) if target != IGNORE)
        if name != "interleave" or k == 1:  # of its later turns the next test says more
            stock = processor.apply_chat_template(
                with_pictures(talk[:k]), add_generation_prompt=True, tokenize=True, return_dict=True
            )
            assert ids[:n] == list(stock["input_ids"][0])
        learned = [t for t in targets if t != IGNORE]
        answer = talk[k]["content"][0]["text"]
        assert learned[-1] == chat.end_id
        assert tokenizer.decode(learned[:-1]).strip() == answer
        assert ids[n : n + len(learned)] == learned[: len(ids) - n]  # what is learned is what comes next
        assert tokenizer.decode(ids[n:]).endswith(answer + TEMPLATES[name][1])
    both = [t for t in encode(talk)[1] if t != IGNORE]
    assert both.count(chat.end_id) == 2
    assert [t for t in encode(talk[:2])[1] if t != IGNORE] == both[: both.index(chat.end_id) + 1]


def test_a_template_that_rewrites_its_history_trains_on_its_own_prompts():
    """For every answer the generation prompt, although the template writes another one into the history."""
    processor = processor_of(INTERLEAVE)
    chat = Chat(processor)
    ids, _ = chat.encode(PROBE)
    assert processor.tokenizer.decode(ids) == (
        "<|im_start|>user \n<image>\nWhat is this?<|im_end|><|im_start|>assistant\nA cat.<|im_end|>"
        "<|im_start|>user \nWhy?<|im_end|><|im_start|>assistant\nIt purrs.<|im_end|>"
    )
    assert chat.end_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_end_token_that_the_template_lacks_is_learned_and_not_written():
    processor = processor_of(VICUNA)
    chat = Chat(processor)
    ids, targets = chat.encode(PROBE)
    eos = processor.tokenizer.eos_token_id
    assert eos not in ids
    assert [processor.tokenizer.decode(ids[t]) for t, target in enumerate(targets) if target == eos] == [
        ".",
        ".",
    ]
    assert processor.tokenizer.decode(ids).endswith("Why? ASSISTANT: It purrs.")


def test_of_several_end_tokens_behind_an_answer_the_first_is_learned():
    """What comes behind it belongs to the history, and what comes behind the last answer is left out."""
    chat = Chat(processor_of(CHATML.replace("'<|im_end|>\n'", "'<|im_end|>\n' + eos_token")))
    end, eos = (chat.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    assert chat.tokenizer.eos_token_id == eos != end == chat.end_id
    ids, y = chat.encode(PROBE)
    assert y.count(end) == 2 and eos not in y
    assert ids[-1] == end and ids.count(eos) == 3  # behind each turn but the last


def test_a_template_whose_history_is_no_beginning_is_refused():
    """As one that drops the first answer when there is a second question."""
    template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}" + PARTS + "{% endif %}{% endfor %}"
    )
    with pytest.raises(
        InputError, match=r"'<image>\\nWhat is this\?A cat\.', .* '<image>\\nWhat is this\?Why\?'"
    ):
        Chat(processor_of(template)).encode(PROBE)


def test_a_checkpoint_without_a_template_or_an_end_is_refused():
    processor = processor_of(CHATML)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        Chat(processor)
    processor = processor_of(CHATML)
    processor.tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no end token"):
        Chat(processor)
    with pytest.raises(InputError, match="leaves the answer out"):
        Chat(processor_of("{{ messages[0].content[0].text }}"))


def test_captions_begin_as_prompts_do():
    chat = Chat(processor_of(CHATML, begin=True))
    ids, targets = chat.caption([turn("user", "describe", 2), turn("assistant", "red circle")])
    assert chat.tokenizer.decode(ids) == "<s><image><image>red circle<|im_end|>"
    assert targets == [IGNORE, IGNORE, *ids[3:], IGNORE]
    bare = Chat(processor_of(CHATML))
    ids, targets = bare.caption([turn("user", "describe"), turn("assistant", "red circle")])
    assert targets == [*ids[1:], IGNORE]


def test_teacher_and_student_must_write_alike(checkpoints, tmp_path):
    """One end token for another is enough: the student would unlearn its own."""
    student, teacher = (
        Llava.from_checkpoint(checkpoints["small"]),
        Llava.from_checkpoint(checkpoints["large"]),
    )
    teacher.processor.chat_template = CHAT_TEMPLATE.replace("eos_token", "'<image>'")
    teacher.chat = Chat(teacher.processor)
    with pytest.raises(
        InputError, match=r"differently, 'USER: .*A cat.<\|endoftext\|>USER.* and 'USER: .*A cat.<image>"
    ):
        check_teacher(student, teacher)


def test_a_teacher_that_learned_another_end_is_refused(checkpoints):
    """Also where the template writes no end token, so that the ids are the same: only the targets differ."""
    student, teacher = (Llava.from_checkpoint(checkpoints[name]) for name in ("small", "large"))
    for model, end in (student, "<|endoftext|>"), (teacher, "<|im_end|>"):
        model.processor.tokenizer.add_tokens("<|im_end|>", special_tokens=True)
        model.processor.chat_template, model.processor.tokenizer.eos_token = VICUNA, end
        model.chat = Chat(model.processor)
    assert student.chat.encode(PROBE)[0] == teacher.chat.encode(PROBE)[0]
    ends = [model.chat.end_id for model in (student, teacher)]
    with pytest.raises(InputError, match="end token {}.* and .* with end token {};".format(*ends)):
        check_teacher(student, teacher)


def published(folder, parts, width=32, vocab=152_000, template=CHATML) -> str:
    """A stand-in for a published checkpoint, of stock transformers alone: ChatML, layer -1, bf16 shards, a
    padded vocabulary and `<image>` at the next free id.
    """
    from conftest import text_config, vision_config
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionModel

    processor = processor_of(template)
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text = text_config(width=width, vocab=vocab, tied=False)
    select = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_seq_length": NP}
    config = LlavaConfig(
        vision_config=vision_config(), text_config=text, image_token_index=image_id, **select
    )
    torch.manual_seed(4)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = SiglipVisionModel.from_pretrained(parts["vision"])
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    processor.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return str(folder)


def test_a_new_student_speaks_and_sees_as_its_teacher(parts, tmp_path):
    teacher = Llava.from_checkpoint(published(tmp_path / "teacher", parts), torch.bfloat16)
    student = new_student(parts["vision"], parts["small"], str(tmp_path / "teacher"))
    check_teacher(student, teacher)
    assert student.config.vision_feature_layer == -1
    assert see_alike(student, teacher)  # so that one pass of the tower serves both
    assert student.processor.chat_template == CHATML
    student.save(tmp_path / "student")
    ends = json.loads((tmp_path / "student/generation_config.json").read_text())["eos_token_id"]
    names = student.processor.tokenizer.convert_ids_to_tokens(ends)
    assert names == ["<|im_end|>", "<|endoftext|>"]  # what it learns to end with, and the tokenizer's own
    assert AutoProcessor.from_pretrained(tmp_path / "student").chat_template == CHATML
    own = new_student(parts["vision"], parts["small"])
    assert own.config.vision_feature_layer == -2
    assert own.processor.chat_template == CHAT_TEMPLATE


def test_a_student_keeps_the_image_preparation_of_its_own_kind_of_tower(parts, tmp_path):
    """A CLIP teacher's would be wrong for a SigLIP, also where the sizes are equal."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32,
                              num_hidden_layers=3, num_attention_heads=2)
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    crop = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=crop).save_pretrained(tmp_path / "clip")
    teacher = new_student(str(tmp_path / "clip"), parts["large"])
    teacher.save(tmp_path / "teacher")
    student = new_student(parts["vision"], parts["small"], str(tmp_path / "teacher"))
    check_teacher(student, teacher)
    assert type(student.processor.image_processor) is SiglipImageProcessorPil
    assert student.config.vision_feature_select_strategy == "full"
    assert not see_alike(student, teacher)


def test_a_teacher_whose_tower_was_cut_where_it_is_read(parts, tmp_path):
    """As published: 26 of SigLIP's 27 layers, and layer -1. The student's whole tower is read there too."""
    from transformers import AutoConfig

    teacher = Llava.from_checkpoint(published(tmp_path / "whole", parts), torch.bfloat16)
    teacher.vision_tower.encoder.layers = teacher.vision_tower.encoder.layers[:-1]
    teacher.config.vision_config.num_hidden_layers = 2
    teacher.save(tmp_path / "cut")
    assert AutoConfig.from_pretrained(tmp_path / "cut").vision_feature_layer == -1
    student = new_student(parts["vision"], parts["small"], str(tmp_path / "cut"))
    assert student.config.vision_feature_layer == -2
    assert see_alike(student, Llava.from_checkpoint(str(tmp_path / "cut"), torch.bfloat16))


def test_a_template_that_writes_no_image_is_refused():
    chat = Chat(processor_of(CHATML.replace("'<image>\n' if c.type == 'image' else c.text", "c.text")))
    with pytest.raises(InputError, match="leaves an image out"):
        chat.encode(PROBE)


@pytest.mark.parametrize("writes", ["m.content | string", "m.content | trim", "m.content | tojson"])
def test_a_template_for_texts_is_refused_and_not_asked_with_a_printed_list(writes):
    """As that of a language model alone: it would print the list of parts, if no image is asked about."""
    text, parts = "{{ " + writes + " }}", PARTS
    with pytest.raises(InputError, match="asks no question: .*type.*the texts of a list of parts"):
        Chat(processor_of(CHATML.replace(PARTS, text)))
    only_answers = "{% if m.role == 'user' %}" + parts + "{% else %}" + text + "{% endif %}"
    with pytest.raises(InputError, match="leaves the answer out: .*type"):
        Chat(processor_of(CHATML.replace(PARTS, only_answers)))


def test_a_tokenizer_that_ends_every_text_is_refused_unless_it_is_never_asked_to():
    def ending(template: str) -> LlavaProcessor:
        processor = processor_of(template, begin=True)
        ends = [(token, processor.tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_end|>")]
        both = TemplateProcessing(single="<s> $A <|im_end|>", special_tokens=ends)
        processor.tokenizer.backend_tokenizer.post_processor = both
        return processor

    with pytest.raises(InputError, match="an end token behind every text; take that out .* tokenizer.json"):
        Chat(ending(CHATML))
    chat = Chat(ending(LLAMA))  # it writes the begin token itself, so the tokenizer adds nothing
    assert chat.ids("<s>two")[1:] == chat.tokenizer("two", add_special_tokens=False)["input_ids"]
