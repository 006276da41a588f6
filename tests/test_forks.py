"""Every fork in docs/forks applies, changes what is trained, and has the same losses however it is split.

python -m pytest tests/test_forks.py
"""

import importlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, data_flags, log_of, on_two_ranks
from forked import imports_of, train

from lab.results import verdicts_of
from lab.tables import TABLES

DIFFS = {path.stem: path.read_text() for path in sorted((ROOT / "docs/forks").glob("*.diff"))}
BUDGET = {"S": 12, "M": 30, "L": 50}  # lines that a fork of this size adds
FLAGS = {"two_teachers": ["--teacher2"]}  # the forks that have a flag
ON_TWO_RANKS = "decoupled", "attention", "learned_weights"


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, str]:
    """A copy of the project for each fork, with its diff applied by git; "main" is the project itself."""
    root, found = tmp_path_factory.mktemp("forks"), {"main": str(ROOT)}
    for name, diff in DIFFS.items():
        tree = root / name
        shutil.copytree(ROOT / "support", tree / "support", ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.glob("*.py"):
            shutil.copy(path, tree)
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(root)}  # the copy is in no repository
        told = subprocess.run(["git", "apply"], input=diff, cwd=tree, env=env, capture_output=True, text=True)
        assert told.returncode == 0, f"{name}: {told.stderr}"
        found[name] = str(tree)
    return found


class Runs:
    """Two steps of a fork's DFT, each once."""

    def __init__(self, trees: dict[str, str], world: Path, checkpoints: dict[str, str], out: Path):
        self.trees, self.world, self.out = trees, world, out
        self.models = ["--student", checkpoints["small"], "--teacher", checkpoints["large"]]

    def argv(self, name: str, micro: int, ranks: int = 1) -> list[str]:
        flags = {"max_steps": 2, "micro_batch": micro, "out": self.out / f"{name}-{micro}-{ranks}"}
        more = ["--teacher2", self.models[1]] if name == "two_teachers" else []
        return [*self.models, *more, *data_flags(self.world, **flags)]

    def log(self, name: str, micro: int) -> list[dict]:
        """Of one process that takes `micro` samples at a time."""
        out = self.out / f"{name}-{micro}-1"
        if not out.exists():
            train(self.trees[name], self.argv(name, micro), few_rows=micro < 8)
        return log_of(out)


@pytest.fixture(scope="module")
def runs(trees, world, checkpoints, tmp_path_factory) -> Runs:
    return Runs(trees, world, checkpoints, tmp_path_factory.mktemp("runs"))


