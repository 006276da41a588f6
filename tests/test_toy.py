"""The toy world and the tables that are decided in it: what is drawn, planned, trained, compared and said.

python -m pytest tests/test_toy.py
"""

import importlib
import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from concurrent.futures import Executor, Future
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, open_data
from transformers import AutoProcessor

import ckd
import toy
from lab import results, tasks, world
from lab.tables import DEFAULTS, TABLES, TEACHERS, Table, cascade
from support.flags import InputError

WORDS = [*world.COLORS, *world.SHAPES]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A world of few scenes, which has all kinds of questions."""
    root = tmp_path_factory.mktemp("toy")
    world.write_world(root, n_train=150, n_test=40)
    return root


def read(path: Path) -> list[dict]:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


# ---------------------------------------------------------------------------------- the world


def test_unseen_pairs_are_in_no_training_scene_and_in_every_question_that_says_so(small):
    pairs = {f"{color} {shape}" for color, shape in world.SHAPED.unseen}
    assert {shape for _, shape in world.SHAPED.unseen} == set(world.SHAPES)  # each word is seen, with another
    captions = [s["conversations"][1]["value"] for s in read(small / "pretrain.json")]
    for text in captions + [json.dumps(read(small / f"{kind}.json")) for kind in ("finetune", "mixed")]:
        assert not any(pair in text for pair in pairs), text
    true = [pair["chosen"][1]["value"] for pair in read(small / "preference.json")]
    assert true == captions and not any(pair in text for text in true for pair in pairs)
    asked = [q for q in read(small / "questions.jsonl") if q["category"] == "unseen"]
    assert len(asked) == 3 * 10
    for color, shape, place in zip(*[iter(asked)] * 3):  # three questions about one object
        assert f"{color['label']} {shape['label']}" in pairs
        there = color["text"].removeprefix("what color is the object ").removesuffix(" ?")
        assert (
            place["text"] == f"where is the {color['label']} {shape['label']} ?" and place["label"] == there
        )
    seen = [q["text"] for q in read(small / "questions.jsonl") if q["category"] in world.SKILLS]
    assert not any(pair in text for text in seen for pair in pairs)


def test_pope_asks_for_what_is_not_there_in_three_ways(small):
    captions = [s["conversations"][1]["value"].split() for s in read(small / "pretrain.json")]
    common = Counter(word for words in captions for word in set(words) & set(WORDS))
    objects = {q["image"]: set(" ".join(q["objects"]).split()) for q in read(small / "describe.jsonl")}
    asked = [q for q in read(small / "questions.jsonl") if q["category"].startswith("POPE")]
    assert Counter(q["category"] for q in asked) == {f"POPE {kind}": 20 for kind in world.POPE}
    for q in asked:
        word, there = q["text"].split()[-2], objects[q["image"]]
        assert (q["label"] == "yes") == (word in there)
        if q["label"] == "yes" or q["category"] == "POPE random":
            continue
        absent = [w for w in WORDS if w not in there]
        company = {w: sum((w in c) * sum(o in c for o in there) for c in captions) for w in absent}
        rank = company if "adversarial" in q["category"] else {w: common[w] for w in absent}
        assert rank[word] == max(rank.values())
    for kind in world.POPE:
        labels = Counter(q["label"] for q in asked if q["category"] == f"POPE {kind}")
        assert labels["yes"] == labels["no"]


def test_what_is_scored_was_not_trained_on_and_rates_are_chosen_on_other_scenes(small):
    images = {name: {q["image"] for q in read(small / name)}
              for name in ("pretrain.json", "questions.jsonl", "val.jsonl", "describe.jsonl")}
    assert not images["pretrain.json"] & (images["questions.jsonl"] | images["val.jsonl"])
    assert not images["val.jsonl"] & images["questions.jsonl"]
    assert images["describe.jsonl"] < images["questions.jsonl"]


def test_seeds_are_other_scenes_and_all_kinds_of_data_have_the_same(small):
    names = {}
    for seed in 0, 1:
        for kind in "pretrain", "finetune", "mixed", "preference":
            records = read(world.write_subset(small, kind, 20, seed))
            names.setdefault(seed, []).append({r["image"] for r in records})
    assert all(len(images) == 20 and images == names[s][0] for s in names for images in names[s])
    assert names[0][0] != names[1][0]


# ---------------------------------------------------------------------------------- tables


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A Lab that plans without a world."""
    monkeypatch.setattr(world, "write_world", lambda root: root.mkdir(parents=True))
    monkeypatch.setattr(
        world, "write_subset", lambda root, kind, n, seed: root / f"{kind}-{n}-seed{seed}.json"
    )
    return toy.Lab(tmp_path)


