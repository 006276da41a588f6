"""docs/paper.md names code, tests and equations: all that it names exists, and it leaves none out."""

import ast
import re

import pytest
from conftest import ROOT

PAPER = (ROOT / "docs/paper.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:\w+/)*\w+\.py::\w+)`", PAPER)))
QUOTED = sorted(set(re.findall(r"`(\w+\.py`: `[^`]+)`", PAPER)))
COUNTS = {"LLaVA-KD": 7, "LLaVA-MoD": 8, "LLaVA-CKD": 18}  # the papers' numbered equations


def names_of(path: str) -> set[str]:
    """The functions and classes of a file."""
    body = ast.parse((ROOT / path).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("place", NAMED)
def test_what_is_named_exists(place):
    path, name = place.split("::")
    assert name in names_of(path)


@pytest.mark.parametrize("place", QUOTED)
def test_a_quoted_line_stands_in_its_stage(place):
    path, line = place.split("`: `")
    assert line in (ROOT / path).read_text()


def test_every_loss_is_named():
    named = {place.split("::")[1] for place in NAMED if place.startswith("losses.py::")}
    assert named == {name for name in names_of("losses.py") if not name.startswith("_")}


@pytest.mark.parametrize("paper", COUNTS)
def test_every_equation_has_its_place(paper):
    """A heading names one equation, "Eq. (5)", or a range of them, "Eqs. (9) to (18)"."""
    (section,) = re.findall(rf"^## {paper}\n(.*?)(?=^## )", PAPER, re.S | re.M)
    found = []
    for title in re.findall(r"^### (.*)", section, re.M):
        numbers = [int(number) for number in re.findall(r"\((\d+)\)", title)]
        found += range(numbers[0], numbers[-1] + 1) if numbers else []
    assert found == list(range(1, COUNTS[paper] + 1))


def test_every_section_is_held_by_tests():
    """All but the theory of LLaVA-CKD, which is not computed."""
    for section in re.split(r"^### ", PAPER, flags=re.M)[1:]:
        title = section.splitlines()[0]
        shared = title.startswith(("Eq. (1): the models", "Eqs. (9)"))
        assert shared or "**Tests**:" in section, title
    assert sum(place.startswith("tests/") for place in NAMED) > 30
