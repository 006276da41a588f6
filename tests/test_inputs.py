"""What real data and checkpoints hold: read as meant, or refused with a sentence that says what to do.

python -m pytest tests/test_inputs.py
"""

import gzip
import io
import json
import os
import random
import struct
from functools import partial

import pytest
import torch
from conftest import data_flags, open_data, turns
from PIL import Image
from transformers import AutoProcessor, Gemma2Config, GemmaConfig, PhiConfig

import dpt
import sft
from data import IGNORE
from model import Llava
from support.chat import CHAT_TEMPLATE, Chat, turn
from support.checks import check_pair, check_sample, load_image
from support.flags import InputError
from support.index import Index, records

TALK = turns("what is it ?", "a dog")
MARKED = turns("<image>\nwhat is it ?", "a dog")


def read(record: dict):
    sample = check_sample("sample 0", record, "/images", exist=False)
    return sample.conversations[0], sample.images


# ---------------------------------------------------------------------------------- samples of several forms


@pytest.mark.parametrize("record", [
    {"images": ["a.png"], "conversations": MARKED},
    {"image": "a.png", "conversations": TALK},
    {"image": ["a.png"], "images": [], "conversations": MARKED},
    {"image": "a.png", "messages": [{"role": "user", "content": "<image>what is it ?"},
                                    {"role": "assistant", "content": "a dog"}]},
    {"image": "a.png", "conversations": [{"from": "Human", "value": "what is it ? <image>"},
                                         {"from": "GPT", "value": "a dog"}]},
    {"image": "a.png", "conversations": [{"from": "user", "value": "<image>what is it ?"},
                                         {"from": "assistant", "value": "a dog"}]},
])
def test_one_sample_in_the_forms_of_many_tools(record):
    assert read(record) == read({"image": "a.png", "conversations": MARKED})


NO_IMAGE = [{}, {"image": ""}, {"image": None}, {"image": [None]}, {"images": []}]


@pytest.mark.parametrize("none", NO_IMAGE)
def test_an_answer_that_mentions_the_marker_is_text(none, checkpoints):
    messages, images = read(none | {"conversations": turns("what marks it ?", "<image> marks a picture")})
    assert images == []
    ids, targets = Llava.from_checkpoint(checkpoints["small"]).chat.encode(messages)
    assert 372 not in ids
    assert sum(target != IGNORE for target in targets) > 5


ELSEWHERE = ["image_path", "video_path", "file_name", "image_url", "Image", "img", "media", "Pictures"]


@pytest.mark.parametrize("none", [*NO_IMAGE, *({key: "a.png"} for key in ("path", *ELSEWHERE))])
def test_a_question_whose_picture_is_not_read_is_refused(none):
    pair = {"question": "<image>what is it ?", "chosen": "a dog", "rejected": "a cat"}
    for check, record in (check_sample, {"conversations": MARKED}), (check_pair, pair):
        with pytest.raises(InputError, match="no 'image' is read|but pictures are read from 'image'"):
            check("s", record | none, "/images", exist=False)


@pytest.mark.parametrize("key", ELSEWHERE)
def test_pictures_under_another_key_are_refused_by_name(key):
    """Also without a marker, and in a turn; beside pictures that are read, or as a number, they are notes."""
    with pytest.raises(InputError, match=rf"\['{key}'\], but pictures are read from 'image'"):
        read({key: ["a.png"], "conversations": TALK})
    with pytest.raises(InputError, match=f"turn 0, .*'{key}'"):
        read({"conversations": [TALK[0] | {key: "a.png"}, TALK[1]]})
    assert read({key: 7, "conversations": TALK})[1] == read({key: None, "conversations": TALK})[1] == []
    assert read({key: "b.png", "image": "a.png", "conversations": TALK})[1] == ["a.png"]
    with pytest.raises(InputError, match="turn 0, names a picture; name it under 'image' of the sample"):
        read({"conversations": [TALK[0] | {"image": "a.png"}, TALK[1]]})


