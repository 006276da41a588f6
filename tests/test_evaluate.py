"""Answers against stock generation, scores against numbers worked out by hand."""

import json

import pytest
from conftest import NP
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import evaluate
from support.flags import InputError, to_argv
from support.metrics import exact_match, hallucination, pope, read_objects, read_vocabulary

TEXTS = ["how many objects ?", "is there a red circle here ?", "what color is the object top left ?", "hi"]


@pytest.fixture(scope="module")
def questions(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    lines = [
        {"question_id": k, "text": text, "image": f"{4 * k}.png", "label": "red"}
        for k, text in enumerate(TEXTS)
    ]
    lines[1]["image"] = ["4.png", "8.png"]
    del lines[3]["image"]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_answers_are_those_of_stock_generation(questions, world, checkpoints, tmp_path):
    """Batched and padded here; one question at a time there, the way the README shows."""
    path = checkpoints["small"]
    scores = evaluate.main(["--model", path, checkpoints["large"], "--questions", str(questions), "--images",
                            str(world / "images"), "--out", str(tmp_path), "--max_new_tokens", "8",
                            "--sample", "4"])
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(path),
        AutoProcessor.from_pretrained(path),
    )
    answers = [json.loads(line) for line in open(tmp_path / "small.jsonl")]
    assert [a["question_id"] for a in answers] == [0, 1, 2, 3]
    for k, images in enumerate((["0.png"], ["4.png", "8.png"], ["8.png"], [])):
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": TEXTS[k]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        pictures = [Image.open(world / "images" / name) for name in images] or None
        inputs = processor(images=pictures, text=prompt, return_tensors="pt")
        assert (inputs["input_ids"] == 372).sum() == NP * len(images)
        new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[k]["text"] == processor.decode(new, skip_special_tokens=True).strip()
    assert len({a["text"] for a in answers}) == 4
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert scores["small"]["agreement"] == 100 > scores["large"]["agreement"]
    assert Image.open(tmp_path / "sample.png").size[0] > 500


def test_several_models_are_scored_side_by_side(questions, tmp_path, monkeypatch, capsys):
    """Each beside the first; seconds are those of all answers, whenever they were given, or not known."""
    said = {"out/teacher": ["red", "Red.", "blue", "a dog"], "sft": ["Red", "blue", "blue", "A dog!"],
            "hub/dft": ["red", "red", "green", "cat"], "old": ["red", "red", "red", "red"]}
    took = {"out/teacher": [3, 3, 5, 5], "sft": [0.25, 0.25, 0.5, 0.0136], "hub/dft": [1, 0.5, 0.5, 2]}

    def answer(path, asked, args, file):
        seconds = [{"seconds": s} for s in took.get(path, [])] or [{}, {}, {}, {"seconds": 9}]
        file.write_text("".join(json.dumps({"text": "?"} | s) + "\n" for s in seconds))
        return said[path]

    monkeypatch.setattr(evaluate, "generate", answer)
    monkeypatch.setattr(evaluate, "read_questions", lambda *_: (
        [{"label": "red", "category": c} for c in ("color", "color", "place", "place")], ["q.jsonl line 7"]))
    asked = {"model": list(said), "questions": questions, "out": tmp_path, "skip_bad": 1}
    scores = evaluate.main(to_argv(**asked))
    assert capsys.readouterr().out.splitlines()[-6:] == [
        "| model | accuracy | left_out | agreement | seconds | color | place |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| teacher | 50.0 | 1 | 100.0 | 4.0 | 100.0 | 0.0 |",
        "| sft | 25.0 | 1 | 75.0 | 0.253 | 50.0 | 0.0 |",
        "| dft | 50.0 | 1 | 50.0 | 1.0 | 100.0 | 0.0 |", "| old | 100.0 | 1 | 50.0 | - | 100.0 | 100.0 |"]
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert scores["sft"] == {"accuracy": 25, "by_category": {"color": 50, "place": 0}, "left_out": 1,
                             "agreement": 75, "seconds": pytest.approx(0.2534)}
    assert evaluate.main(to_argv(**asked | {"model": "sft"})) == {
        "sft": {key: scores["sft"][key] for key in ("accuracy", "by_category", "left_out")}}
    assert "|" not in capsys.readouterr().out
    unscored = evaluate.main(to_argv(**asked | {"metric": "none", "model": ["sft", "old"]}))
    assert unscored["old"] == {"left_out": 1, "agreement": 25, "seconds": None}
    assert evaluate.main(to_argv(**asked | {"metric": "none", "model": "sft"})) == {}


