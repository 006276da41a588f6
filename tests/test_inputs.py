"""What real data and checkpoints hold: read as meant, or refused with a sentence that says what to do.

python -m pytest tests/test_inputs.py
"""

import io
import json
import random
import struct

import pytest
import torch
from conftest import data_flags, open_data, turns
from PIL import Image
from transformers import AutoProcessor, Gemma2Config, GemmaConfig, PhiConfig

import dpt
import sft
from data import IGNORE
from model import Llava
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


@pytest.mark.parametrize("none", [{}, {"image": ""}, {"image": None}, {"images": []}])
def test_text_that_mentions_the_marker_is_text(none, checkpoints):
    talk = turns("what does <image> mean ?", "<image> marks a picture")
    messages, images = read(none | {"conversations": talk})
    assert images == []
    ids, targets = Llava.from_checkpoint(checkpoints["small"]).chat.encode(messages)
    assert 372 not in ids
    assert sum(target != IGNORE for target in targets) > 5


def test_images_without_a_marker_are_counted(world, checkpoints, tmp_path, capsys):
    talks = [TALK, MARKED] * 4
    samples = [{"image": f"{k}.png", "conversations": talk} for k, talk in enumerate(talks)]
    (tmp_path / "d.json").write_text(json.dumps(samples))
    flags = data_flags(world, data=tmp_path / "d.json", out=tmp_path / "out", max_steps=1)
    sft.main(["--student", checkpoints["small"], *flags])
    assert "  4 samples have images but no <image>" in capsys.readouterr().out


def test_two_lists_of_images_must_be_one():
    with pytest.raises(InputError, match=r"'image' \['a.png'\] and 'images' \['b.png'\]; give one of them"):
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
    with pytest.raises(InputError, match="pair 0, chosen, turn 0, needs 'from'"):
        check_pair("pair 0", {"chosen": "a", "rejected": "b"}, "/images")


def test_pairs_that_are_the_same_within_max_len_are_left_out(checkpoints, tmp_path):
    processor = AutoProcessor.from_pretrained(checkpoints["small"])
    long = "red circle top left and blue cross top right "
    pairs = [{"question": "describe", "chosen": long + a, "rejected": long + b}
             for a, b in (("one", "two"), ("left", "right"))]
    pairs[1] |= {"chosen": "left " + long, "rejected": "right " + long}
    (tmp_path / "d.json").write_text(json.dumps(pairs))
    whole = open_data(tmp_path / "d.json", tmp_path, processor, pairs=True)
    assert (len(whole), whole.n_too_long) == (2, 0)
    cut = open_data(tmp_path / "d.json", tmp_path, processor, pairs=True, max_len=14)
    assert (len(cut), cut.n_too_long) == (1, 1)
    assert cut.sample(int(cut.usable[0]))[1][0][1]["content"][0]["text"].startswith("left")
    late = {"question": "describe", "chosen": long * 20 + "one", "rejected": long * 20 + "two"}
    (tmp_path / "late.json").write_text(json.dumps([late, pairs[1]]))  # its prompt alone is short for certain
    assert open_data(tmp_path / "late.json", tmp_path, processor, pairs=True, max_len=100).n_too_long == 1


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