@pytest.mark.parametrize("image, why", [
    ("http://coco.org/a.jpg", "is an address"),
    ("data:image/png;base64," + "A" * 80_000, "the picture itself"),
    ({"bytes": "A" * 80_000, "path": None}, "write pictures into files"),
    ({"<image_00>": "a.png"}, "write pictures into files"),
    ("a.MP4", "is a film, which is not read: give pictures of it"),
])
def test_pictures_that_are_no_files_are_refused_in_few_words(image, why):
    with pytest.raises(InputError, match=why) as error:
        read({"image": image, "conversations": MARKED})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("record, message", [
    ({key: ["x"], "conversations": TALK}, rf"sample 0 has \['{key}'\], which is not read: write it into")
    for key in ("history", "tools", "video", "videos", "audios", "rejected_response")
] + [
    ({"conversations": [TALK[0], TALK[1] | {key: "x"}]}, rf"turn 1, has \['{key}'\], which is not read")
    for key in ("tool_calls", "reasoning_content", "mask")
] + [
    ({"messages": turns("q", "a"), "conversations": TALK}, "has 'conversations' and 'messages'; give one"),
    ({"system": "brief", "conversations": [{"from": "system", "value": "no"}, *TALK]}, "is 'system'"),
    ({"system": ["be brief"], "conversations": TALK}, "turn 0, needs 'from'"),
    ({"loss_mask": [1], "conversations": TALK}, "one for each of its 2 turns"),
    ({"loss_mask": [1, 1], "conversations": TALK}, r"turn 0, is marked \[1\]; read is 0"),
    ({"loss_mask": 0, "conversations": TALK}, "'loss_mask' must be a list of 0 or 1"),
    ({"train": False, "conversations": TALK}, r"sample 0 is marked \[False\] as a whole: leave"),
    ({"weight": 0.5, "conversations": TALK}, r"is marked \[0.5\] as a whole"),
    ({"conversations": [TALK[0], TALK[1] | {"weight": 0.5}]}, r"turn 1, is marked \[0.5\]"),
    ({"conversations": [TALK[0], TALK[1] | {"loss": [0]}]}, r"turn 1, is marked \[\[0\]\]"),
    ({"conversations": [TALK[0], TALK[1] | {"train": False}]}, "answers a human one and is learned"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, "'value' .a string, "),
])
def test_what_means_something_is_read_or_refused(record, message):
    with pytest.raises(InputError, match=message):
        read(record)


def test_notes_are_no_reason_to_stop():
    notes = {"id": 1, "source": "x", "metadata": {"a": 1}, "system": "", "history": [], "tools": None,
             "weight": 1, "loss_mask": []}
    assert read(notes | {"conversations": TALK, "messages": TALK}) == read({"conversations": TALK})


def test_a_system_prompt_beside_the_turns_is_a_system_turn():
    first = {"from": "system", "value": "be brief"}
    assert read({"system": "be brief", "conversations": TALK}) == read({"conversations": [first, *TALK]})
    pair = {"question": "q", "chosen": "a", "rejected": "b", "system": "be brief"}
    for talk in check_pair("pair 0", pair, ".").conversations:
        assert [m["role"] for m in talk] == ["system", "user", "assistant"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, "loss_mask"])
