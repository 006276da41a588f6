"""Looking at a data set: what is found and named, the exit code, and the colours of tokens."""

import json
import re
from pathlib import Path

import pytest
from conftest import NP, ROOT, turns
from PIL import Image

from lab import look
from support.flags import InputError
from support.run import code_of

ASK = "<image>\nhow many circle ?"


@pytest.fixture
def seen(tmp_path, checkpoints, capsys):
    """Look at these samples; the exit code and what is printed. There are images 0.png to 3.png."""
    for k in range(4):
        Image.new("RGB", (20, 30)).save(tmp_path / f"{k}.png")

    def look_at(samples: list | str, *flags: str, more: str = "") -> tuple[int, str]:
        text = samples if isinstance(samples, str) else json.dumps(samples)
        (tmp_path / "data.json").write_text(text)
        files = [str(tmp_path / name) for name in ("data.json", more) if name]
        argv = [*files, "--images", str(tmp_path), "--model", checkpoints["small"]]
        return look.main([*argv, *flags]), capsys.readouterr().out.replace(f"{tmp_path}/", "")

    return look_at


def count(printed: str, label: str) -> int:
    return int(re.search(rf"^  {re.escape(label)} +([\d,]+)", printed, re.M).group(1))


def painted(printed: str) -> list[list[tuple[str, str]]]:
    """Of every sample that is shown: (what reads the rows, text) of its runs of tokens."""
    names = {code: name.split(":")[0] for code, name in look.READERS.values()}
    lines = [re.findall("\033\\[([\\d;]+)m(.*?)\033\\[0m", line) for line in printed.splitlines()]
    return [[(names[code], text) for code, text in line] for line in lines if line][1:]  # without the legend


def test_a_sound_file_is_fit_and_its_samples_are_counted_by_kind(seen):
    samples = [{"image": f"{k}.png", "conversations": turns(ASK, "two")} for k in range(3)]
    samples += [{"image": ["0.png", "3.png"], "conversations": turns(f"<image> {ASK}", "two")}]
    samples += [{"conversations": turns("how many ?", "two", "is there a square ?", "no")}]
    code, printed = seen(samples)
    assert code == 0
    assert printed.splitlines()[-1].startswith("fit to train on: the images of 5 samples were read")
    assert [count(printed, label) for label in look.LABELS] == [1, 3, 1, 0, 0, 0]


def test_all_that_is_wrong_is_named_and_the_last_line_says_what(seen, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    sound = {"image": "0.png", "conversations": turns(ASK, "two")}
    samples = [sound, {"id": 7}, sound | {"image": "none.png"}, sound | {"image": "broken.png"}]
    code, printed = seen(samples)
    assert code == 1
    assert count(printed, "would stop a run") == 3
    assert printed.splitlines()[-1] == "not fit to train on: 3 samples would stop a run"
    assert "    data.json sample 1 has no 'conversations' list; it has" in printed
    assert "    data.json sample 2 (id None): image none.png does not exist" in printed
    assert "    data.json sample 3 (id None): image broken.png cannot be read" in printed
    code, printed = seen([sound, sound | {"image": "broken.png"}], "--decode", "0")
    assert code == 0
    assert "fit to train on: the images of 0 samples were read" in printed


def test_what_is_not_read_is_named_in_every_file(seen, tmp_path):
    sound = {"image": "0.png", "conversations": turns(ASK, "two")}
    other = {"image_path": "0.png", "conversations": turns("how many ?", "two")}
    (tmp_path / "more.json").write_text(json.dumps([sound, other, sound | {"history": ["x"]}]))
    code, printed = seen([sound, sound | {"image": "data:image/png;base64," + "A" * 9_000}], more="more.json")
    assert code == 1
    assert "data.json, more.json: 5 samples" in printed
    assert count(printed, "would stop a run") == 3
    assert "data.json sample 1: image path 'data:image/png;base64,AAA" in printed
    assert "more.json sample 1 has ['image_path'], but pictures are read from 'image'" in printed
    assert "more.json sample 2 has ['history'], which is not read" in printed
    assert len(printed) < 3_000


def test_a_conversation_that_the_tokenizer_cannot_write(seen, monkeypatch):
    def joins(encoder, messages, last_only=False):
        raise InputError("the tokenizer joins an answer with the text beside it")

    monkeypatch.setattr(look.Encoder, "__call__", joins)
    code, printed = seen([{"conversations": turns("how many ?", "two")}])
    assert code == 1
    assert "    data.json sample 0 (id None): the tokenizer joins an answer" in printed
    assert printed.splitlines()[-1] == "not fit to train on: 1 samples would stop a run"


def test_what_is_odd_is_counted_and_no_reason_to_stop(seen):
    samples = [
        {"image": "0.png", "conversations": turns("how many circle ?", "two")},
        {"image": "2.png", "conversations": turns(ASK, "two")},
        {"image": "2.png", "conversations": turns(f"{ASK} {'red ' * 40}", "two")},
        {"image": "2.png", "conversations": turns(ASK, "red " * 40)},
    ]
    code, printed = seen(samples, "--max_len", "30")
    assert code == 0
    assert count(printed, "images but no <image>") == count(printed, "left out by --max_len") == 1
    assert f"an image has {NP},\n  50.0% of the samples more than --max_len 30" in printed  # the long ones


def test_at_most_ten_are_named(seen):
    sound = {"conversations": turns("how many ?", "two")}
    code, printed = seen([sound] + [{"id": k} for k in range(12)])
    assert code == 1
    assert count(printed, "would stop a run") == 12
    assert printed.count("has no 'conversations'") == 10


@pytest.mark.parametrize("text, why", [("[", "is not valid JSON"), ("[{}]", "no sample that can be used")])
def test_a_file_without_a_sample_is_refused(seen, text, why):
    with pytest.raises(InputError, match=f"data.json.* {why}"):
        seen(text)


def test_tokens_are_coloured_by_the_rows_that_predict_the_next_one(seen):
    long = [{"image": "0.png", "conversations": turns(ASK, "two", "why ?", "it's\nso")}]
    _, printed = seen(long, "--show", "1")
    assert painted(printed) == [[
        ("prompt", "USER:"), ("nothing", " "), ("visual", f"<image> x {NP}"),
        ("prompt", r"\nhow many circle ? ASSISTANT"), ("response", ": two"),
        ("prompt", "<|endoftext|>USER: why ? ASSISTANT"), ("response", r": it's\nso"),
        ("nothing", "<|endoftext|>"),
    ]]
    _, printed = seen(long, "--show", "1", "--caption_only")
    visual = [
        ("visual", f"<image> x {NP - 1}"),
        ("both", "<image> x 1"),
    ]  # its last token's row predicts text
    assert painted(printed)[0][:2] == visual


def test_pairs_are_known_by_their_keys_and_both_answers_shown(seen):
    pair = {"image": "0.png", "question": ASK, "chosen": "two", "rejected": "a circle"}
    code, printed = seen([pair, pair | {"image": "1.png"}], "--show", "1")
    assert code == 0
    assert "data.json: 2 preference pairs" in printed
    said = [[text for reader, text in line if reader == "response"] for line in painted(printed)]
    assert said == [[": two"], [": a circle"]]


def test_a_part_is_spread_evenly():
    assert list(look.spread(10, 4)) == [0, 3, 6, 9]
    assert list(look.spread(3, 10)) == [0, 1, 2]
    assert list(look.spread(10, 0)) == list(look.spread(0, 10)) == []


def test_no_stage_depends_on_how_data_are_looked_at():
    assert not [file for file in code_of(Path(ROOT, "sft.py")) if file.startswith("lab")]