def test_a_world_is_drawn_again_if_it_is_half_drawn_or_has_other_parts_and_no_folder_of_others_is(
    tmp_path, monkeypatch
):
    drawn = []

    def write_world(root: Path) -> None:
        assert not root.exists()
        drawn.append(root.mkdir())
        if len(drawn) == 1:
            raise KeyboardInterrupt
        (root / "objects.txt").touch()

    monkeypatch.setattr(world, "write_world", write_world)
    with pytest.raises(KeyboardInterrupt):
        toy.Lab(tmp_path / "mine")
    for n in 2, 2:
        toy.Lab(tmp_path / "mine")
        assert len(drawn) == n
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(world, "BASE", tmp_path / "parts")
    toy.Lab(tmp_path / "mine")
    assert len(drawn) == 3
    (tmp_path / "yours/world").mkdir(parents=True)
    (tmp_path / "yours/world/thesis.tex").touch()
    with pytest.raises(InputError, match="yours/world is there and no toy world"):
        toy.Lab(tmp_path / "yours")
    assert (tmp_path / "yours/world/thesis.tex").exists()


def flag(argv: list[str], name: str) -> str | None:
    """The last value of a flag, as argparse takes it."""
    return next((argv[i + 1] for i in reversed(range(len(argv))) if argv[i] == f"--{name}"), None)


def test_every_row_is_read_by_its_scripts_and_every_claim_names_rows(lab):
    for table in TABLES.values():
        for claim in table.claims:
            assert {claim[0], claim[1]} <= table.rows.keys() and claim[0] != claim[1]
        for recipe in table.rows.values():
            for scenes in table.scenes:
                stages = lab.chain(recipe, table.data, scenes, 3)
                assert len(set(stages)) == len(stages) == recipe.count("|") + 1
    for out, task in lab.tasks.items():
        assert all(i in lab.tasks for i in task.inputs if i != lab.world)
        if task.call is tasks.train and "seed3" in str(out):
            batches = int(re.search(r"-(\d+)-seed3", flag(task.argv, "data"))[1]) // 32  # of one epoch
            steps = importlib.import_module(task.script).parse_args(task.argv).max_steps
            assert int(flag(task.argv, "epochs")) * batches >= steps


