"""TinyLLaVA's checkpoints are read as TinyLLaVA reads them. Those of tests/tinyllava were written by its own
code; what that code made of them is in values.json and values.safetensors there (see make.py).

python -m pytest tests/test_tinyllava.py
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import ROOT, data_flags, log_of, text_config, vision_config
from PIL import Image
from safetensors.torch import load_file
from test_ckd import cascade_flags

import ckd
import dft
import dpt
import evaluate
import sft
from data import Encoder
from lab import plan
from model import Llava
from support import tinyllava
from support.checkpoints import load_stock
from support.checks import check_sample
from support.flags import InputError, to_argv

HERE = ROOT / "tests/tinyllava"
PICTURES = HERE / "pictures"
VALUES, TENSORS = json.loads((HERE / "values.json").read_text()), load_file(HERE / "values.safetensors")
every = pytest.mark.parametrize("name", VALUES)
near = lambda ours, theirs: torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def models() -> dict[str, Llava]:
    return {name: Llava.from_checkpoint(str(HERE / name)) for name in VALUES}


def changed(folder: Path, name: str, file: str = "config.json", **keys: object) -> str:
    """A copy of a checkpoint with other values in one of its files."""
    shutil.copytree(HERE / name, folder)
    given = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(given | keys))
    return str(folder)


def expand(ids: list[int], model: Llava) -> list[int]:
    """TinyLLaVA's ids, in which an image is one -200, as the model's."""
    image = [model.config.image_token_index] * model.n_visual_tokens
    return [i for token in ids for i in (image if token == -200 else [token])]


def pixels(model: Llava, *pictures: int) -> torch.Tensor:
    images = [Image.open(PICTURES / f"{k}.png") for k in pictures]
    return model.processor.image_processor(images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def logits(model: Llava, name: str, k: int = 0) -> torch.Tensor:
    talk = VALUES[name]["talks"][k]
    features = model.encode_images(pixels(model, 0)[: talk["image"]])
    h = model(torch.tensor([expand(talk["ids"], model)]), features)
    return (h @ model.lm_head.weight.T)[0, -24:, ::8]


def answers(tmp_path: Path, *paths: str) -> list[list[str]]:
    """What evaluate.py has as the answers of these checkpoints to the questions of the first fixture."""
    questions = [{"text": q["text"]} | ({} if q["image"] is None else {"image": f"{q['image']}.png"})
                 for q in VALUES["base"]["answers"]]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    flags = ["--questions", f"{tmp_path}/q.jsonl", "--images", str(PICTURES), "--out", f"{tmp_path}/answers"]
    evaluate.main(["--model", *paths, *flags, "--metric", "none", "--max_new_tokens", "16"])
    files = [tmp_path / "answers" / f"{Path(path).name}.jsonl" for path in paths]
    return [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files]


def told(name: str) -> list[str]:
    return [q["answer"] for q in VALUES[name]["answers"]]


@every
def test_conversations_have_the_same_ids_and_the_same_are_learned(models, name):
    model = models[name]
    encode = Encoder(model, 2048)
    for talk in VALUES[name]["talks"]:
        record = {"conversations": talk["conversations"]} | ({"image": "0.png"} if talk["image"] else {})
        messages = check_sample("it", record, str(PICTURES)).conversations[0]
        if messages[0]["role"] == "system":  # there it is left out without a word
            with pytest.raises(InputError, match="leaves out a turn of"):
                encode(messages)
            messages = messages[1:]
        ids, targets = encode(messages)
        assert ids == expand(talk["ids"], model)
        assert len(ids) == talk["n"]  # as many visual tokens as TinyLLaVA has
        assert [[t + 1, i] for t, i in enumerate(targets) if i >= 0] == talk["learned"]
        assert talk["learned"][-1] == [talk["n"] - 1, model.processor.tokenizer.eos_token_id]
    caption = {"image": "0.png", "conversations": [{"from": "human", "value": "<image>"},
                                                   {"from": "gpt", "value": "a red block"}]}
    ids, _ = Encoder(model, 2048, caption_only=True)(check_sample("it", caption, "/", False).conversations[0])
    theirs = expand(VALUES[name]["caption"], model)
    assert theirs == [*ids[:-1], *model.chat.ids("\n")]  # a caption ends with a newline there,
    assert ids == [*theirs[:-1], model.chat.end_id]  # and here with the end token, as an answer


@every
def test_stock_tools_prompt_as_tinyllava(models, name):
    processor = models[name].processor
    for text, theirs in VALUES[name]["prompts"].items():
        question = text.removeprefix("<image>\n")
        content = [{"type": "image", "image": Image.open(PICTURES / "0.png")}] if question != text else []
        said = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        asks, theirs = [said], expand(theirs, models[name])
        if not content:
            asks += [[{"role": "system", "content": "Rhyme."}, {"role": "user", "content": question}]]
        for ask in asks:
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            assert list(processor.apply_chat_template(ask, **how)["input_ids"][0]) == theirs


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("name", ["base", "clip"])
def test_pixels(tmp_path, name, aspect):
    model = Llava.from_checkpoint(changed(tmp_path / "it", name, image_aspect_ratio=aspect), weights=False)
    near(pixels(model, 0, 3)[..., ::4], TENSORS[f"{name} pixels {aspect}"])


@every
def test_logits(models, name, tmp_path):
    near(logits(models[name], name), TENSORS[f"{name} logits picture"])
    near(logits(models[name], name, k=4), TENSORS[f"{name} logits text"])
    other = {"layer -3": {"vision_feature_layer": -3},
             "cls_patch": {"vision_feature_select_strategy": "cls_patch"}}
    for what, keys in other.items():
        model = Llava.from_checkpoint(changed(tmp_path / what, name, **keys))
        near(logits(model, name), TENSORS[f"{name} logits {what}"])


@every
def test_it_is_saved_as_stock_llava(models, name, tmp_path):
    models[name].save(tmp_path)
    stock, report = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor, ids = hf.AutoProcessor.from_pretrained(tmp_path), VALUES[name]["talks"][0]["ids"]
    assert processor.chat_template == tinyllava.TEMPLATE
    image = ids.index(-200)
    text = "<image>".join(processor.decode(part) for part in (ids[:image], ids[image + 1 :]))
    inputs = processor(images=Image.open(PICTURES / "0.png"), text=text, return_tensors="pt")
    with torch.no_grad():
        near(stock(**inputs).logits[0, -24:, ::8], TENSORS[f"{name} logits picture"])


def test_answers(models, tmp_path):
    for name, model in models.items():
        model.save(tmp_path / f"{name}-saved")
    # As if the language model had another end than the tokenizer.
    text = json.loads((HERE / "instruct/config.json").read_text())["text_config"] | {"eos_token_id": 330}
    odd = changed(tmp_path / "odd", "instruct", text_config=text)
    shutil.copy(HERE / "base/generation_config.json", odd)
    own, saved = [str(HERE / name) for name in VALUES], [f"{tmp_path}/{name}-saved" for name in VALUES]
    theirs = [told(name) for name in VALUES]
    assert answers(tmp_path, *own, *saved, odd) == [*theirs, *theirs, told("instruct")]
    assert len({answer for one in theirs for answer in one}) > 10
    assert set(load_stock(odd, torch.float32)[0].generation_config.eos_token_id) == {330, 332}


@every
def test_what_stands_in_its_files_is_read(models, name):
    given = json.loads((HERE / name / "config.json").read_text())
    config, layer = tinyllava.read_config(str(HERE / name)), -1 if name == "pad" else -2
    assert config.dtype == (torch.bfloat16 if name == "instruct" else torch.float16)
    assert config.vision_feature_layer == models[name].config.vision_feature_layer == layer
    assert config.text_config.rope_parameters["rope_theta"] == given["text_config"]["rope_theta"] == 1e6
    assert not Path(given["vision_model_name_or_path"]).exists()  # the tower's own folder is not looked for
    tied = name != "instruct"
    assert given["text_config"].get("tie_word_embeddings", False) is tied
    head, body = models[name].lm_head.weight, models[name].language_model.embed_tokens.weight
    assert (head is body) is tied
    if tied:  # although another head is in the file
        stored = load_file(HERE / name / "model.safetensors")["language_model.lm_head.weight"]
        assert not torch.allclose(stored.float(), head, atol=0.1)
    tokenizer = hf.AutoTokenizer.from_pretrained(HERE / name)
    assert "<|im_start|>" in tokenizer.chat_template and "<image>" not in tokenizer.get_vocab()
    assert tokenizer.eos_token == ("<|endoftext|>" if tied else "<|im_end|>")
    assert tokenizer.pad_token == tokenizer.unk_token == "<|endoftext|>"


def test_what_llava_kd_adds_is_no_matter(models, tmp_path):
    more = {"architectures": ["LLaVAKD"], "teacher_pretrained_dir": "gone", "teacher_pretrained_name": "gone"}
    model = Llava.from_checkpoint(changed(tmp_path / "it", "base", **more))
    assert torch.equal(logits(model, "base"), logits(models["base"], "base"))


REFUSED = [
    ({"auto_map": {"AutoConfig": "x.Config"}}, "auto_map is .* and must be absent: it names code"),
    ({"connector_config": {}, "connector_type": None}, "connector_type is None in .* must be 'mlp2x_gelu'"),
    ({"connector_config": {"model_type": "mlp"}}, "connector_config is .* must be absent: TinyLLaVA's later"),
    ({"connector_type": "qformer"}, "connector_type is 'qformer' in .* must be 'mlp2x_gelu': .* two layers"),
    ({"connector_type": "mlp3x_gelu"}, "connector_type is 'mlp3x_gelu'"),
    ({"vision_model_name_or_path2": "dinov2"}, "vision_model_name_or_path2 is 'dinov2' .* one tower"),
    ({"vision_model_name_or_path": "google/SigLIP2-base"}, "has the tower google/SigLIP2-base, and SigLIP 2"),
    ({"vision_config": {"model_type": "dinov2"}}, "has a 'dinov2' vision tower; SigLIP's"),
    ({"text_config": {"model_type": "phi"}}, "text_config.model_type is 'phi' in .* must be 'qwen2'"),
    ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres' in .* must be 'square' or 'pad'"),
    ({"image_aspect_ratio": None}, "image_aspect_ratio is None"),
    ({"vision_feature_select_strategy": "cls"}, "strategy is 'cls' in .* must be 'patch' or 'cls_patch'"),
]


@pytest.mark.parametrize("keys, message", REFUSED)
def test_other_forms_are_refused_by_name(tmp_path, keys, message):
    path = changed(tmp_path / "it", "base", **keys)
    with pytest.raises(InputError, match=f"{re.escape(path)}.*[ _]{message}"):
        load_stock(path, torch.float32)


@pytest.mark.parametrize("file, message", [
    ("adapter_config.json", "holds a LoRA adapter: merge it"),
    ("language_model/config.json", r"has its parts in folders \(language_model/"),
    ("pytorch_model.bin", "has no model.safetensors"),
])
def test_folders_without_a_whole_model_are_refused_by_name(tmp_path, file, message):
    path = changed(tmp_path / "it", "base")
    if file != "adapter_config.json":  # LoRA weights are refused beside others too
        (Path(path) / "model.safetensors").unlink()
    (Path(path) / file).parent.mkdir(exist_ok=True)
    (Path(path) / file).write_text("{}")
    advice = "(save model and tokenizer with save_pretrained|and save that)"
    with pytest.raises(InputError, match=f"{message}.*{advice}"):
        load_stock(path, torch.float32, weights=False)


def test_another_end_token_and_missing_weights_are_refused(tmp_path):
    path = changed(tmp_path / "end", "base", "tokenizer_config.json", eos_token="<|im_start|>")
    with pytest.raises(InputError, match="token is '<.im_start.>' and must be <.endoftext.> or <.im_end.>"):
        load_stock(path, torch.float32)
    path = changed(tmp_path / "lost", "instruct")
    (Path(path) / "model.safetensors.index.json").unlink()
    shutil.move(Path(path) / "model-00001-of-00002.safetensors", Path(path) / "model.safetensors")
    with pytest.raises(InputError, match="lacks [0-9]+ of the model's weights"):
        load_stock(path, torch.float32)


def test_plan_needs_its_config_alone(models, tmp_path):
    for name in "base", "instruct":
        (tmp_path / name).mkdir()
        shutil.copy(HERE / name / "config.json", tmp_path / name)
        n = sum(p.numel() for p in models[name].parameters())
        assert plan.sizes(plan.read_config(str(tmp_path / name)))["all"] == n
    path = changed(tmp_path / "it", "base", connector_type="linear")
    with pytest.raises(InputError, match="connector_type is 'linear'"):
        plan.main(["sft", "--student", path])


@every
def test_plan_has_as_many_visual_tokens(models, name, tmp_path):
    """In the checkpoint, and in a new student that it teaches; 9 patches are all of the tower."""
    path, n = str(HERE / name), models[name].n_visual_tokens
    models[name].config.vision_config.save_pretrained(tmp_path / "vision")
    text_config().save_pretrained(tmp_path / "llm")
    new = ["dpt", "--vision", f"{tmp_path}/vision", "--llm", f"{tmp_path}/llm"]
    for argv, np in (["sft", "--student", path], n), ([*new, "--teacher", path], n), (new, 9):
        args = plan.parse_args(argv)
        assert plan.step(args, np + 1)["flops"] > 0
        with pytest.raises(InputError, match=f"no room for an image of {np}$"):
            plan.step(args, np)


@pytest.fixture
def parts(tmp_path) -> dict[str, str]:
    """Folders of a tower and of a language model with the fixtures' tokens."""
    vision = vision_config()
    vision.image_size, vision.num_hidden_layers = 24, 4
    hf.SiglipVisionModel(vision).save_pretrained(tmp_path / "vision")
    hf.SiglipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "vision")
    torch.manual_seed(0)
    language = hf.Qwen2ForCausalLM(text_config(tied=False))
    for p in language.parameters():
        p.data *= 10 if p.dim() == 2 else 1  # so that what it says depends on what it is asked
    language.save_pretrained(tmp_path / "llm")
    hf.AutoTokenizer.from_pretrained(HERE / "base").save_pretrained(tmp_path / "llm")
    return {"vision": f"{tmp_path}/vision", "small": f"{tmp_path}/llm"}