def test_an_answer_that_is_marked_so_is_not_learned(mark, checkpoints, tmp_path):
    talk = turns("q", "first one", "and ?", "second")
    record = {"conversations": talk, "loss_mask": [0, 0, 0, 1]}
    if mark != "loss_mask":
        record = {"conversations": [talk[0], talk[1] | mark, talk[2], talk[3] | dict.fromkeys(mark, 1)]}
    (tmp_path / "d.json").write_text(json.dumps([record, {"conversations": talk}]))
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    marked, plain = open_data(tmp_path / "d.json", tmp_path, processor)
    (ids, y), (all_ids, _) = marked["rows"][0], plain["rows"][0]
    assert ids == all_ids
    assert processor.tokenizer.decode([t for t in y if t != IGNORE]) == " second<|endoftext|>"
    caption = open_data(tmp_path / "d.json", tmp_path, processor, caption_only=True)[0]["rows"][0][0]
    assert processor.tokenizer.decode(caption) == "second<|endoftext|>"
    long = talk[2] | {"value": "and " * 200}  # of what stands before it, only the marked answer fits
    for first, n_too_long in (record["conversations"][1], 1), (talk[1], 0):
        one = record | {"conversations": [talk[0], first, long, talk[3]]}
        one = one if n_too_long else {"conversations": one["conversations"]}
        (tmp_path / "d.json").write_text(json.dumps([one, {"conversations": TALK}]))
        assert open_data(tmp_path / "d.json", tmp_path, processor, max_len=150).n_too_long == n_too_long


def test_several_files_are_one_data_set(world, checkpoints, tmp_path, capsys):
    """In their order, each named by its own file, with all that is bad in any of them."""
    samples = [{"id": k, "conversations": turns(f"question {k}", "two")} for k in range(5)]
    files = [tmp_path / name for name in ("a.json", "b.jsonl", "c.json")]
    for file, part in zip(files, (samples[:2], samples[2:3], [{"id": 9}, *samples[3:]])):
        file.write_text("\n".join(map(json.dumps, part)))
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    args = {"images": tmp_path, "processor": processor, "skip_bad": 1}
    data = open_data(files, **args)
    assert [data[k]["name"] for k in range(5)] == [
        f"{tmp_path}/{place} (id {k})" for k, place in
        enumerate(("a.json line 1", "a.json line 2", "b.jsonl line 1", "c.json line 2", "c.json line 3"))]
    assert len(data.bad) == 1
    assert data.bad[0].startswith(f"{tmp_path}/c.json line 1 has no")
    flags = data_flags(world, out=tmp_path / "out", global_batch=5, micro_batch=5, skip_bad=1, max_steps=1)
    at = flags.index("--data")
    sft.main(["--student", checkpoints["small"], *flags[:at + 1], *map(str, files), *flags[at + 2:]])
    assert "1 steps of 5 of 5 samples" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--data", "b"], ["--data=b"], ["--no-group_by_modality"]])
def test_a_flag_given_twice_is_refused(words):
    given = ["--student", "s", "--out", "o", "--data", "a", "--group_by_modality"]
    with pytest.raises(InputError, match="^--(data|group_by_modality) is given twice; give it once"):
        sft.parse_args([*given, *words])
    assert sft.parse_args([*given[:6], "b"]).data == ["a", "b"]


def test_images_without_a_marker_are_counted(world, checkpoints, tmp_path, capsys):
    talks = [TALK, MARKED] * 4
    samples = [{"image": f"{k}.png", "conversations": talk} for k, talk in enumerate(talks)]
    (tmp_path / "d.json").write_text(json.dumps(samples))
    flags = data_flags(world, data=tmp_path / "d.json", out=tmp_path / "out", max_steps=1)
    sft.main(["--student", checkpoints["small"], *flags])
    assert "  4 samples have images but no <image>" in capsys.readouterr().out


def test_two_lists_of_images_must_be_one():
    with pytest.raises(InputError, match=r"'image' and 'images', \[\['a.png'\], \['b.png'\]\]; give one"):
        read({"image": "a.png", "images": ["b.png"], "conversations": MARKED})


def test_an_index_of_another_image_folder_is_not_used(world, checkpoints, tmp_path):
    """With --skip_bad too: absolute paths lie inside of a folder or outside."""
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    sample = {"image": str(world / "images/0.png"), "conversations": MARKED}
    (tmp_path / "d.json").write_text(json.dumps([sample, {"conversations": TALK}]))
    wrong, right = (open_data(tmp_path / "d.json", root, processor, skip_bad=1)
                    for root in (tmp_path, world / "images"))
    assert (len(wrong), len(wrong.bad)) == (1, 1)
    assert (len(right), len(right.bad)) == (2, 0)


