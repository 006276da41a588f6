"""What docs/ computes is what lab.plan computes, and its snippets of Python do what the page says.

Of the table of docs/launch.md four cells are computed again, on all three machines: each takes a second.

python -m pytest tests/test_docs.py
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers as hf
from conftest import ROOT
from PIL import Image

from lab import plan
from support.checks import check_sample, load_image

LAUNCH, DATA = ((ROOT / "docs" / name).read_text() for name in ("launch.md", "data.md"))
HEAD, _, *ROWS = (line.strip("| ").split(" | ") for line in re.findall(r"^\|.*", LAUNCH, re.M))
TABLE = {row[0]: dict(zip(HEAD[1:], row[1:])) for row in ROWS}
QWEN = {  # hidden size, layers, heads, heads of keys and values, FFN, whether the head is tied; as published
    "Qwen1.5-0.5B": (1024, 24, 16, 16, 2816, True), "Qwen1.5-1.8B": (2048, 24, 16, 16, 5504, False),
    "Qwen1.5-4B": (2560, 40, 20, 20, 6912, False), "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, True),
    "Qwen2.5-3B": (2048, 36, 16, 2, 11008, True),
}


def snippet(page: str, word: str) -> str:
    """The one block of Python on a page that has this word."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if word in code]
    return code


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with the config.json of the published parts, which the plan needs no more of."""
    root = tmp_path_factory.mktemp("models")
    hf.SiglipVisionConfig(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, image_size=384,
                          intermediate_size=4304, patch_size=14).save_pretrained(root / "siglip")
    for name, (width, depth, heads, kv_heads, ffn, tied) in QWEN.items():
        hf.Qwen2Config(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, intermediate_size=ffn, tie_word_embeddings=tied,
                       vocab_size=151936, max_position_embeddings=32768).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("row, machine", [
    ("Qwen2.5-0.5B, dft", "1 x 24 GB"), ("Qwen1.5-1.8B, sft", "1 x 24 GB"),
    ("Qwen1.5-1.8B, d2s", "1 x 80 GB"), ("Qwen1.5-4B (the teacher), sft", "8 x 80 GB"),
])
def test_a_cell_of_the_table_is_what_the_plan_says(models, row, machine):
    cell, (name, stage), (gpus, memory) = TABLE[row][machine], row.split(", "), machine[:-3].split(" x ")
    name, is_teacher = name.removesuffix(" (the teacher)"), "teacher" in name
    argv = [stage, "--student", f"{models}/siglip+{models}/{name}", "--gpus", gpus, "--memory", memory]
    if stage != "sft" and not is_teacher:
        argv += ["--teacher", f"{models}/siglip+{models}/Qwen{'2.5-3B' if '2.5' in name else '1.5-4B'}"]
    if cell.startswith("does not fit"):
        told = plan.main([*argv, "--micro_batch", "1", "--gradient_checkpointing"])
        assert not told["fits"] and cell == f"does not fit, least {told['longest'] / plan.GIB:.1f} GiB"
        return
    flags, numbers = cell.split(": ")
    letters = {"S": ["--shard", "optimizer"], "G": ["--gradient_checkpointing"]}
    more = [word for letter in flags.split()[1:] for word in letters[letter]]
    tflops = "80" if memory == "24" else "150"
    told = plan.main([*argv, *more, "--micro_batch", flags.split()[0], "--tflops", tflops])
    assert told["fits"] and numbers == f"{told['longest'] / plan.GIB:.1f} GiB, {told['hours']:.1f} h"


def test_the_table_is_whole():
    stages = {"Qwen1.5-0.5B": 4, "Qwen1.5-1.8B": 4, "Qwen1.5-4B (the teacher)": 2, "Qwen2.5-0.5B": 3}
    rows = [f"{name}, {stage}" for name, n in stages.items() for stage in ("dpt", "sft", "dft", "d2s")[:n]]
    assert list(TABLE) == rows
    fits = r"(16|8|4|2|1)( S)?( G)?: [\d.]+ GiB, [\d.]+ h|does not fit, least [\d.]+ GiB"
    assert all(re.fullmatch(fits, cell) for row in TABLE.values() for cell in row.values())


def test_the_hours_of_the_small_run_are_the_tables():
    hours = 0
    for stage, samples in ("dpt", 558), ("sft", 665), ("dft", 665):
        (whole,) = re.findall(r"([\d.]+) h", TABLE[f"Qwen2.5-0.5B, {stage}"]["1 x 24 GB"])
        hours += float(whole) * 50 / samples
    (told,) = re.findall(r"about ([\d.]+) hours in all", DATA)
    assert float(told) == pytest.approx(hours, abs=0.06)


def test_pictures_in_parquet_become_samples(tmp_path, monkeypatch):
    """A file of the published form; the third picture is a GIF."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    form = {"images": datasets.List(datasets.Image()), "prompt": datasets.List(turn),
            "completion": datasets.List(turn)}
    pictures = []
    for kind, color in ("png", "red"), ("jpeg", "blue"), ("gif", "green"):
        Image.new("RGB", (20, 10), color).save(f"picture.{kind}")
        pictures.append({"bytes": Path(f"picture.{kind}").read_bytes(), "path": f"picture.{kind}"})
    rows = [{"images": images, "prompt": [{"role": "user", "content": "What is it?"}],
             "completion": [{"role": "assistant", "content": "A colour."}]}
            for images in (pictures[:1], pictures[1:])]
    Path("trl-lib/llava-instruct-mix").mkdir(parents=True)  # a folder goes before the hub
    table = pyarrow.Table.from_pylist(rows, datasets.Features(form).arrow_schema)
    parquet.write_table(table, "trl-lib/llava-instruct-mix/train.parquet")
    exec(snippet(DATA, "load_dataset"), {})
    lines = [json.loads(line) for line in open("mix/train.jsonl")]
    samples = [check_sample("here", line, "mix/images") for line in lines]
    assert [s.images for s in samples] == [["0-0.jpg"], ["1-0.jpg", "1-1.jpg"]]
    assert samples[0].conversations[0][1]["content"][-1]["text"] == "A colour."
    assert load_image("here", "mix/images", "1-1.jpg").getpixel((0, 0)) == (0, 128, 0)


