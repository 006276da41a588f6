"""What questions files hold and models answer in practice: read or refused, never misread."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import launch, new_student, vision_config
from PIL import Image
from test_chat import CHATML, LLAMA, processor_of
from transformers import AutoProcessor, CLIPImageProcessorPil, CLIPVisionConfig, GenerationConfig, pipeline

import evaluate
from support.checkpoints import load_stock
from support.chat import Chat, turn
from support.flags import InputError, to_argv
from support.metrics import pope, read_yes_no


def read(tmp_path: Path, metric: str, *questions: dict, images: Path | str = ".", skip_bad: int = 0):
    """The questions as evaluate.py reads them from a file."""
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps({"text": "?"} | q) for q in questions))
    return evaluate.read_questions(str(path), str(images), metric, skip_bad)


def ask(model: str | Path, file: Path, questions: list[dict], **flags: object) -> list[str]:
    """What evaluate.py asks the model and is answered; `file` keeps it."""
    questions = [{"where": "q", "question_id": k, "images": []} | q for k, q in enumerate(questions)]
    args = evaluate.parse_args(to_argv(model=model, questions="q", **flags))
    return evaluate.generate(str(model), questions, args, file)


@pytest.mark.parametrize("metric, reference, expected", [
    ("pope", {"label": "No"}, "no"), ("pope", {"label": " YES. "}, "yes"),
    ("exact", {"label": 2}, "2"), ("exact", {"label": "Red"}, "Red"), ("exact", {"answer": "Red"}, "Red"),
    ("pope", {"answer": "no"}, "no"), ("pope", {"label": "yes", "answer": "no"}, "yes"),
    ("hallucination", {"objects": ["Dog ", "cat"]}, ["dog", "cat"]), ("hallucination", {"objects": []}, []),
])
def test_a_reference_is_read_into_one_form(tmp_path, metric, reference, expected):
    (question,), bad = read(tmp_path, metric, reference)
    assert (question["objects" if metric == "hallucination" else "label"], bad) == (expected, [])


@pytest.mark.parametrize("metric, reference, message", [
    *(("pope", {"label": label}, "'label'") for label in (None, "maybe", True, 0, "", ["yes"], {"a": "yes"})),
    *(("exact", {"label": label}, "that is one text") for label in (None, ["a", "b"], {}, 2.5, " ")),
    *(("hallucination", {"objects": o}, "must be the list") for o in (None, "dog", [3], [""], [["dog"]])),
    ("hallucination", {}, "must be the list"), ("pope", {}, "no 'label'"),
])
def test_a_reference_that_can_be_misread_is_refused(tmp_path, metric, reference, message):
    with pytest.raises(InputError, match=f"q.jsonl line 1.*{message}"):
        read(tmp_path, metric, reference)


def test_labels_of_any_case_score_as_meant():
    for labels, answers in (
        (("No", "NO", "Yes", "yes."), ["No", "no.", "Yes", "yes"]),
        (("ｎｏ", "ＮＯ。", "ｙｅｓ", "Ｙｅｓ！"), ["Ｎｏ", "Ｎｏ。ＹＥＳ", "ＹＥＳ", "Yes。 It is not."]),
    ):
        scores = pope([read_yes_no({"label": label, "where": "q"}) for label in labels], answers)
        assert (scores["accuracy"], scores["unclear"]) == (100, 0)


def test_pope_counts_the_answers_that_its_script_misreads():
    misread = ["No!", "NO", "**No**", "No\nThe image shows none.", "A dog.", "", "Yes, no doubt", "Nothing"]
    scores = pope([{"label": "no"}] * len(misread), misread)
    assert scores["unclear"] == len(misread)
    assert scores["accuracy"] == pytest.approx(100 / 8)  # the official score: only "Yes, no doubt" is a no
    assert pope([{"label": "no"}], ["No… none"])["accuracy"] == 0  # it ends a sentence at a full stop alone
    plain = ["No", "no.", "No, none.", "Yes", "yes.", "YES", "**Yes**"]
    assert pope([{"label": "no"}] * len(plain), plain)["unclear"] == 0


def test_questions_that_cannot_be_asked(world, tmp_path):
    images = world / "images"
    for question, message in (
        ({"text": "\ud83d?"}, "line 1 holds half of a surrogate pair"),
        ({"category": "\ude00"}, "line 1 holds half of a surrogate pair"),
        ({"video": "a.mp4"}, "line 1 has .*'video'"),
        ({"image": {"path": "0.png"}}, "must be a path"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path, "none", question, images=images)
    (asked, several), _ = read(tmp_path, "none", {"text": "<im<image>age> what?", "image": "0.png"},
                               {"images": ["0.png", "4.png"]}, images=images)
    assert (asked["text"], asked["images"], several["images"]) == ("what?", ["0.png"], ["0.png", "4.png"])
    with pytest.raises(InputError, match="--suffix must not hold <image>"):
        evaluate.main(["--model", "m", "--questions", "q", "--suffix", "look: <image>"])


@pytest.fixture
def some_bad(world, tmp_path) -> dict:
    """The flags of a questions file of which the second has a cut JPEG and the fourth no text."""
    (tmp_path / "images").mkdir()
    shutil.copy(world / "images" / "0.png", tmp_path / "images")
    Image.effect_noise((64, 64), 50).save(tmp_path / "images" / "cut.jpg")
    whole = (tmp_path / "images" / "cut.jpg").read_bytes()
    (tmp_path / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    good = {"text": "how many objects ?", "image": "0.png", "label": "Yes"}
    lines = [good, good | {"image": "cut.jpg"}, good, good | {"text": None}, good]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"questions": tmp_path / "q.jsonl", "images": tmp_path / "images", "out": tmp_path / "out",
            "metric": "pope", "max_new_tokens": 2}


def test_bad_questions_stop_the_run_before_it_answers(some_bad, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", lambda *_: pytest.fail("it has begun to answer"))
    for n in 0, 1:
        message = rf"2 of 5 .*more than --skip_bad {n}; the first: .*line 2: image .*cut\.jpg cannot be read"
        with pytest.raises(InputError, match=message):
            evaluate.main(to_argv(model="m", skip_bad=n, **some_bad))


def test_bad_questions_are_named_left_out_and_counted(some_bad, checkpoints, capsys):
    scores = evaluate.main(to_argv(model=checkpoints["small"], skip_bad=2, **some_bad))["small"]
    said = capsys.readouterr().out
    assert "line 2: image" in said
    assert "line 4 is not a question" in said
    assert scores["left_out"] == 2
    assert json.loads((some_bad["out"] / "scores.json").read_text())["small"] == scores
    ids = [json.loads(line)["question_id"] for line in open(some_bad["out"] / "small.jsonl")]
    assert ids == [0, 2, 4]  # those of their places in the file, not among what is left
    assert scores["accuracy"] in (0, 100)  # three times the same question
    assert f"unclear {scores['unclear']}, left_out 2" in said


def test_ranks_share_the_questions_and_give_the_same_answers(some_bad, world, checkpoints, tmp_path):
    lines = [{"text": f"what color is {k} ?", "image": f"{4 * k}.png", "label": "red"} for k in range(5)]
    some_bad["questions"].write_text("\n".join(map(json.dumps, [*lines, {"text": None}])))
    flags = some_bad | {"model": checkpoints["small"], "images": world / "images", "metric": "exact",
                        "batch": 1, "skip_bad": 1, "max_new_tokens": 6, "sample": 2}
    alone = evaluate.main(to_argv(**flags))
    (tmp_path / "two").mkdir()
    lines = (some_bad["out"] / "small.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two/small.jsonl").write_text("".join(lines[:2]) + lines[2][:-5])  # where a run was killed
    said = launch("evaluate.py", to_argv(**flags | {"out": tmp_path / "two"}))
    assert json.loads((tmp_path / "two" / "scores.json").read_text()) == alone
    assert said.count("left out: ") == said.count("small: accuracy") == 1
    one, two = ([json.loads(line) for line in (folder / "small.jsonl").read_text().splitlines()]
                for folder in (some_bad["out"], tmp_path / "two"))
    assert all(answer.pop("seconds") > 0 for answer in (*one, *two))
    assert one == two
    assert len({answer["text"] for answer in one}) > 2


def test_models_of_the_same_name_keep_their_own_answers(some_bad, monkeypatch):
    files = {}
    said = lambda path, questions, _, file: (
        files.update({path: file}) or file.write_text("{}\n" * 3) and ["no"] * len(questions))
    monkeypatch.setattr(evaluate, "generate", said)
    evaluate.main(to_argv(model=["../x", "x"], skip_bad=2, **some_bad))
    assert files["x"] != files["../x"]
    assert {file.parent for file in files.values()} == {some_bad["out"]}


def test_a_checkpoint_without_a_chat_template(some_bad, checkpoints, tmp_path):
    shutil.copytree(checkpoints["small"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    for name in "processor_config.json", "tokenizer_config.json":
        saved = json.loads((tmp_path / "model" / name).read_text())
        saved.pop("chat_template", None)
        (tmp_path / "model" / name).write_text(json.dumps(saved))
    with pytest.raises(InputError, match="model has no chat template"):
        evaluate.main(to_argv(model=tmp_path / "model", skip_bad=2, **some_bad))


def without_token_counts(path: Path) -> None:
    """Take out of a saved processor what older files do not have."""
    saved = json.loads((path / "processor_config.json").read_text())
    for key in "patch_size", "vision_feature_select_strategy", "num_additional_image_tokens":
        saved.pop(key, None)
    (path / "processor_config.json").write_text(json.dumps(saved))


def test_an_older_processor_is_completed_from_the_model(some_bad, checkpoints, tmp_path):
    answers = {}
    for name in "new", "old":
        shutil.copytree(checkpoints["small"], tmp_path / name)
        if name == "old":
            without_token_counts(tmp_path / name)
            assert AutoProcessor.from_pretrained(tmp_path / name).patch_size is None
        evaluate.main(to_argv(model=tmp_path / name, skip_bad=2, **some_bad))
        lines = (some_bad["out"] / f"{name}.jsonl").read_text().splitlines()
        answers[name] = [json.loads(line)["text"] for line in lines]
    assert answers["old"] == answers["new"] != [""] * 3


def test_an_older_processor_of_a_tower_with_a_class_token(parts, tmp_path):
    from transformers import CLIPVisionModel

    sizes = {k: getattr(vision_config(), k) for k in ("image_size", "patch_size", "hidden_size")}
    CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=32, num_hidden_layers=3,
                                     num_attention_heads=2)).save_pretrained(tmp_path / "clip")
    square = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=square, crop_size=square).save_pretrained(tmp_path / "clip")
    new_student(str(tmp_path / "clip"), parts["small"]).save(tmp_path / "llava")
    without_token_counts(tmp_path / "llava")
    model, processor = load_stock(str(tmp_path / "llava"), torch.float32)
    inputs = processor(images=Image.new("RGB", (16, 16)), text="<image> ?", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == 4
    assert model(**inputs).logits.isfinite().all()


def test_the_pipeline_of_transformers_answers(checkpoints, world, tmp_path):
    """As README shows it, and with the words that evaluate.py gets."""
    asked, flags = {"text": "how many objects ?", "images": ["0.png"]}, {"images": world / "images"}
    (expected,) = ask(checkpoints["small"], tmp_path / "said", [asked], max_new_tokens=6, **flags)
    chat = pipeline("image-text-to-text", model=checkpoints["small"])
    content = [
        {"type": "image", "image": str(world / "images" / "0.png")},
        {"type": "text", "text": asked["text"]},
    ]
    (answer,) = chat(text=[{"role": "user", "content": content}], max_new_tokens=6, return_full_text=False)
    assert answer["generated_text"].strip() == expected != ""


def test_a_question_may_stand_under_its_other_name(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "Why?"}')
    (asked,), _ = evaluate.read_questions(str(tmp_path / "q.jsonl"), ".", "none")
    assert asked["text"] == "Why?"


def test_what_evaluate_does_not_read_or_cannot_write_is_refused(checkpoints, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"text": "Why?", "system": "Be brief."}')
    with pytest.raises(InputError, match="q.jsonl line 1: its 'system' is not read, write it into 'text'"):
        evaluate.read_questions(str(tmp_path / "q.jsonl"), ".", "none")
    (tmp_path / "q.jsonl").write_text('{"text": "Why?"}')
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write --out .*file"):
        evaluate.main(["--model", checkpoints["small"], "--questions", str(tmp_path / "q.jsonl"), "--metric",
                       "none", "--out", str(tmp_path / "file")])


def test_a_line_that_is_no_json(tmp_path):
    good = json.dumps({"text": "?", "label": "a"})
    (tmp_path / "q.jsonl").write_text(f"{good}\n{good[:-3]}\n{good}")
    with pytest.raises(InputError, match="1 of 3 .*line 2 is not valid JSON"):
        evaluate.read_questions(str(tmp_path / "q.jsonl"), ".", "exact")
    good, bad = evaluate.read_questions(str(tmp_path / "q.jsonl"), ".", "exact", 1)
    assert ([q["question_id"] for q in good], len(bad)) == ([0, 2], 1)


@pytest.mark.parametrize("own", [
    {"do_sample": True, "temperature": 9.0, "top_k": 0, "num_return_sequences": 2},
    {"num_beams": 4, "length_penalty": 9.0, "no_repeat_ngram_size": 1},
    {"penalty_alpha": 0.6, "top_k": 4, "max_time": 1e-9, "max_length": 3, "max_new_tokens": 2},
    {"repetition_penalty": 2.5, "guidance_scale": 4.0, "min_new_tokens": 7, "stop_strings": ["e"],
     "exponential_decay_length_penalty": [1, 9.0], "suppress_tokens": list(range(300)),
     "watermarking_config": {"greenlist_ratio": 0.25, "bias": 50.0}, "forced_eos_token_id": 371},
], ids=lambda own: next(iter(own)))
def test_a_checkpoint_s_own_settings_do_not_change_its_answers(world, checkpoints, tmp_path, own):
    """Greedy is the likeliest next token each time, whatever the checkpoint would rather have."""
    shutil.copytree(checkpoints["small"], tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    questions = [{"text": f"what color is {k} ?", "images": [f"{k}.png"]} for k in range(3)]
    plain, with_own = (ask(model, tmp_path / str(k), questions, images=world / "images", max_new_tokens=6)
                       for k, model in enumerate((checkpoints["small"], tmp_path / "model")))
    assert with_own == plain
    assert len(set(plain)) > 1


def test_an_answer_has_no_position_that_the_model_has_not_learned(checkpoints, tmp_path):
    shutil.copytree(checkpoints["small"], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    chat = Chat(load_stock(str(tmp_path / "model"), torch.float32)[1])
    n = len(chat.ids(chat.render([turn("user", "how many ?")], ask=True)))
    config["text_config"]["max_position_embeddings"] = n + 6
    path.write_text(json.dumps(config))
    asked = [{"text": "how many ?"}]
    assert ask(tmp_path / "model", tmp_path / "said", asked, max_new_tokens=6)
    message = f"embeddings {n + 6}, but a question has {n} tokens, and --max_new_tokens is 7: give less"
    with pytest.raises(InputError, match=message):
        ask(tmp_path / "model", tmp_path / "more", asked, max_new_tokens=7)


def test_answers_end_where_the_checkpoint_says(checkpoints, tokenizer, tmp_path):
    shutil.copytree(checkpoints["small"], tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(range(448))}))
    ended = ask(tmp_path / "model", tmp_path / "said", [{"text": "how many ?"}], max_new_tokens=6)
    assert ended == ask(checkpoints["small"], tmp_path / "one", [{"text": "how many ?"}], max_new_tokens=1)
    says_none = SimpleNamespace(generation_config=GenerationConfig())
    assert evaluate.greedy(says_none, tokenizer).eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["added", "written"])
def test_questions_are_asked_with_one_begin_token(checkpoints, world, tmp_path, monkeypatch, template):
    """The ids of training, where the tokenizer adds the begin token and where the template writes it too."""
    shutil.copytree(checkpoints["small"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    processor = processor_of(template, begin=True)
    processor.save_pretrained(tmp_path / "model")
    model, _ = load_stock(str(tmp_path / "model"), torch.float32)
    asked = []
    generate = lambda self, input_ids, **_: asked.append(input_ids) or input_ids
    monkeypatch.setattr(type(model), "generate", generate)
    ask(tmp_path / "model", tmp_path / "said", [{"text": "how many ?"}])
    chat = Chat(processor)
    assert asked[0].tolist() == [chat.ids(chat.render([turn("user", "how many ?")], ask=True))]
    assert asked[0].tolist()[0].count(processor.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name, value", [
    ("model.language_model.norm.weight", float("nan")), ("lm_head.weight", float("inf")),
    ("model.language_model.layers.0.mlp.up_proj.weight", 1e38),  # finite, but what is computed is not
], ids=["nan", "inf", "large"])
def test_a_model_that_computes_no_numbers_is_refused(some_bad, checkpoints, tmp_path, name, value):
    model, processor = load_stock(checkpoints["small"], torch.float32)
    with torch.no_grad():
        model.get_parameter(name)[..., :3] = value
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="model computes logits that are not finite: its weights hold"):
        evaluate.main(to_argv(model=tmp_path / "model", skip_bad=2, **some_bad))
    assert not (some_bad["out"] / "scores.json").exists()