def test_a_row_or_claim_with_a_slip_is_refused_before_anything_is_trained(lab, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="'dtf --gamma 0' is no stage: its name is one of pt, dpt, sft"):
        lab.chain("dpt | sft | dtf --gamma 0", "finetune", 400, 0)
    for flag in "--llm larg", "--teacher nobody", "--gama 0":
        with pytest.raises(SystemExit):
            lab.chain(f"dpt {flag}", "finetune", 400, 0)
        assert flag.split()[1 if flag[2] != "g" else 0] in capsys.readouterr().err
    monkeypatch.setitem(TABLES, "kd2", Table("t", {"a": "pt"}, [("a", "b")]))
    monkeypatch.setattr(toy, "do", lambda *_: pytest.fail("trained"))
    with pytest.raises(InputError, match="a claim of kd2 is about a row that the table has not"):
        toy.main(["--out", str(tmp_path)])
    with pytest.raises(InputError, match="--table names no table; there are kd2, kd3"):
        toy.main(["--table", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", [name for name, table in TABLES.items() if table.claims])
def test_the_published_rows_are_those_of_the_tables_and_no_control_took_less(name):
    """A control of equal FLOPs has no fewer than what it controls, and one of equal time 90 % of the seconds:
    those of one machine vary.
    """
    page = (ROOT / "docs/results" / f"{name}.md").read_text()
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    number = lambda text: float(text.replace(",", ""))
    costs = {(row[0], number(row[1])): [number(cell) for cell in row[-3:]] for row in rows
             if row[0] in TABLES[name].rows}
    assert costs.keys() == set(product(TABLES[name].rows, TABLES[name].scenes))
    for (row, _), (steps, *_) in costs.items():
        stages = [re.match(r"(\w+)(?:.* --max_steps (\d+))?", s) for s in TABLES[name].rows[row].split(" | ")]
        assert steps == sum(int(stage[2] or DEFAULTS[stage[1]][0]) for stage in stages), row
    for (better, worse, *_), scenes in product(TABLES[name].claims, TABLES[name].scenes):
        (_, *mine), (_, *control) = costs[better, scenes], costs[worse, scenes]
        if better in ("DPT+SFT+DFT", "KD", "mimic, PD"):  # whose controls they are
            assert control[0] >= 0.9 * mine[0] or "equal time" not in worse, worse
            assert control[1] >= mine[1] or "equal FLOPs" not in worse, worse


def test_stages_that_rows_share_are_planned_once(lab):
    a, b = lab.chain("dpt | sft | dft", "finetune", 400, 0), lab.chain("dpt | sft", "finetune", 400, 0)
    assert a[:2] == b
    argv = {out.name: task.argv for out, task in lab.tasks.items() if task.call is tasks.train}
    assert flag(argv["dpt-sft-dft"], "student") == str(a[1])
    assert (
        flag(argv["dpt"], "teacher")
        == flag(argv["dpt-sft-dft"], "teacher")
        == str(lab.teacher("teacher")[-1])
    )
    mixed = lab.chain("pt | sft", "mixed", 400, 0)
    plain = lab.chain("pt | sft", "finetune", 400, 0)
    assert mixed[0] == plain[0] and mixed[1] != plain[1]  # PT reads captions in both
    other = lab.chain("dpt --gamma 0 | sft", "finetune", 400, 0)
    assert not set(other) & set(a) and other[0].name == "dpt.gamma=0"


def test_what_is_made_by_other_flags_or_code_or_before_its_inputs_is_made_again(tmp_path):
    def task(out: str, *inputs: Path, call=tasks.score, **made: object) -> tasks.Task:
        return tasks.Task(call, "sft", [], tmp_path / out, list(inputs), made)

    before, after = task("a", argv=["--lr", "1"], code={"sft.py": "1"}), tmp_path / "a"
    assert not before.is_done()
    before.record(tflop=2.0)
    assert before.is_done() and json.loads((tmp_path / "a.json").read_text())["tflop"] == 2.0
    assert not task("a", argv=["--lr", "2"], code={"sft.py": "1"}).is_done()
    assert not task("a", argv=["--lr", "1"], code={"sft.py": "2"}).is_done()
    task("b", after).record()
    assert task("b", after).is_done()
    os.utime(tmp_path / "b.json", ns=(0, 0))
    assert not task("b", after).is_done()  # older than what it is made from
    stage = task("c", call=tasks.train)
    stage.record()
    assert stage.is_made() and not stage.is_done()  # begun
    for seconds, done in ("null", False), ("1.5", True):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c/run.json").write_text(f'{{\n "seconds": {seconds}\n}}\n')
        assert stage.is_done() == done


def test_a_sample_is_read_once_whatever_file_it_is_in(world, checkpoints, tmp_path):
    processor, samples, asked = (
        AutoProcessor.from_pretrained(checkpoints["small"]),
        read(world / "train.json"),
        [],
    )
    (tmp_path / "other.json").write_text(json.dumps(samples[::-1]))
    files = world / "train.json", tmp_path / "other.json"
    first, other = (open_data(path, world / "images", processor) for path in files)
    longer = open_data(files[0], world / "images", processor, max_len=999)
    captions = open_data(files[0], world / "images", processor, caption_only=True)
    read_once = tasks.read_once(lambda data, i: asked.append(i) or data[i])
    for data in first, other, longer, captions, first:
        for i in range(len(data)):
            found, wanted = read_once(data, i), data[i]
            assert found["rows"] == wanted["rows"] and found["bad"] == wanted["bad"]
            if wanted["pixels"]:
                assert torch.equal(found["pixels"][0], wanted["pixels"][0])
    assert asked == [i for data in (first, longer, captions) for i in range(len(data))]


def test_a_step_costs_all_of_its_products(tmp_path, monkeypatch):
    """Also those that are added in place, as to the gradient of the head, and attention's."""

    def main(argv):
        assert argv[2:] == ["--max_steps", "1"]
        torch.ones(3, 5).addmm_(torch.ones(3, 4), torch.ones(4, 5)) @ torch.ones(5, 2)
        x = torch.ones(1, 1, 6, 8)
        torch.nn.functional.scaled_dot_product_attention(x, x, x)

    stage = SimpleNamespace(main=main, parse_args=lambda argv: SimpleNamespace(max_steps=7))
    monkeypatch.setitem(sys.modules, "stage", stage)
    argv = ["--out", "o", "--max_steps", "7"]
    tasks.count(tasks.Task(tasks.count, "stage", argv, tmp_path / "cost", [], {}))
    a_step = 2 * (3 * 4 * 5 + 3 * 5 * 2 + 2 * 6 * 6 * 8)
    assert read(tmp_path / "cost.json")["tflop"] == pytest.approx(7 * a_step / 1e12)


def test_a_row_takes_what_its_stages_take_without_reading(lab, tmp_path):
    stages = lab.chain("pt | sft", "finetune", 400, 0)
    for stage, (seconds, reading) in zip(stages, ((5, 2), (4, 0.5))):
        stage.mkdir(parents=True)
        (stage / "run.json").write_text(json.dumps({"seconds": seconds}))
        (stage / "log.jsonl").write_text("{}\n" * 3)
        lab.tasks[stage].record(reading=reading)
        lab.tasks[tmp_path / "flops" / stage.name].record(tflop=0.25)
    answers = lab.answers("questions", stages[-1])
    answers.mkdir(parents=True)
    scores = {"by_category": dict.fromkeys(world.SKILLS, 50.0)}
    (answers / "scores.json").write_text(json.dumps({"sft": scores}))
    questions = "\n".join(json.dumps({"category": skill}) for skill in world.SKILLS)
    (lab.world / "questions.jsonl").write_text(questions)
    row = lab.row(TABLES["kd2"], "PT+SFT", 400, 0, stages)
    assert (row["seconds"], row["steps"], row["tflop"], row["accuracy"]) == (6.5, 6, 0.5, 50)


@pytest.mark.parametrize("strategy", ["bottom-up", "top-down"])
def test_a_cascade_has_the_stages_of_ckd(lab, strategy):
    """Teacher, start and loss of each stage are those of ckd.py's own plan."""
    teachers = {name: str(lab.teacher(name)[-1]) for name in ("assistant", "teacher")}
    down = strategy == "top-down"
    argv = ["--teachers", *teachers.values(), "--strategy", strategy, "--vision", "v", "--llm", "small",
            "--out", "o", "--pretrain_data", "p", "--finetune_data", "f"]
    argv += ["--assistant_llms", "middle"] if down else []
    wanted = [(stage.__name__, stage.parse_args(flags)) for stage, flags in ckd.plan(*ckd.parse_args(argv))]
    if down:
        folders = [*lab.teacher("distilled"), *lab.chain(cascade("distilled"), "finetune", 400, 0)]
    else:
        folders = lab.chain(cascade("assistant", "teacher"), "finetune", 400, 0)
    planned = [lab.tasks[out] for out in folders]
    mine = [(t.script, importlib.import_module(t.script).parse_args(t.argv)) for t in planned]
    assert [script for script, _ in mine] == [script for script, _ in wanted]
    place = dict(zip((args.out for _, args in wanted), map(str, folders)))
    for (_, ours), (_, theirs) in zip(mine, wanted):
        for name in ("targets", "alpha", "beta", "gamma", "relation"):
            assert getattr(ours, name, None) == getattr(theirs, name, None)
        for name in ("student", "teacher"):
            theirs_at = getattr(theirs, name, None)
            assert getattr(ours, name, None) == place.get(theirs_at, theirs_at)
        if getattr(theirs, "llm", None):
            assert ours.llm.endswith(theirs.llm)


# ---------------------------------------------------------------------------------- statistics


def test_intervals_are_students_t():
    mean, half = results.interval([60.0, 62.0, 67.0])
    assert mean == 63 and half == pytest.approx(4.303 * math.sqrt(13) / math.sqrt(3))
    for freedom, known in {4: 2.776, 15: 2.131, 30: 2.042, 120: 1.980}.items():
        assert results.t_975(freedom) == pytest.approx(known, abs=2e-3)
    assert results.interval([5.0]) == (5.0, math.inf)


def test_the_interval_covers_the_truth_19_times_of_20():
    torch.manual_seed(0)
    draws = torch.randn(4000, 5) + 2
    covered = statistics.fmean(abs(mean - 2) < half for mean, half in map(results.interval, draws.tolist()))
    assert 0.94 < covered < 0.96


def test_a_verdict_comes_from_the_interval_alone():
    assert results.verdict([1.0, 1.2, 0.9]) == "**reproduced**"
    assert results.verdict([-1.0, -1.2, -0.9]) == "**reversed**"
    assert results.verdict([3.0]) == "undecided"
    undecided = [1.0, -1.0, 2.5]
    n = int(re.fullmatch(r"undecided \((\d+) seeds would\)", results.verdict(undecided))[1])
    spread, mean = statistics.stdev(undecided), statistics.fmean(undecided)
    assert (
        results.t_975(n - 1) * spread / math.sqrt(n) < mean < results.t_975(n - 2) * spread / math.sqrt(n - 1)
    )


def test_differences_are_paired_by_seed_and_lies_count_the_other_way():
    def row(method: str, seed: int, accuracy: float, lies: float) -> dict:
        return {"method": method, "seed": seed, "scenes": 400, "accuracy": accuracy, "response_rate": lies,
                "by_category": {"unseen": accuracy}}

    rows = [row("PD", 0, 60, 20), row("PD", 1, 70, 10), row("mimic", 1, 65, 30), row("mimic", 0, 50, 24)]
    claims = [("PD", "mimic", *name) for name in ([], ["unseen"], ["response_rate"])]
    page = results.verdicts_of(Table("t", {}, claims), rows)
    for name in "accuracy", "unseen":  # 10 and 5
        assert f"| PD higher than mimic | {name} | 400 | +7.5 ± 31.8 | 2 of 2 | undecided (" in page
    assert "| PD lower than mimic | lies, answers | 400 | -12.0 ± 101.6 | 2 of 2 | undecided (" in page


# ------------------------------------------------------------------------- from a command to its page


class Here(Executor):
    """Does in this process what a pool would do in its own, which take long to start."""

    def __init__(self, *_: object):
        pass

    def submit(self, call, task):
        done = Future()
        done.set_result(call(task))
        return done


def test_a_table_is_filled_once_and_gone_on_with(tmp_path, monkeypatch, capsys):
    """Tiny: two rows that share a stage, two seeds, two stages at a time."""
    draw, few = world.write_world, dict.fromkeys(("pt", "dpt", "sft", "dft", "d2d", "d2s"), (3, 1e-3))
    monkeypatch.setattr(world, "write_world", lambda root: draw(root, n_train=80, n_test=12))
    monkeypatch.setattr(toy, "DEFAULTS", few)
    monkeypatch.setitem(TEACHERS, "teacher", "pt --llm middle | sft")
    monkeypatch.setattr(world, "N_TRAIN", 80)
    rows = {"dense": "pt | d2d", "sparse": "pt | d2d | d2s"}
    table = Table(
        "Tiny",
        rows,
        [("sparse", "dense"), ("sparse", "dense", "response_rate")],
        "mixed",
        (40,),
        figure="experts",
    )
    monkeypatch.setitem(TABLES, "mod12", table)
    command = ["--table", "mod12", "--seeds", "2", "--out", str(tmp_path)]
    toy.main(command)
    report = read(tmp_path / "report.json")["rows"]
    assert [(r["method"], r["seed"]) for r in report] == [
        ("dense", 0), ("sparse", 0), ("dense", 1), ("sparse", 1), ("Teacher", 0)]
    dense, sparse = report[:2]
    assert dense["steps"] == 6 and sparse["steps"] == 9 and sparse["stages"][:2] == dense["stages"]
    for row in report:
        questions = read(tmp_path / "world/questions.jsonl")
        said = read(tmp_path / "answers/questions" / Path(row["stages"][-1]).relative_to(tmp_path)
                    / f"{Path(row['stages'][-1]).name}.jsonl")
        right = [a["text"] == q["label"] for q, a in zip(questions, said) if q["category"] in world.SKILLS]
        assert row["accuracy"] == pytest.approx(100 * statistics.fmean(right))
        assert 0 <= row["recall"] <= 100 and row["seconds"] > 0
    flops = {Path(s).name: read(tmp_path / f"flops/{Path(s).name}.json")["tflop"] for s in sparse["stages"]}
    assert sparse["tflop"] == pytest.approx(sum(flops.values())) and flops["pt-d2d"] > 2 * flops["pt"]
    page = (tmp_path / "mod12.md").read_text()
    assert page.strip() in capsys.readouterr().out and "seeds 0, 1" in page
    assert re.search(
        r"\| sparse higher than dense \| accuracy \| 40 \| [+-][\d.]+ ± [\d.]+ \| \d of 2 \|", page
    )
    for picture in "mod12.png", "mod12-experts.png":
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG" and f"({picture})" in page
    models = [Path(s) / "model.safetensors" for row in report for s in row["stages"]]
    made = {path: path.stat().st_mtime_ns for path in models}
    (Path(sparse["stages"][-1]) / "run.json").unlink()  # as if it had been killed before its end
    for path in Path(sparse["stages"][-1]).glob("*"):
        path.unlink()
    monkeypatch.setattr(tasks, "ProcessPoolExecutor", Here)
    toy.main(command)
    changed = [path for path in made if path.stat().st_mtime_ns != made[path]]
    assert changed == [Path(sparse["stages"][-1]) / "model.safetensors"]
    again = read(tmp_path / "report.json")["rows"]
    assert [r["accuracy"] for r in again] == [r["accuracy"] for r in report]