def test_the_picture_says_who_answered_what_and_whether_it_is_right(world, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    args = evaluate.parse_args(to_argv(model=["out/sft", "out/dft"], questions="q", images=world / "images"))
    questions = [{"text": f"how many {k} ?", "label": "two", "images": ["0.png"] * (k < 2), "where": "q"}
                 for k in range(3)]
    answers = {"sft": ["Two.", "one", "six"], "dft": ["two"] * 3}
    evaluate.draw_sample(tmp_path / "s.png", questions, answers, args)
    (figure,) = drawn
    said = [text.get_text() for text in figure.findobj(Text)]
    wanted = ["✓ sft: Two.", "✗ sft: one", "✗ sft: six", *["✓ dft: two"] * 3, *["reference: two"] * 3]
    assert sorted(text for text in said if ": " in text) == sorted(wanted)
    assert "sft = out/sft, dft = out/dft; ✓ right, ✗ wrong by --metric exact" in said
    figure.draw_without_rendering()
    places = [axis.get_position().x0 for axis in figure.axes if axis.texts]  # of the three questions
    assert places[0] < 0.25 < 0.5 < places[1] and places[2] == places[0]
    assert sum(bool(axis.images) for axis in figure.axes) == 2  # the third has none

    long = "long " * 30 + "a"
    for model, legend in (long, ""), (f"{long}/b", f"b = {long}/b; "):  # a name is not said twice
        args.model = [model]
        evaluate.draw_sample(tmp_path / "s.png", questions, {model.split("/")[-1]: ["two"] * 3}, args)
        figure = drawn[-1]
        figure.draw_without_rendering()
        (said,) = (text for text in figure.findobj(Text) if "--metric" in text.get_text())
        assert " ".join(said.get_text().split()) == f"{legend}✓ right, ✗ wrong by --metric exact"
        assert said.get_window_extent().width < figure.bbox.width


def test_exact_match_overall_and_by_category():
    qs = [{"label": "Red", "category": "color"}, {"label": "blue", "category": "color"}, {"label": "2"}]
    scores = exact_match(qs, ["red.", "green", " 2 "])
    assert scores["accuracy"] == pytest.approx(200 / 3)
    assert scores["by_category"] == {"all": 100, "color": 50}


def test_what_looks_the_same_is_the_same():
    for label, answer in (("don't", "don’t"), ("caf\u00e9", "cafe\u0301"), ("Ａ", "a"),
                          ("10 cm", "10\u00a0 cm"), ("北京", "北京"), ("red", "red !"), ("2", "２")):
        for end in ".", "。", "．", "!", "！", "":
            assert exact_match([{"label": label}], [f"{answer}{end}"])["accuracy"] == 100, (label, end)
            assert exact_match([{"label": f"{answer}{end}"}], [label])["accuracy"] == 100, (label, end)
    for label, answer in ("cafe", "caf\u00e9"), ("北京", "南京"), ("red", "red?"), ("3.5", "35"):
        assert exact_match([{"label": label}], [answer])["accuracy"] == 0, label


def test_pope_by_hand():
    """Right and wrong of both kinds so many that no two scores are equal."""
    labels = ["yes"] * 4 + ["no"] * 6
    answers = ["Yes.", "yes, there is", "It is, I think", "No",  # TP 3, FN 1
               "Yes", "YES", "no", "There is not. Yes", "it is not, really", "No, none."]  # FP 2, TN 4
    scores = pope([{"label": label} for label in labels], answers)
    expected = {"accuracy": 70, "precision": 60, "recall": 75, "f1": 200 / 3, "yes_ratio": 50, "unclear": 3}
    assert scores == pytest.approx(expected)
    assert pope([{"label": "yes"}], ["no"])["f1"] == 0
    as_its_own_script = pope([{"label": "no"}] * 2, ["NO", "Not really"])
    assert as_its_own_script["accuracy"] == 0


def test_what_is_no_llava_checkpoint_is_refused(questions, world, parts, tmp_path):
    for path, message in (
        (parts["small"], "'qwen2' model"),
        ("/nowhere", "cannot load the checkpoint /nowhere"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.main(to_argv(model=path, questions=questions, images=world / "images", out=tmp_path))


def test_only_the_last_position_gets_logits(questions, world, checkpoints, monkeypatch, tmp_path):
    from torch import nn

    rows, forward = [], nn.Linear.forward
    is_head = lambda layer: layer.out_features == 448
    monkeypatch.setattr(
        nn.Linear,
        "forward",
        lambda self, x: (rows.append(x.shape[1]) if is_head(self) else None, forward(self, x))[1],
    )
    evaluate.main(to_argv(model=checkpoints["small"], questions=questions, images=world / "images",
                               out=tmp_path, max_new_tokens=3))
    assert rows
    assert set(rows) == {1}


def test_bad_questions(world, tmp_path):
    for line, message in (
        ({"image": "0.png"}, "needs 'text'"), ({"text": "?", "image": "0.png"}, "no 'label'"),
        ({"text": "?", "image": "../x", "label": "y"}, "leaves"),
        ({"text": "<image> <image>", "image": "0.png", "label": "y"}, "2 <image>"),
    ):
        (tmp_path / "q.jsonl").write_text(json.dumps(line))
        with pytest.raises(InputError, match=message):
            evaluate.read_questions(str(tmp_path / "q.jsonl"), str(world / "images"), "exact")
    (tmp_path / "q.jsonl").write_text(json.dumps({"text": "?", "image": "no.png", "label": "y"}))
    with pytest.raises(InputError, match="no.png does not exist"):
        evaluate.read_questions(str(tmp_path / "q.jsonl"), str(world / "images"), "exact")
    (tmp_path / "q.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no question"):
        evaluate.read_questions(str(tmp_path / "q.jsonl"), ".", "none")


def described(*objects: str) -> dict:
    question = {"objects": list(objects), "where": "q"}
    return question | read_objects(question)


def test_hallucination_by_hand():
    questions = [described("dog", "traffic light"), described("cat"), described("hot dog"), described("bus")]
    read_vocabulary(questions, None)
    answers = ["Two dogs under a traffic light.", "A cat and a dog, a dog.", "A hot dog.", "An empty street."]
    scores = hallucination(questions, answers)
    assert scores["response_rate"] == 25  # the second
    assert scores["mention_rate"] == pytest.approx(
        100 * 1 / 5
    )  # named: dog, traffic light; cat, dog; hot dog
    assert scores["recall"] == pytest.approx(100 * 4 / 5)
    assert scores["accuracy"] == 75


@pytest.mark.parametrize("text", [
    "person, man, woman\ndog, puppy\n", "\ufeffperson,man,woman\r\ndog,puppy",
    "dog; puppy\n\nperson;woman ; man\n\n", "Person\tman\tWoman\nDog\tPuppy.",
    "person, man, man\ndog,, puppy,\nperson, woman", "- person, man, woman\n- dog, puppy",
    "person，man、woman\ndog；puppy",
])
def test_a_file_of_wordings_in_any_form(tmp_path, text):
    (tmp_path / "synonyms.txt").write_text(text, encoding="utf-8")
    questions = [described("man"), described("dog")]
    read_vocabulary(questions, str(tmp_path / "synonyms.txt"))
    scores = hallucination(questions, ["a woman with a puppy", "a puppy"])
    assert (scores["response_rate"], scores["mention_rate"]) == (50, pytest.approx(100 / 3))
    with pytest.raises(InputError, match="q: the object 'zebra' is not in .*synonyms.txt; add a line for it"):
        read_vocabulary([described("zebra")], str(tmp_path / "synonyms.txt"))


@pytest.mark.parametrize("text, message", [
    ("cow, calf\ndog\nelephant, Calf.\n", "line 3: 'calf' means 'elephant' here and 'cow' before"),
    ("person, man\nman, boy\n", "line 2: 'man' means 'man' here and 'person' before"),
    ('{"dog": ["puppy", "hound"]}', "line 1: '.*cannot be an object's name; a line is an object and"),
    ('{\n "dog": [\n  "puppy"\n ]\n}', "line 1: '{' cannot be"),
    ("dog\ncat: kitten, tabby", "line 2: 'cat: kitten'"), ("* dog\n", r"line 1: '\* dog'"),
    ("# animals\ndog", "line 1: '# animals'"), ("dog | puppy", "line 1"), ("dog/puppy", "line 1"),
    ("dog\nmouse (computer)", "line 2"),
])
def test_a_file_of_wordings_that_can_be_misread_is_refused(tmp_path, text, message):
    (tmp_path / "synonyms.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_vocabulary([described("dog")], str(tmp_path / "synonyms.txt"))


def test_a_vocabulary_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="cannot read the objects' file"):
        read_vocabulary([described("dog")], str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match="cannot read the objects' file"):
        read_vocabulary([described("dog")], str(tmp_path / "latin.txt"))
    with pytest.raises(InputError, match="no question has an object"):
        read_vocabulary([described()], None)
    with pytest.raises(InputError, match="--objects is for --metric hallucination, but --metric is exact"):
        evaluate.main(to_argv(model="m", questions="q", objects="synonyms.txt"))


def test_a_hyphen_is_a_blank():
    questions = [described("dog", "hot-dog", "T-shirt"), described("traffic light"), described("dog")]
    read_vocabulary(questions, None)
    scores = hallucination(questions, ["a hot dog, a t shirt", "A traffic-light.", "a hot-dog stand"])
    assert (scores["recall"], scores["response_rate"]) == (60, pytest.approx(100 / 3))


def test_plurals_of_objects():
    things = "person knife baby woman mouse leaf tooth bus dog policeman child".split()
    plurals = "people knives babies women mice leaves teeth buses dogs policemen children".split()
    questions = [described(thing) for thing in things]
    read_vocabulary(questions, None)
    scores = hallucination(questions, [f"Many {plural}!" for plural in plurals])
    assert (scores["recall"], scores["response_rate"]) == (100, 0)
    assert hallucination(questions[:1], ["Two dogs."])["response_rate"] == 100


def test_hallucination_through_the_command_line(world, checkpoints, tmp_path):
    lines = [
        {"question_id": k, "image": f"{k}.png", "text": "describe", "objects": ["red"]} for k in range(3)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scores = evaluate.main(["--model", checkpoints["small"], "--questions", str(tmp_path / "q.jsonl"),
                            "--images", str(world / "images"), "--metric", "hallucination", "--sample", "2",
                            "--out", str(tmp_path / "out"), "--max_new_tokens", "3"])
    assert scores["small"]["response_rate"] == 0  # nothing but red can be named
    assert (tmp_path / "out" / "sample.png").stat().st_size > 5000