def test_a_long_sample_that_cannot_be_encoded_is_named_when_it_is_met(checkpoints, tmp_path):
    """As a system turn under a template that refuses those; its length is asked for beforehand."""
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    processor.chat_template = refuses + processor.chat_template
    odd = [{"from": "system", "value": "be brief " * 40}, *TALK]
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": TALK}, {"conversations": odd}]))
    data = open_data(tmp_path / "d.json", tmp_path, processor, max_len=100)
    assert len(data) == 2
    assert "sample 1 (id None): the chat template of" in data[1]["bad"]
    assert "no system turns" in data[1]["bad"]


def test_pre_training_on_text_alone_is_refused(world, parts, tmp_path):
    """It trains the projector, which text does not reach."""
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": TALK}] * 8))
    flags = data_flags(world, data=tmp_path / "d.json", out=tmp_path / "out")
    with pytest.raises(InputError, match="d.json has no image: only the projector is trained"):
        dpt.main(["--vision", parts["vision"], "--llm", parts["small"], *flags])


def test_published_preference_data_are_read():
    """RLAIF-V as MoD's authors took it: a question and two strings."""
    strings = {"image": "a.png", "question": "what is it ?", "chosen": "a dog", "rejected": "a cat"}
    talks = {"image": "a.png", "chosen": MARKED, "rejected": turns("<image>\nwhat is it ?", "a cat")}
    a, b = (check_pair("pair 0", r, "/images", exist=False) for r in (strings, talks))
    assert a[:2] == b[:2]
    as_trl = {"image": "a.png", "prompt": "<image>what is it ?", "chosen": "a dog", "rejected": "a cat"}
    assert check_pair("pair 0", as_trl, "/images", exist=False)[:2] == a[:2]
    assert check_pair("pair 0", talks | {"messages": TALK}, "/images", exist=False)[:2] == a[:2]
    with pytest.raises(InputError, match="pair 0, chosen, turn 0, needs 'from'"):
        check_pair("pair 0", {"chosen": "a", "rejected": "b"}, "/images")


@pytest.mark.parametrize("record", [
    {"conversations": TALK[:1], "chosen": TALK[1], "rejected": {"from": "gpt", "value": "a cat"}},
    {"messages": TALK, "rejected_response": "a cat"},
    {"conversations": TALK, "rejected_conversations": turns("what is it ?", "a cat")},
    {"ds_name": "x", "text": '{"question": "q", "chosen": "a", "rejected": "b"}'},
])
def test_other_forms_of_pairs_are_told_which_are_read(record):
    with pytest.raises(InputError, match="no 'chosen' answer .*; wanted is a conversation, or a text that "):
        check_pair("pair 0", record, ".")


def test_pairs_of_which_an_answer_is_cut_are_left_out(checkpoints, tmp_path):
    """Half of one would be held against all of the other, or two might be the same."""
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    long = "red circle top left and blue cross top right "
    answers = ("left", "right"), (long, "right"), ("left", long), (long + "one", long + "two")
    pairs = [{"question": "describe", "chosen": a, "rejected": b} for a, b in answers]
    (tmp_path / "d.json").write_text(json.dumps(pairs))
    read = partial(open_data, tmp_path / "d.json", tmp_path, processor, pairs=True)
    whole = read()
    assert (len(whole), whole.n_too_long) == (4, 0)
    _, second, third, last = (max(len(ids) for ids, _ in whole[k]["rows"]) for k in range(4))
    assert second == third < last
    for max_len, usable in (last, [0, 1, 2, 3]), (last - 1, [0, 1, 2]), (second - 1, [0]):
        cut = read(max_len=max_len)
        assert (cut.usable.tolist(), cut.n_too_long) == (usable, 4 - len(usable))
        assert [cut[k] for k in range(len(cut))] == [whole[k] for k in usable]


