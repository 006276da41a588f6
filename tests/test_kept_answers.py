"""Answers are kept while they are given, and never mixed with those of another model or question."""

import json
import re
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import evaluate
from lab.tasks import Task, score
from support.checkpoints import load_stock
from support.flags import InputError, to_argv


@pytest.fixture
def questions(world, tmp_path, monkeypatch) -> dict:
    """The flags of five questions, three at a time."""
    lines = [{"text": f"what color is {k} ?", "image": f"{4 * k}.png", "label": "red"} for k in range(5)]
    (tmp_path / "five.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    return {"questions": "five.jsonl", "images": world / "images", "batch": 3, "max_new_tokens": 6}


def without_seconds(answers: Path) -> str:
    return re.sub(r', "seconds": [0-9.]+}', "}", answers.read_text())


def asked_in(monkeypatch, kill_after: int = 9) -> list[int]:
    """The number of questions in each call of `generate`, from now on; more than so many calls fail."""
    calls, generate = [], LlavaForConditionalGeneration.generate

    def counted(self, input_ids, **more):
        if len(calls) == kill_after:
            raise KeyboardInterrupt
        calls.append(len(input_ids))
        return generate(self, input_ids=input_ids, **more)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", counted)
    return calls


def test_an_interrupted_evaluation_goes_on(questions, checkpoints, tmp_path, monkeypatch):
    flags = questions | {"model": checkpoints["small"]}
    clock = lambda step: SimpleNamespace(perf_counter=count(0, step).__next__)
    monkeypatch.setattr(evaluate, "time", clock(6))  # the seconds of a batch
    whole = evaluate.main(to_argv(out="whole", **flags))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        asked_in(patch, kill_after=1)
        evaluate.main(to_argv(**flags))
    kept = tmp_path / "out/eval/five/small.jsonl"
    assert [json.loads(line)["seconds"] for line in kept.read_text().splitlines()] == [2] * 3
    kept.write_text(kept.read_text()[:-9])  # as if it had been killed while it wrote the third
    calls = asked_in(monkeypatch)
    monkeypatch.setattr(evaluate, "time", clock(9))
    assert evaluate.main(to_argv(**flags)) == whole
    assert calls == [3]
    assert [json.loads(line)["seconds"] for line in kept.read_text().splitlines()] == [2, 2, 3, 3, 3]
    assert without_seconds(kept) == without_seconds(tmp_path / "whole/small.jsonl")
    lines = Path("five.jsonl").read_text()
    Path("five.jsonl").write_text(lines.replace('"red"', '"yes"'))
    assert evaluate.main(to_argv(metric="pope", **flags))["small"]["yes_ratio"] == 100
    assert calls == [3]  # other references and another metric need no new answers


def test_answers_that_are_cut_are_counted_those_that_were_kept_too(questions, checkpoints, tmp_path, capsys):
    flags = questions | {"model": checkpoints["small"]}
    cut = "small: 5 of 5 answers are cut: give a higher --max_new_tokens\n"
    for n, ends, said in (1, 371, cut), (6, [*range(448)], "small: accuracy"):
        model = shutil.copytree(checkpoints["small"], tmp_path / str(n) / "small")
        settings = json.loads((model / "generation_config.json").read_text()) | {"eos_token_id": ends}
        (model / "generation_config.json").write_text(json.dumps(settings))
        for _ in range(2):
            evaluate.main(to_argv(out=f"out{n}", **flags | {"model": model, "max_new_tokens": n}))
            assert capsys.readouterr().out.startswith(said)


CHANGED_FLAGS = {"suffix": " now", "max_new_tokens": 5, "dtype": "bf16"}
CHANGED_TEXTS = {  # of a file: what becomes what
    "text": ("five.jsonl", "color is 4", "color is 7"), "reorder": ("five.jsonl", "color is 3", "color is 4"),
    "question_id": ("five.jsonl", '{"text": "what color is 4', '{"question_id": 7, "text": "what color is 4'),
    "fewer": ("five.jsonl", '\n{"text": "what color is 4 ?", "image": "16.png", "label": "red"}', ""),
    "image": ("five.jsonl", "16.png", "17.png"), "template": ("small/chat_template.jinja", "USER: ", "USER:"),
    "preparation": ("small/processor_config.json", "0.5", "0.4"),
    "settings": ("small/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
    "ends": ("small/generation_config.json", '"eos_token_id": 371', '"eos_token_id": 370'),
}


@pytest.mark.parametrize("change", [*CHANGED_FLAGS, *CHANGED_TEXTS, "pixels", "weights", "twice"])
def test_answers_of_another_run_are_never_mixed_in(questions, checkpoints, world, monkeypatch, change):
    shutil.copytree(checkpoints["small"], "small")
    shutil.copytree(world / "images", "images")
    flags = questions | {"model": "small", "images": "images", "out": "out"}
    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", lambda self, input_ids, **_: input_ids)
    evaluate.main(to_argv(**flags))
    if change == "twice":  # as two processes at once would write
        Path("out/small.jsonl").write_text(2 * Path("out/small.jsonl").read_text())
    before = Path("out/small.jsonl").read_bytes()
    if change in CHANGED_FLAGS:
        flags[change] = CHANGED_FLAGS[change]
    elif change in CHANGED_TEXTS:
        name, old, new = CHANGED_TEXTS[change]
        text = Path(name).read_text()
        assert old in text
        Path(name).write_text(text.replace(old, new))
    elif change == "pixels":
        shutil.copy("images/8.png", "images/16.png")
    elif change == "weights":
        model, _ = load_stock("small", torch.float32)
        with torch.no_grad():
            model.model.multi_modal_projector.linear_2.bias[0] += 1e-3
        model.save_pretrained("small")
    with pytest.raises(InputError, match="small.jsonl holds answers to other questions.* take another --out"):
        evaluate.main(to_argv(**flags))
    assert Path("out/small.jsonl").read_bytes() == before


def test_a_second_file_of_questions_leaves_the_first_one_s_answers(questions, checkpoints, tmp_path):
    shutil.copy("five.jsonl", "more.jsonl")
    for name in "five", "more":
        flags = questions | {"questions": f"{name}.jsonl", "model": checkpoints["small"]}
        evaluate.main(to_argv(**flags))
    for name in "five", "more":
        written = {path.name for path in (tmp_path / "out/eval" / name).iterdir()}
        assert written == {"small.jsonl", "scores.json"}


def test_the_lab_lets_a_model_answer_anew(tmp_path, monkeypatch):
    """What is kept there may be by other code."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/small.jsonl").write_text("{}")
    seen = []
    monkeypatch.setattr(evaluate, "main", lambda argv: seen.append((argv, (tmp_path / "out").exists())))
    score(Task(score, "evaluate", ["--out", "out"], tmp_path / "out", [], {}))
    assert seen == [(["--out", "out"], False)]