def test_it_teaches_a_new_student_through_all_stages(parts, world, tmp_path):
    """And is trained itself. What is written is stock LLaVA, with its template and 8 of 9 patches."""
    teacher = str(HERE / "instruct")
    flags = lambda out: data_flags(world, out=tmp_path / out, max_steps=1, micro_batch=4, max_len=512)
    new = to_argv(vision=parts["vision"], llm=parts["small"], teacher=teacher)
    dpt.main([*new, *flags("dpt")])
    sft.main(["--student", f"{tmp_path}/dpt", *flags("sft")])
    dft.main(["--student", f"{tmp_path}/sft", "--teacher", teacher, *flags("dft")])
    sft.main(["--student", teacher, *flags("own")])
    for out in "dpt", "sft", "dft", "own":
        (line,) = log_of(tmp_path / out)
        assert 0 < line["loss"] < 100
        student = Llava.from_checkpoint(f"{tmp_path}/{out}")
        assert student.config.model_type == "llava" and student.n_visual_tokens == 8
        assert student.chat.template == tinyllava.TEMPLATE and student.chat.end == "<|im_end|>"
    assert {"l_res", "l_vis", "l_rel"} <= log_of(tmp_path / "dft")[0].keys()
    assert student.config.text_config.tie_word_embeddings is False