def test_captions_behind_images_that_do_not_fit_are_left_out(checkpoints, tmp_path):
    """Also where the image stands in a later turn: of captions all images come first."""
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    (tmp_path / "0.png").touch()
    late = {"image": "0.png", "conversations": TALK + MARKED}
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": TALK}, late]))
    data = open_data(tmp_path / "d.json", tmp_path, processor, max_len=3, caption_only=True)
    assert (len(data), data.n_too_long) == (1, 1)


def test_a_file_that_is_no_list_says_what_it_is(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"id": 1, "conversations": TALK}, indent=2))
    with pytest.raises(InputError, match="d.json line 1 is not valid JSON: .*; wanted are a list"):
        list(records(path))
    meta = json.dumps({"a": {"annotation": "a.jsonl"}}, indent=2).encode()
    for text in meta, b"datasets:\n- json_path: a.json", gzip.compress(json.dumps([TALK]).encode()):
        path.write_bytes(text)
        with pytest.raises(InputError, match="line 1 is not valid JSON: .*, unpacked; not a list of files"):
            list(records(path))
    for text, message in ("", "holds no sample"), ("\n", "holds no sample"), ("hello", "line 1 is not valid"):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            Index(str(path), "", 1, lambda where, record: (1,))
    assert [place for place, _ in records(path, skip_bad=True)] == [f"{path} line 1"]


def test_skip_bad_covers_every_kind_once(world, checkpoints, tmp_path, capsys):
    """A malformed record, a line that is no JSON and an unreadable image, over two epochs."""
    lines = (world / "train.jsonl").read_text().splitlines()
    lines[2], lines[7] = '{"id": 2}', lines[7][:20]
    (tmp_path / "images").symlink_to(world / "images")
    bad = json.loads(lines[4])
    (tmp_path / "cut.png").write_bytes(b"no picture")
    lines[4] = json.dumps(bad | {"image": "../cut.png"})  # refused already for where it lies
    lines[8] = json.dumps(json.loads(lines[8]) | {"image": "none.png"})
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    flags = ["--student", checkpoints["small"], *data_flags(world, data=path, out=tmp_path / "out", epochs=2)]
    with pytest.raises(InputError, match="line 3 .*; 3 of 24 samples are bad, more than --skip_bad 2 allows"):
        sft.main([*flags, "--skip_bad", "2"])
    with pytest.raises(InputError, match="none.png cannot be read .*; 4 bad so far, --skip_bad allows 3"):
        sft.main([*flags, "--skip_bad", "3"])
    capsys.readouterr()
    sft.main([*flags, "--skip_bad", "4"])
    said = capsys.readouterr()
    for what in (
        "line 3 has no",
        "line 8 is not valid JSON",
        "leaves the image folder",
        "none.png cannot be read",
    ):
        assert said.err.count(what) == 1
    assert "4 bad samples left out" in said.out


# ---------------------------------------------------------------------------------- images


def test_links_are_followed_and_paths_stay_inside(tmp_path):
    (tmp_path / "disk").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "disk/1.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/coco").symlink_to(tmp_path / "disk")
    root = str(tmp_path / "images")
    for path in "coco/1.png", f"{root}/coco/1.png", "x/../coco/1.png":
        record = {"image": path, "conversations": MARKED}
        assert check_sample("s", record, root, exist=path != "x/../coco/1.png").images == [path]
    assert load_image("s", root, f"{root}/coco/1.png").size == (4, 4)
    with pytest.raises(InputError, match="image .*images/disk/1.png cannot be read .*No such file"):
        load_image("s", root, "coco/../disk/1.png")  # which the file system would find beside the link's end
    for path in "../disk/1.png", str(tmp_path / "disk/1.png"), "coco/../../disk/1.png":
        with pytest.raises(InputError, match="leaves the image folder"):
            check_sample("s", {"image": path, "conversations": MARKED}, root)
    assert check_sample("s", {"image": str(tmp_path / "disk/1.png"), "conversations": MARKED}, "/").images


