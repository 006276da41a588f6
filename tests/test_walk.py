"""The guided reading: a walk shows a stage's lines as they are and what they made; docs/walk.md is a walk.

The page's blocks are those lines. When they differ, the test that fails names the command that renews them.
"""

import functools
import importlib
import re
import sys
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import ROOT

from lab import walk
from support import index

PAGE = ROOT / "docs" / "walk.md"
KD = ["l_vis = visual_kl(", "r_s, r_t = self_correlation(", "l_rel = relation_loss("]
SPARSE = ["load = whole[2:]", "l_bal = mean_balance_loss("]
KEY_LINES = {
    "dpt": ["student, teacher = new_student(", "l_pt = autoregressive_loss(", *KD],
    "sft": ["l_reg = autoregressive_loss("], "dft": ["l_reg = autoregressive_loss(", *KD],
    "d2d": ["l_kl = response_kl("], "d2s": ["sparsify(student,", "l_kl = response_kl(", *SPARSE],
    "pd": ["reference = log_p(", "loss, terms = preference_loss(", "else:", "loss = kto_loss(", *SPARSE],
}
A_STAGE = """
import functools

@functools.cache
def double(n):
    return 2 * n

def main(argv):
    total, many = 0, [
        double(n) for n in range(3)]
    for n in many:
        total = total + n
    try:
        total / 0
    except ZeroDivisionError:
        total = 0.5
"""


@functools.cache
def walked(name: str) -> list[str]:
    with patch("lab.world.N_VAL", 0):  # scenes that no stage trains on
        return walk.walk(name)


def statements(lines: list[str]) -> dict[int, tuple[str, str]]:
    """Of every numbered line of a walk the code, and what is told under it."""
    found = {}
    for line in lines[1:]:
        if line[:4].strip():
            number = int(line[:4])
            found[number] = line[6:], ""
        else:
            found[number] = found[number][0], found[number][1] + line.strip() + " "
    return found


def value(lines: list[str], start: str) -> dict[str, float]:
    """The numbers that the last statement which begins so has made, by the end of their names."""
    told = [told for code, told in statements(lines).values() if code.strip().startswith(start)][-1]
    return {name: float(number) for name, number in re.findall(r"(\w+) (-?[\d.e+-]+)\b", told)}


def renewed(page: str, lines: list[str]) -> str:
    """The page with these lines in its blocks, each of which begins with the line that it began with."""
    parts, starts = page.split("```"), [0]  # every second part is a block
    for block in parts[3::2]:
        first = block.splitlines()[1]
        assert first in lines, f"{PAGE}: a walk has no line {first!r} any more; begin its block with another"
        starts.append(lines.index(first))
    for k, (start, end) in enumerate(zip(starts, [*starts[1:], None])):
        parts[2 * k + 1] = "\n".join(["python", *lines[start:end], ""])
    return "```".join(parts)


@pytest.mark.parametrize("name", walk.STAGES)
def test_a_walk_shows_the_lines_of_the_stage_and_they_make_what_their_comments_say(name):
    source, shown = Path(walk.STAGES[name].__file__).read_text().splitlines(), statements(walked(name))
    assert [source[number - 1] for number in shown] == [code for code, _ in shown.values()]
    assert sorted(shown) == list(shown)
    for key in ["optimizer.step()", *KEY_LINES[name]]:
        assert any(code.strip().startswith(key) for code, _ in shown.values()), key
    for code, told in shown.values():
        letters = re.findall(r"\(([\w ]+,[\w ,]*)\)", code.partition("# ")[2])
        for names, sizes in zip(cycle(letters), re.findall(r"\((\d[\d, ]*)\)", told)):
            assert names.count(",") == sizes.count(","), (code, told)
    many = re.findall(r"([\w ]+) \d+ or", walked(name)[0])  # D may be of both models
    assert {letter.strip() for letter in many} <= {"D"}


def test_what_was_left_out_did_not_run_and_what_no_rows_made_is_not_shown():
    lines = walked("dft")
    codes = [code.strip() for code, _ in statements(lines).values()]
    assert "if args.gradient_checkpointing:" in codes and "if run.finished:" in codes
    assert not any("activation_checkpointing" in code or code == "return" for code in codes)
    assert not any(code.startswith("else:") for code in codes)
    parts = value(lines, "l_reg =") | value(lines, "l_res =") | value(lines, "l_vis =")
    assert len(parts) == 3 and min(parts.values()) > 0.01
    whole = value(lines, "loss, terms = over_rows")
    assert parts.items() <= whole.items()
    assert whole["loss"] == pytest.approx(sum(parts.values()), rel=1e-3)
    assert value(lines, "loss = l_reg")["loss"] == pytest.approx(parts["l_reg"] + parts["l_res"], rel=1e-3)


def test_shapes_are_those_of_the_toy_models():
    told = [line.strip() for line in walked("dft") if line.strip().startswith("-> ")]
    made = dict(line[3:].split(" ", 1) for line in told)
    t = int(re.search(r"\bT (\d+)", walked("dft")[0]).group(1))
    want = {"z": (4, 16, 48), "h_s": (4, t, 32), "h_t": (4, t, 96), "v_t": (4, 16, 96), "r_s": (4, 16, 16)}
    assert {name: made[name] for name in want} == {name: str(shape) for name, shape in want.items()}
    assert made["batch.visual"] == f"(4, {t}) bool" and made["batch.pixel_values"] == "(4, 3, 32, 32) uint8"
    assert made["response.y"] == f"({made['total.response']},) int64" and made["total.visual"] == "64"


def test_the_page_is_what_a_walk_shows(tmp_path):
    lines = [line[6:] for line in walked("dft")]
    page, new = PAGE.read_text(), tmp_path / "walk.md"
    new.write_text(renewed(page, lines))
    numbers = r"\b(l_\w+|loss|grad_norm) -?[\d.e+-]+\b"  # they differ between machines
    same = re.sub(numbers, r"\1", page) == re.sub(numbers, r"\1", new.read_text())
    assert same, f"dft.py has changed; read its walk, see that the sentences are true, then: cp {new} {PAGE}"


def test_a_walk_is_the_same_each_time_and_leaves_nothing(monkeypatch, capsys):
    first, cached, watching = walked("sft"), sorted(index.CACHE.glob("*")), lambda *_: None
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("a walk is for the CPU"))
    sys.settrace(watching)
    try:
        walk.main(["sft"])
        assert sys.gettrace() is watching
    finally:
        sys.settrace(None)
    assert capsys.readouterr().out.splitlines() == first
    assert sorted(index.CACHE.glob("*")) == cached


def test_statements_that_no_stage_has_today(tmp_path, monkeypatch):
    (tmp_path / "a_stage.py").write_text(A_STAGE)
    monkeypatch.syspath_prepend(tmp_path)
    made, lines = walk.watch(importlib.import_module("a_stage"), []), A_STAGE.splitlines()
    assert {lines[end - 2].strip(): values for (_, end), values in sorted(made.items())} == {
        "def double(n):": {"n": "1"}, "return 2 * n": {}, "def main(argv):": {},
        "double(n) for n in range(3)]": {"total": "0"}, "for n in many:": {"n": "2"},
        "total = total + n": {"total": "2"}, "try:": {}, "total / 0": {}, "except ZeroDivisionError:": {},
        "total = 0.5": {"total": "0.5"},
    }