def test_a_cascade_of_them_and_its_student_beside_the_teachers(parts, world, tmp_path, capsys):
    """The second prepares pictures in another way. Stock LLaVA gives the student's answers too."""
    teachers, out = [str(HERE / "base"), str(HERE / "pad")], tmp_path / "ckd"
    ckd.main(cascade_flags(world, parts, out, *teachers, max_len=512, finetune_lr=1e-3))
    for folder, teacher in zip(("1-base", "2-pad"), teachers):
        for stage in out / folder / "dpt", out / folder / "dft":
            assert json.loads((stage / "run.json").read_text())["teacher"] == teacher
            assert {"l_res", "l_vis", "l_rel"} <= log_of(stage)[1].keys()
    student = out / "2-pad/dft"
    stock, report = hf.LlavaForConditionalGeneration.from_pretrained(student, output_loading_info=True)
    assert not any(report.values())
    processor = hf.AutoProcessor.from_pretrained(student)
    assert processor.chat_template == tinyllava.TEMPLATE
    questions = [{"text": f"block {k} ?", "image": f"{k}.png", "label": "yes"} for k in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    how = {"questions": tmp_path / "q.jsonl", "images": PICTURES, "metric": "pope", "max_new_tokens": 6}
    scores = evaluate.main(to_argv(model=[*teachers, student], out=tmp_path / "answers", **how))
    head, _, *rows = (row for row in capsys.readouterr().out.splitlines() if row.startswith("|"))
    assert f"\n  {head}\n" in (ROOT / "docs/training.md").read_text()
    assert [row.split()[1] for row in rows] == [*scores] == ["base", "pad", "dft"]
    assert scores["base"]["agreement"] == 100 and all(one["seconds"] > 0 for one in scores.values())
    said = [json.loads(line)["text"] for line in (tmp_path / "answers/dft.jsonl").read_text().splitlines()]
    assert len(set(said)) > 1, said
    for q, answer in zip(questions, said):
        picture = {"type": "image", "image": Image.open(PICTURES / q["image"])}
        asked = [{"role": "user", "content": [picture, {"type": "text", "text": q["text"]}]}]
        inputs = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True,
                                               return_dict=True, return_tensors="pt")
        tokens = stock.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(inputs["input_ids"][0]) :]
        assert processor.decode(tokens, skip_special_tokens=True).strip() == answer
