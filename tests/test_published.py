"""A stand-in for a published checkpoint teaches and learns in every stage, and goes back into stock tools.

python -m pytest tests/test_published.py
"""

import json
from types import SimpleNamespace

import torch
from conftest import data_flags, log_of, turns
from test_chat import INTERLEAVE, published
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

import ckd
import dft
import dpt
import evaluate
import mod_distill
import sft
from model import Llava


def test_through_every_stage_and_back_into_stock(parts, world, tmp_path):
    teacher = published(tmp_path / "teacher", parts, template=INTERLEAVE)
    flags = lambda stage: data_flags(world, out=tmp_path / stage, max_steps=1, micro_batch=4)
    new = ["--vision", parts["vision"], "--llm", parts["small"]]
    dpt.main([*new, "--teacher", teacher, *flags("dpt")])
    sft.main(["--student", str(tmp_path / "dpt"), *flags("sft")])
    dft.main(["--student", str(tmp_path / "sft"), "--teacher", teacher, *flags("dft")])
    sparse = ["--step", "d2s", "--student", str(tmp_path / "dft"), "--teacher", teacher]
    mod_distill.main([*sparse, *flags("d2s")])
    for stage in "dpt", "dft", "d2s":
        (line,) = log_of(tmp_path / stage)
        assert 0 < line["loss"] < 100
    for stage in "dft", "d2s":
        path = tmp_path / stage
        stock, report = LlavaForConditionalGeneration.from_pretrained(path, output_loading_info=True)
        assert not report["unexpected_keys"]
        assert AutoProcessor.from_pretrained(path).chat_template == INTERLEAVE
        mine = Llava.from_checkpoint(str(path))
        ids = torch.tensor([mine.chat.ids("what color ?")])
        with torch.no_grad():
            h = mine(ids, mine.encode_images(torch.zeros(0, 3, 16, 16)))
            assert torch.allclose(stock(ids).logits, h @ mine.lm_head.weight.T, atol=1e-4)


def test_it_is_the_teacher_of_a_cascade(parts, world, tmp_path):
    teacher = published(tmp_path / "teacher", parts, vocab=1520)
    words = data_flags(world, out=tmp_path / "out", max_steps=1)[:-1]
    flags = dict(zip(words[::2], words[1::2]))
    data, lr, batch = flags.pop("--data"), flags.pop("--lr"), flags.pop("--global_batch")
    for stage in "pretrain", "finetune":
        flags |= {f"--{stage}_data": data, f"--{stage}_lr": lr, f"--{stage}_batch": batch}
    flags |= {"--vision": parts["vision"], "--llm": parts["small"], "--teachers": teacher}
    ckd.main(["--no-group_by_modality", *(word for flag in flags.items() for word in flag)])
    student = Llava.from_checkpoint(str(tmp_path / "out/1-teacher/dft"))
    assert student.chat.template == Llava.from_checkpoint(teacher).chat.template


def test_a_student_of_a_published_template_learns_to_stop(parts, world, tmp_path):
    """Trained on one answer it says that, once, through evaluate.py and through transformers' pipeline."""
    start = published(tmp_path / "start", parts, vocab=400, template=INTERLEAVE)
    sample = {"image": "0.png", "conversations": turns("<image>\nhow many objects ?", "two")}
    (tmp_path / "d.json").write_text(json.dumps([sample] * 8))
    flags = data_flags(world, data=tmp_path / "d.json", out=tmp_path / "out", epochs=30, lr=0.01)
    sft.main(["--student", start, *flags])
    question = {"question_id": 0, "text": "how many objects ?", "images": ["0.png"], "where": "question 0"}
    args = SimpleNamespace(dtype="fp32", suffix="", batch=4, images=str(world / "images"), max_new_tokens=20)
    assert evaluate.generate(str(tmp_path / "out"), [question], args, tmp_path / "said.jsonl") == ["two"]
    ask = pipeline("image-text-to-text", model=str(tmp_path / "out"))
    content = [{"type": "image", "path": str(world / "images/0.png")}]
    content += [{"type": "text", "text": question["text"]}]
    (said,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=20, return_full_text=False)
    assert said["generated_text"].strip() == "two"
