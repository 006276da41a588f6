"""Samples, masks, truncation, batches; and one clear sentence for every kind of bad input."""

import argparse
import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import NP, open_data, turns
from PIL import Image
from transformers import AutoProcessor

from data import IGNORE, Encoder, count_rows, global_batches, schedule
from support import index
from support.chat import Chat
from support.checks import check_sample
from support.flags import InputError
from support.index import Index, records


@pytest.fixture(scope="module")
def processor(checkpoints):
    return AutoProcessor.from_pretrained(checkpoints["small"])


def encoder(processor, max_len=200, caption_only=False):
    """(token ids, labels): the ids of answers, IGNORE elsewhere."""
    encode = Encoder(SimpleNamespace(chat=Chat(processor), n_visual_tokens=NP), max_len, caption_only)

    def code(messages):
        ids, targets = encode(messages)
        assert targets[-1] == IGNORE  # nothing follows
        return ids, [IGNORE, *targets[:-1]]

    return code


def messages(*texts, image="x.png"):
    record = {"conversations": turns(*texts), **({"image": image} if image else {})}
    return check_sample("sample", record, "/images", exist=False)[0][0]


def decode(processor, ids):
    return processor.tokenizer.decode(ids)


# ---------------------------------------------------------------------------------- ids and labels


def test_labels_cover_every_answer_and_its_end_token_and_nothing_else(processor):
    ids, labels = encoder(processor)(messages("is there <image>", "a red circle", "how many ?", "two"))
    text = (
        "USER: "
        + "<image>" * NP
        + "\nis there ASSISTANT: a red circle<|endoftext|>USER: how many ? ASSISTANT: two"
    )
    assert decode(processor, ids) == text + "<|endoftext|>"
    learned = [i for i, label in zip(ids, labels) if label != IGNORE]
    assert decode(processor, learned) == " a red circle<|endoftext|> two<|endoftext|>"
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))