def picture(tmp_path, image: Image.Image, name: str = "x.png", **options) -> Image.Image:
    image.save(tmp_path / name, **options)
    return load_image("sample 0", str(tmp_path), name)


def test_transparent_ground_is_white(tmp_path):
    for mode, ink, none in (("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)), ("LA", (0, 255), (0, 0))):
        image = Image.new(mode, (2, 1), none)
        image.putpixel((0, 0), ink)
        seen = picture(tmp_path, image)
        assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    seen = picture(tmp_path, palette, transparency=0)
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 9)
    seen = picture(tmp_path, grey, transparency=7)
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


def test_grey_of_12_bits_and_what_is_no_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="x.png cannot be read .as if of 12 bits; scale white to 65535"):
        picture(tmp_path, Image.new("I;16", (2, 2), 4095))
    assert picture(tmp_path, Image.new("I;16", (2, 2), 0)).getpixel((0, 0)) == (0, 0, 0)
    os.mkfifo(tmp_path / "pipe.png")  # without a writer it has no end
    with pytest.raises(InputError, match="pipe.png cannot be read .it is no regular file"):
        load_image("s", str(tmp_path), "pipe.png")


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_16_bits_of_grey_are_scaled(tmp_path, name):
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 257 * 100, 65535)):
        image.putpixel((x, 0), value)
    seen = picture(tmp_path, image, name)
    assert [seen.getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in (0, 100, 255)]


def test_pixels_without_a_known_white_are_refused(tmp_path):
    for image in Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), 1_000_000):
        with pytest.raises(InputError, match=f"x.tif cannot be read .pixels of mode '{image.mode}'"):
            picture(tmp_path, image, "x.tif")


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
def test_images_stand_upright(tmp_path, name):
    image = Image.new("RGB", (40, 20))
    image.paste("white", (0, 0, 20, 20))  # its left half, which becomes the top
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = picture(tmp_path, image, name, exif=exif)
    assert seen.size == (20, 40)
    assert seen.getpixel((10, 5))[0] > 200 > 50 > seen.getpixel((10, 35))[0]