def same_losses(a: list[dict], b: list[dict]) -> bool:
    assert len(a) == len(b) == 2
    assert all(x.keys() == y.keys() for x, y in zip(a, b))
    a, b = ({(x["step"], k): v for x in log for k, v in x.items() if k != "tokens_per_s"} for log in (a, b))
    return a == pytest.approx(b, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("name", DIFFS)
def test_a_fork_trains_and_no_split_changes_its_losses(runs, name):
    assert same_losses(runs.log(name, 8), runs.log(name, 4))
    forked, main = ([step["loss"] for step in runs.log(tree, 8)] for tree in (name, "main"))
    assert forked != pytest.approx(main, rel=1e-3)


def test_two_ranks_have_the_losses_of_one(runs):
    for name in ON_TWO_RANKS:
        on_two_ranks(train, runs.trees[name], runs.argv(name, micro=2, ranks=2), True)
        assert same_losses(runs.log(name, 8), log_of(runs.out / f"{name}-2-2")), name


# ------------------------------------------------------------------------------------------ their equations
# Once more, on probabilities: the teacher's p, the student's q (N, V), next tokens y (N,); one value a row.


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


def entropy(p, t):
    p = p ** (1 / t) / (p ** (1 / t)).sum(-1, keepdim=True)
    return -(p * p.log()).sum(-1)


def coarse(p, order):
    """The first 100 ids of each row's order, and all others as one."""
    p = p.gather(-1, order)
    return torch.cat([p[:, :100], p[:, 100:].sum(-1, keepdim=True)], dim=-1)


def decoupled(p, q, y):
    rows = []
    for a, b, k in zip(p, q, y.tolist()):
        target = kl(torch.stack([a[k], 1 - a[k]]), torch.stack([b[k], 1 - b[k]]))
        a, b = (torch.cat([x[:k], x[k + 1 :]]) / (1 - x[k]) for x in (a, b))
        rows.append(target + 0.5 * kl(a, b))
    return torch.stack(rows)


EQUATIONS = {
    "reverse_kl": lambda p, q, y: kl(q, p),
    "skewed_kl": lambda p, q, y: kl(p, 0.1 * p + 0.9 * q),
    "jsd": lambda p, q, y: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "top_k": lambda p, q, y: kl(*(coarse(x, p.argsort(-1, descending=True)) for x in (p, q))),
    "entropy": lambda p, q, y: kl(p, q) * entropy(p, 2) / 2 * (1 + entropy(q.detach(), 2) / math.log(140)),
    "decoupled": decoupled,
}


@pytest.fixture(scope="module")
def loss_of(trees):
    """The loss that a fork adds to losses.py, as a function of log_s, log_t, y and weights."""

    def find(name: str):
        with imports_of(trees[name]):
            losses = importlib.import_module("losses")
        (added,) = re.findall(r"^\+def (\w+)", DIFFS[name], re.M)
        function = getattr(losses, added)
        known = inspect.signature(function).parameters
        return lambda **given: function(**{k: v for k, v in given.items() if k in known})

    return find


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_loss_is_its_equation(loss_of, name):
    """And its gradient is; also where the heads differ in length, and with a weight for each row."""
    g = torch.Generator().manual_seed(0)
    z_s, z_t = (2 * torch.randn(6, v, generator=g, dtype=torch.float64) for v in (140, 150))
    y, weights = torch.randint(0, 140, (6,), generator=g), torch.rand(6, generator=g, dtype=torch.float64)
    z_s.requires_grad_()
    want = (EQUATIONS[name](z_t[:, :140].softmax(-1), z_s.softmax(-1), y) * weights).sum()
    got = loss_of(name)(log_s=z_s.log_softmax(-1), log_t=z_t.log_softmax(-1), y=y, weights=weights)
    assert got.item() == pytest.approx(want.item(), rel=1e-10)
    a, b = (torch.autograd.grad(loss, z_s)[0] for loss in (got, want))
    assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_loss_of_equal_models_is_0_and_of_any_is_finite(loss_of, name):
    """Also where both probabilities of an id are 0 in fp32, and where the teacher is sure of the token."""
    z, y = torch.randn(4, 140), torch.tensor([0, 1, 2, 3])
    z[:, 100:] -= 200
    z_t = z + torch.randn(4, 140)
    z_t[0, 0], z_t[1, 2] = 80, 80
    z_s = z.clone().requires_grad_()
    loss = loss_of(name)(log_s=z_s.log_softmax(-1), log_t=z_t.log_softmax(-1), y=y, weights=1.0)
    (gradient,) = torch.autograd.grad(loss, z_s)
    assert loss > 0.01
    assert gradient.isfinite().all()
    same = loss_of(name)(log_s=z.log_softmax(-1), log_t=z.log_softmax(-1), y=y, weights=1.0)
    assert abs(same.item()) < 1e-6


# ---------------------------------------------------------------------------------------------- their gallery


def test_the_gallery_tells_the_files_and_lines_of_every_fork():
    page = (ROOT / "docs/forks.md").read_text()
    told = {}
    for row in re.findall(r"^\| \[(\w+)\]\(forks/(\w+)\.diff\) \|(.*)\|$", page, re.M):
        assert row[0] == row[1]
        _, files, lines, size, _ = (cell.strip() for cell in row[2].split(" | "))
        told[row[0]] = files, lines, size
    found = {}
    for name, diff in DIFFS.items():
        files = re.findall(r"^\+\+\+ b/(.*)$", diff, re.M)
        added, removed = (len(re.findall(rf"^{sign}(?!{sign}{sign})", diff, re.M)) for sign in (r"\+", "-"))
        size = next(size for size, most in BUDGET.items() if added <= most)
        found[name] = " ".join(sorted(files)), f"+{added} −{removed}", size
    assert told == found
    assert re.findall(r"^## (\w+)$", page, re.M) == list(told)


def test_the_gallery_tells_the_verdict_of_every_fork():
    words = {"**reproduced**": "**better**", "**reversed**": "**worse**"}
    rows, found = json.loads((ROOT / "docs/results/forks.json").read_text())["rows"], {}
    for line in verdicts_of(TABLES["forks"], rows).splitlines()[2:]:
        claim, _, _, points, _, costs, _, verdict = (cell.strip() for cell in line.strip("|").split(" | "))
        cells = found.setdefault(claim.split()[0], [])
        cells[-1:] = points.replace("-", "−"), words.get(verdict, "undecided"), costs.split(", ")[1]
    told = re.findall(r"^\| (\w+) \| (.* ± .*) \|$", (ROOT / "docs/forks.md").read_text(), re.M)
    assert {name: cells.split(" | ") for name, cells in told} == found
    assert list(found) == [name for name, _ in told] and set(found) == set(DIFFS)


@pytest.mark.parametrize("name", DIFFS)
def test_a_fork_has_no_flag(name):
    assert re.findall(r'^[+-]\s*\("(--\w+)', DIFFS[name], re.M) == FLAGS.get(name, [])