def test_the_prompt_tokens_are_those_of_generation(processor):
    """The mismatch behind several published bugs: a space that merges into the answer in training only."""
    ids, labels = encoder(processor)(messages("how many objects ?", "two", image=None))
    turn = [{"role": "user", "content": [{"type": "text", "text": "how many objects ?"}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    tokens = processor(text=prompt)["input_ids"][0]
    first_answer = next(k for k, label in enumerate(labels) if label != IGNORE)
    assert ids[:first_answer] == list(tokens)
    assert processor.tokenizer.convert_ids_to_tokens(ids[first_answer]) == "Ġtwo"


def test_image_expansion_is_that_of_the_stock_processor(processor):
    sample = messages("left <image> and <image> right", "red", image=["a.png", "b.png"])
    ids, _ = encoder(processor)(sample)
    text = processor.apply_chat_template(sample)
    images = [Image.new("RGB", (30, 20))] * 2
    assert ids == processor(images=images, text=text)["input_ids"][0]


def test_caption_only_leaves_the_question_out(processor):
    ids, labels = encoder(processor, caption_only=True)(messages("describe <image>", "red circle top left"))
    assert decode(processor, ids) == "<image>" * NP + "red circle top left<|endoftext|>"
    assert labels == [IGNORE] * NP + ids[NP:]


def test_a_system_turn_comes_first(processor):
    record = {"conversations": [{"from": "system", "value": "be brief"}, *turns("how many ?", "two")]}
    ids, _ = encoder(processor)(check_sample("s", record, ".")[0][0])
    assert decode(processor, ids).startswith("be brief USER: how many ? ASSISTANT: two")


@pytest.mark.parametrize("max_len", range(1, 40))
def test_truncation_never_cuts_an_image(processor, max_len):
    sample = messages("<image> how many ?", "two", "and <image> here ?", "one", image=["a.png", "b.png"])
    whole = encoder(processor)(sample)[0]
    ids, labels = encoder(processor, max_len)(sample)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert len(ids) == len(labels) <= max_len
    assert ids == whole[: len(ids)]
    assert ids.count(image_id) % NP == 0


# ---------------------------------------------------------------------------------- batches


def make_data(world, processor, name="train.json", **more):
    return open_data(world / name, world / "images", processor, **more)


def test_json_and_jsonl_are_the_same_data(world, processor):
    a, b = (make_data(world, processor, name) for name in ("train.json", "train.jsonl"))
    assert [a.sample(i)[1:] for i in range(24)] == [b.sample(i)[1:] for i in range(24)]
    assert "line 3" in b.sample(2)[0]


def test_rows_of_a_batch(world, processor):
    data = make_data(world, processor)
    batch = data.collate([data[k] for k in (0, 1, 3)])  # one image; text only; two images
    assert batch.pixel_values.shape == (3, 3, 16, 16)
    assert batch.visual.sum(1).tolist() == [NP, 0, 2 * NP]
    for row, sample in enumerate(data[k] for k in (0, 1, 3)):
        ((ids, targets),) = sample["rows"]
        n = len(ids)
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.y.shape[1] - n)
        for t in range(n):
            answer_next = targets[t] != IGNORE
            image, image_next = (t + d < n and ids[t + d] == 372 for d in (0, 1))
            assert batch.response[row, t] == answer_next
            assert batch.prompt[row, t] == (t + 1 < n and not answer_next and not image and not image_next)
            assert batch.y[row, t] == (ids[t + 1] if answer_next else IGNORE) == targets[t]
        assert not batch.response[row, n:].any() | batch.prompt[row, n:].any()
    one = [batch.response.sum(), 3 * NP, batch.prompt.sum(), 3, batch.attention_mask.sum()]
    assert count_rows([batch], Alone) == (*one, 0)
    assert count_rows([batch, batch], Alone) == (*(2 * count for count in one), 0)


class Alone:
    """A rank that has no others."""

    device, sum = torch.device("cpu"), staticmethod(lambda numbers: numbers)


@pytest.mark.parametrize("max_len, seen", [(99, 2), (NP + 12, 1)])
def test_a_picture_that_is_cut_off_leaves_no_pixels(tmp_path, processor, max_len, seen):
    """Else every later picture of the batch would stand in the place of the one before."""
    for k in range(3):
        Image.new("RGB", (16, 16), (80 * k,) * 3).save(tmp_path / f"{k}.png")
    two = turns("<image>\nhow many ?", "one", "and <image> here, top left ?", "two")
    samples = [{"image": ["0.png", "1.png"], "conversations": two},
               {"image": "2.png", "conversations": turns("<image>\nhow many ?", "one")}]
    (tmp_path / "d.json").write_text(json.dumps(samples))
    data = open_data(tmp_path / "d.json", tmp_path, processor, max_len=max_len)
    batch = data.collate([data[0], data[1]])
    assert batch.visual.sum(1).tolist() == [seen * NP, NP]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [0, 80][:seen] + [160]


def test_lengths_for_grouping_count_visual_tokens(tmp_path, processor):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    samples = [{"image": ["0.png"] * n, "conversations": turns("how many ?", "one")} for n in range(3)]
    (tmp_path / "d.json").write_text(json.dumps(samples))
    none, one, two = open_data(tmp_path / "d.json", tmp_path, processor).lengths
    assert (one - none, two - one) == (NP, NP)


def test_a_text_only_batch(world, processor):
    data = make_data(world, processor)
    batch = data.collate([data[1], data[5]])
    assert batch.pixel_values.shape[:2] == (0, 3)
    assert not batch.visual.any()


def test_batches_are_of_one_modality_and_of_similar_length(world, processor):
    data = make_data(world, processor)
    batches = global_batches(data, 4, "7", group_by_modality=True)
    kinds = [{bool(data.n_images[i]) for i in batch} for batch in batches]
    assert sum(len(kind) == 2 for kind in kinds) <= 1  # only the one made of leftovers may be mixed
    assert len({i for batch in batches for i in batch}) == 24
    for batch in batches:
        lengths = [data.lengths[i] for i in batch]
        assert lengths == sorted(lengths, reverse=True)
    assert batches == global_batches(data, 4, "7", group_by_modality=True)
    assert batches != global_batches(data, 4, "8", group_by_modality=True)


def test_the_order_ignores_the_state_of_other_generators(world, processor):
    args = argparse.Namespace(
        seed=1, epochs=2, max_steps=0, global_batch=5, group_by_modality=False, data="x"
    )
    data = make_data(world, processor)
    first = schedule(data, args)
    random.random(), torch.rand(1)
    assert first == schedule(data, args)
    assert len(first) == 2 * (24 // 5)
    assert first[:4] != first[4:]  # epochs differ


# ---------------------------------------------------------------------------------- bad input

GOOD = {"id": "g", "image": "0.png", "conversations": turns("<image> hi", "ho")}
BAD = {
    "sample object": 7,
    "no 'conversations'": {"id": 1},
    "turn 0, needs 'from'": {"conversations": [{"value": "x"}]},
    "turn 1, needs 'from'": {"conversations": [turns("q")[0], {"from": "gpt", "value": 3}]},
    "turn 1, is 'human'": {"conversations": turns("q") + turns("q")},
    "no 'gpt' turn": {"conversations": turns("q")},
    "turn 0, needs 'from' ": {"conversations": [{"from": ["human"], "value": "x"}]},
    "turn 1, has <image>, but": {"conversations": turns("q", "<image>"), "image": "0.png"},
    "2 <image> for 1 images": GOOD | {"conversations": turns("<image> <image>", "ho")},
    "1 <image> for 2 images": GOOD | {"image": ["0.png", "1.png"]},
    r"has \['video'\], which is not read": {"video": "a.mp4", "conversations": turns("hi", "ho")},
    r"it has \['data'\]": {"data": [GOOD]},
    "must be a path": GOOD | {"image": {"a": 1}},
    "leaves the image folder": GOOD | {"image": "../train.json"},
    "'/etc/hostname' leaves": GOOD | {"image": "/etc/hostname"},
    "does not exist": GOOD | {"image": "missing.png"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_record_is_named(world, processor, message, tmp_path):
    for name, text, place in (
        ("d.json", json.dumps([GOOD, BAD[message]]), "sample 1"),
        ("d.jsonl", "\n".join([json.dumps(GOOD), "", json.dumps(BAD[message])]), "line 3"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message) as error:
            open_data(tmp_path / name, world / "images", processor)
        assert place in str(error.value)
        assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "cut.json").write_text('[{"id": 1},\n {"id"')
    (tmp_path / "cut.jsonl").write_text('{"id": 1}\n{"id"')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, message in (("none.json", "cannot read"), ("cut.json", "cut.json is not valid JSON"),
                          ("cut.jsonl", "line 2 is not valid JSON"),
                          ("binary.json", "not valid JSON: 'utf-8' codec"),
                          ("deep.json", "not valid JSON")):
        with pytest.raises(InputError, match=message):
            list(records(tmp_path / name))


def test_lines_of_objects_may_be_called_json(tmp_path):
    """As POPE's files are; and an UTF-8 byte order mark is no data."""
    (tmp_path / "q.json").write_text('\ufeff{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert list(records(tmp_path / "q.json")) == [
        (f"{tmp_path}/q.json line {k}", {"a": a}) for k, a in ((1, 1), (3, 2))
    ]


def test_a_leading_answer_and_a_trailing_question_are_left_out(processor):
    """As LLaVA-1.5 does with the conversations of its mix that begin with an answer."""
    odd = [{"from": "gpt", "value": "hello"}, *turns("how many ?", "two", "and now ?")]
    (sample,) = check_sample("s", {"conversations": odd}, ".").conversations
    ids, labels = encoder(processor)(sample)
    assert decode(processor, ids) == "USER: how many ? ASSISTANT: two<|endoftext|>"
    assert decode(processor, [i for i, label in zip(ids, labels) if label != IGNORE]) == " two<|endoftext|>"


def test_markers_cannot_be_smuggled_in(processor):
    record = {"conversations": turns("<im<image>age> hi", "ho"), "image": "a.png"}
    (sample,) = check_sample("s", record, ".", exist=False).conversations
    assert encoder(processor)(sample)[0].count(372) == NP


def test_nothing_left_after_length_filtering(world, processor):
    with pytest.raises(InputError, match="none of 24 samples has anything to learn within --max_len 5, of"):
        make_data(world, processor, max_len=5)
    kept = make_data(world, processor, max_len=20)
    assert 0 < kept.n_too_long < 24
    for k in range(len(kept)):
        assert any(target != IGNORE for target in kept[k]["rows"][0][1])


def test_corrupt_images_become_empty_samples_that_are_counted(world, processor, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes((world / "images" / "0.png").read_bytes()[:100])
    (tmp_path / "images" / "link.png").symlink_to(world / "train.json")
    (tmp_path / "d.json").write_text(json.dumps([GOOD, GOOD | {"image": "link.png"}]))
    data = open_data(tmp_path / "d.json", tmp_path / "images", processor)
    batch = data.collate([data[0], data[1]])
    assert "0.png cannot be read" in batch.bad[0]
    assert "(id g)" in batch.bad[0]
    assert "link.png cannot be read" in batch.bad[1]
    assert count_rows([batch], Alone) == (1, 1, 1, 1, 2, 2)  # no rows and no images count as 1


def test_a_picture_beyond_pillows_limit_is_refused_by_name(tmp_path, monkeypatch):
    from support.checks import load_image

    Image.new("RGB", (30, 40)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with pytest.raises(InputError, match="big.png cannot be read .30 x 40 pixels, Pillow's limit is 1199"):
        load_image("sample 0", str(tmp_path), "big.png")


# ---------------------------------------------------------------------------------- the index


def test_the_index_is_made_once_and_again_when_the_file_changed(world, processor, tmp_path, monkeypatch):
    made, make = [], Index._make
    monkeypatch.setattr(Index, "_make", lambda *a: made.append(1) or make(*a))
    path = tmp_path / "train.json"
    path.write_text((world / "train.json").read_text())
    data = lambda: open_data(path, world / "images", processor)
    assert len(data()) == len(data()) == 24
    assert len(made) == 1
    path.write_text(json.dumps(json.loads(path.read_text())[:7]))
    assert len(data()) == 7
    assert len(made) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["train.json"]  # nothing beside the user's data


def test_an_index_that_cannot_be_written(world, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CACHE", tmp_path / "file" / "cache")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        InputError, match="or make an index .* XDG_CACHE_HOME .*Not a directory: .*file/cache"
    ):
        open_data(world / "train.json", world / "images", processor)


@pytest.mark.parametrize("form", ["list", "indented", "lines", "bom"])
def test_an_index_gives_every_record_back(tmp_path, form):
    """Characters of several bytes, escapes, halves of surrogate pairs, numbers, empty lines."""
    want = [{"id": 1, "t": "é漢🙂"}, {"t": 'a "quoted" \\\\ one, ] }'}, 12345, [], {"h": "\ud800"}]
    want += [{"x": [1.5e3, None, True]}, "s"]
    text = json.dumps(want, ensure_ascii=form == "lines", indent=2 if form == "indented" else None)
    if form == "lines":
        text = "\n".join(json.dumps(r) for r in want) + "\n\n"
    data = ("\ufeff" * (form == "bom") + text).encode("utf-8", "surrogatepass")
    if form != "lines":  # JSON text cannot hold half a pair but as an escape
        data = data.replace("\ud800".encode("utf-8", "surrogatepass"), rb"\ud800")
    (tmp_path / "f.json").write_bytes(data)
    found = Index(str(tmp_path / "f.json"), "", 1, lambda place, record: (len(str(record)),))
    assert [found.read(i)[1] for i in range(len(want))] == want
    assert found.sizes.flatten().tolist() == [len(str(record)) for record in want]
    places = [found.read(i)[0] for i in (0, 2)]
    assert places == [f"{tmp_path}/f.json {'line' if form == 'lines' else 'sample'} {k}"
                      for k in ((1, 3) if form == "lines" else (0, 2))]


def test_a_file_without_samples(tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(InputError, match="empty.json holds no sample"):
        Index(str(tmp_path / "empty.json"), "", 1, lambda place, record: (0,))
    assert not list(index.CACHE.glob("empty.json.*"))