def test_a_broken_exif_block_does_not_hide_sound_pixels(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert load_image("s", str(tmp_path), "x.jpg").size == (8, 4)


def test_a_broken_picture_is_a_bad_one(tmp_path):
    """Cut pixels, and a chunk of a PNG whose checksum is wrong."""
    noise = io.BytesIO()
    Image.frombytes("RGB", (60, 60), random.Random(0).randbytes(10800)).save(noise, "png")
    chunk = struct.pack(">I", 3) + b"tEXta\0b" + bytes(4)
    for broken in noise.getvalue()[:5000], noise.getvalue()[:33] + chunk + noise.getvalue()[33:]:
        (tmp_path / "x.png").write_bytes(broken)
        with pytest.raises(InputError, match="x.png cannot be read"):
            load_image("s", str(tmp_path), "x.png")


def test_a_picture_out_of_proportion_is_a_bad_one(tmp_path):
    with pytest.raises(InputError, match="20000 x 4 pixels are out of proportion"):
        picture(tmp_path, Image.new("RGB", (20_000, 4)))


def test_bytes_are_normalised_on_the_device_as_the_processor_would(checkpoints):
    model = Llava.from_checkpoint(checkpoints["small"])
    how = model.processor.image_processor
    how.image_mean, how.image_std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    image = Image.frombytes("RGB", (20, 30), bytes(torch.randint(0, 256, (1800,)).tolist()))
    want = how(image, return_tensors="pt")["pixel_values"]
    raw = how(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert raw.dtype == torch.uint8
    assert (model.normalise(raw) - want).abs().max() < 1e-6 < 0.1 < want.abs().max()
    assert model.normalise(want) is want


# ---------------------------------------------------------------------------------- checkpoints


def written(checkpoints, template, *talk: tuple[str, str]) -> None:
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    processor.chat_template = template
    Chat(processor).encode([turn(*message) for message in talk])


def test_a_template_that_drops_a_turn_is_refused_when_it_meets_one(checkpoints):
    drops = CHAT_TEMPLATE.replace("{%- set said", "{%- if message.role != 'system' -%}{%- set said")
    drops = drops.replace("{%- endif -%}\n{%- endfor", "{%- endif -%}{%- endif -%}\n{%- endfor")
    asked = ("user", "how red is it ?"), ("assistant", "very")
    written(checkpoints, drops, *asked, *asked)
    written(checkpoints, CHAT_TEMPLATE, ("system", "red"), *asked)
    with pytest.raises(InputError, match=r"leaves out a turn of \['red', 'how red is it \?'\]; take it out"):
        written(checkpoints, drops, ("system", "red"), *asked)


def test_a_template_that_thinks_before_the_last_answer_is_refused_with_its_cause(checkpoints):
    thinks = CHAT_TEMPLATE.replace("' ' + text", "(' <think></think>' if loop.last else '') + ' ' + text")
    asked = ("user", "is it red ?"), ("assistant", "yes")
    with pytest.raises(InputError, match="it writes <think> before the last answer alone.* --template own"):
        written(checkpoints, thinks, *asked, *asked)


def test_a_prompt_that_ends_with_a_blank_and_named_templates_are_refused(checkpoints):
    blank = CHAT_TEMPLATE.replace("'ASSISTANT:'", "'ASSISTANT: '").replace("' ' + text", "text")
    with pytest.raises(InputError, match="the prompt ends with a blank: take --template own"):
        written(checkpoints, blank, ("user", "is it red ?"), ("assistant", "yes"))
    with pytest.raises(InputError, match="has no chat template, or several; save it with one"):
        written(checkpoints, {"default": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE})


def test_an_image_token_of_another_id_is_refused(checkpoints, tmp_path):
    """Else the picture never reaches the model, and nothing says so."""
    model = Llava.from_checkpoint(checkpoints["small"])
    model.config.image_token_index = 7
    model.save(tmp_path)
    with pytest.raises(InputError, match="must have <image> as token 7 of config.json, not 372"):
        Llava.from_checkpoint(str(tmp_path))


SMALL = {"vocab_size": 448, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("config", [
    PhiConfig(**SMALL | {"num_key_value_heads": 2}),
    Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5),
])
def test_a_head_that_is_more_than_a_matrix_is_refused(config, parts, tokenizer, tmp_path):
    """A bias, or a cap on the logits: log-probabilities would be others than the model's own."""
    from conftest import new_student
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data.normal_(std=0.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its logits differ by up to .* a bias, a cap or a scale"):
        new_student(parts["vision"], str(tmp_path))


def test_a_plain_head_of_another_family_is_taken(parts, tokenizer, tmp_path):
    from conftest import new_student
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(GemmaConfig(**SMALL, head_dim=8)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    new_student(parts["vision"], str(tmp_path))


def test_towers_that_cannot_be_run_layer_by_layer_are_refused(parts, tmp_path):
    from conftest import new_student
    from transformers import Dinov2Config, Dinov2Model, Siglip2VisionConfig, Siglip2VisionModel

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dino = Dinov2Model(Dinov2Config(**size, image_size=16, patch_size=8))
    naflex = Siglip2VisionModel(Siglip2VisionConfig(**size, num_patches=4, patch_size=8))
    for kind, tower in ("dinov2", dino), ("siglip2_vision_model", naflex):
        tower.save_pretrained(tmp_path / kind)
        with pytest.raises(InputError, match=f"a '{kind}' vision tower; SigLIP's .* and CLIP's work"):
            new_student(str(tmp_path / kind), parts["small"])