@pytest.mark.parametrize("word, module", [("SummaryWriter", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_log_goes_elsewhere(word, module, tmp_path, monkeypatch):
    """Into a stand-in for the tool, which is not installed here."""
    got, done = [], []
    writer = SimpleNamespace(add_scalar=lambda *row: got.append(row), close=lambda: done.append(True))
    run = SimpleNamespace(log=lambda line, step: got.append((line, step)), finish=lambda: done.append(True))
    tool = SimpleNamespace(SummaryWriter=lambda path: writer, init=lambda **how: run)
    monkeypatch.setitem(sys.modules, module, tool)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/dft").mkdir(parents=True)
    line = {"step": 7, "loss": 0.5, "grad_norm": None}
    (tmp_path / "out/dft/log.jsonl").write_text(json.dumps(line) + "\n")
    exec(snippet(LAUNCH, word), {})
    assert done and got == ([("step", 7, 7), ("loss", 0.5, 7)] if word == "SummaryWriter" else [(line, 7)])


def test_every_decimal_number_of_the_toy_worlds_page_is_on_a_page_of_results_that_it_names():
    """In the same paragraph, item or row; one that names no page means all that its section names."""
    found = 0
    for section in re.split(r"(?m)^(?=#{2,3} )", (ROOT / "docs/toy.md").read_text()):
        of_section = re.findall(r"results/([\w/-]+)\.(?:md|png)", section)
        for paragraph in re.split(r"\n\s*\n|\n(?=\||\d+\. |\* )", section):
            names = set(re.findall(r"results/([\w/-]+)\.md", paragraph) or of_section)
            pages = [path for name in names if (path := ROOT / f"docs/results/{name}.md").exists()]
            text = "".join(page.read_text() for page in pages)
            for number in re.findall(r"(?<![\d.])\d+\.\d(?: ± \d+\.\d)?(?![\d.])", paragraph):
                on_page = re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", text)
                assert on_page, f"{number} is not on {sorted(names)}: {paragraph[:80]}"
                found += 1
    assert found > 90
