"""Data as users bring it: fields of other tools, odd text, odd images, files that change.

Each test stands for a kind of public bug report (design: data.md 1, 2, 7, 10, 15).
"""

import base64
import dataclasses
import io
import json
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from internvlx_jax.cli import data as command
from internvlx_jax.core.data_config import DataConfig, FaultConfig, ImageConfig
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.files import read_json_lines
from internvlx_jax.core.json_text import encode_line, shorten
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data import images as images_module
from internvlx_jax.data.conversations import parse_sample
from internvlx_jax.data.faults import read_quarantine
from internvlx_jax.data.images import image_size, load_image
from internvlx_jax.data.meta import read_meta
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tokenizer import Tokenizer

CONFIG = DataConfig(meta="", max_length=256, tokens_per_step=512, faults=FaultConfig(max_share=1.0))


@pytest.fixture(scope="module")
def processor():
    tiles = TileConfig(tile_size=28, max_num=4)
    tokenizer = Tokenizer.load(TOKENIZER_FOLDER)
    return Processor(tokenizer, get_template("internlm2-chat"), "", tiles, 4)


@pytest.fixture
def load(processor):
    def load(meta, config=CONFIG, **settings):
        reader = dataclasses.replace(processor, images=config.images)
        return Loader(str(meta), config, reader, row_quantum=1, seed=0, **{"epochs": 1} | settings)

    return load


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    def check(meta, *words):
        """Returns (exit status, standard output, standard error, check.json)."""
        flags = ["--tokenizer", str(TOKENIZER_FOLDER), "--tile_size", "28", "--tokens_per_tile"]
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["data"])
        status = command.main(["check", str(meta), *flags, "4", "--out", str(out), *words])
        printed = capsys.readouterr()
        report = out / "check.json"
        return (
            status,
            printed.out,
            printed.err.splitlines()[-1:],
            json.loads(report.read_text()) if report.is_file() else None,
        )

    return check


def ask(text="What is it?", answer="A sign."):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def dataset(folder, *lines, name="d", file=None, **fields):
    """Writes a JSONL file and a meta file with one dataset; returns the meta file."""
    folder.mkdir(exist_ok=True)
    annotation = folder / (file or f"{name}.jsonl")
    if lines:
        texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        annotation.write_bytes(b"\n".join(texts) + b"\n")
    meta = folder / "meta.json"
    entry = {"root": str(folder), "annotation": str(annotation)} | fields
    meta.write_text(json.dumps({name: entry}))
    return meta


def sign(path, size=(40, 30), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def parsed(record, root="r"):
    return parse_sample(record, dataset="d", line=1, where="d line 1", root=root)


# --- fields of other tools ------------------------------------------------------------------------

SWIFT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>And <image>?"},
        {"role": "assistant", "content": "Two."},
    ],
    "images": ["a.png", "b.png"],
}
FACTORY = {
    "conversations": ask("<image>Which?", "This."),
    "images": ["a.png"],
    "system": "Be brief.",
    "tools": "",
}
PARTS = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "image_url", "image_url": {"url": "b.png"}},
                {"type": "text", "text": "Compare."},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Alike."}]},
    ]
}


def test_records_of_other_tools_mean_what_they_say():
    swift, factory, parts = parsed(SWIFT), parsed(FACTORY), parsed(PARTS)
    assert swift.images == ("r/a.png", "r/b.png") and swift.system == "Be brief."
    assert swift.turns == (("human", "<image>And <image>?"), ("gpt", "Two."))
    assert factory.images == ("r/a.png",) and factory.system == "Be brief."
    assert parts.images == ("r/a.png", "r/b.png")
    assert parts.turns[0] == ("human", "<image>\n<image>\nCompare.")
    stored = {"image": {"path": "a.png", "bytes": None}, "conversations": ask()}
    assert parsed(stored).images == ("r/a.png",)


@pytest.mark.parametrize(
    "record, reason, words",
    [
        ({"conversations": ask("<image>\nWhat?")}, "placeholder_mismatch", '0 images but 1 "<im'),
        (FACTORY | {"images": []}, "placeholder_mismatch", "0 images but 1"),
        (FACTORY | {"images": ["a", "b"]}, "placeholder_mismatch", "2 images but 1"),
        (FACTORY | {"image": "c.png"}, "json", '"image" and "images" are both set'),
        (FACTORY | {"tools": "[1]"}, "json", '"tools" is set, but tool calls'),
        (FACTORY | {"audios": ["a.wav"]}, "json", '"audios" is set'),
        (FACTORY | {"objects": {"bbox": [1]}}, "json", '"objects" is set, but boxes stand in'),
        (FACTORY | {"messages": SWIFT["messages"]}, "json", '"messages" and "conversations" are'),
        ({"query": "What?", "response": "A."}, "json", "but query, response, which is the form"),
        ({"instruction": "a", "output": "b"}, "json", "but instruction, output"),
        (SWIFT | {"videos": ["a", "b"]}, "json", '"videos" holds several'),
        (PARTS | {"images": ["c"]}, "json", "both in the turns and in"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "json",
            "parts are of type text or image",
        ),
        (
            {"conversations": [ask()[0], {"role": "assistant", "content": "x", "loss": False}]},
            "json",
            '"loss": false',
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role_order", "from tool"),
    ],
)
def test_what_would_lose_its_meaning_is_refused_by_name(record, reason, words):
    with pytest.raises(SampleError) as error:
        parsed(record)
    assert error.value.reason == reason and words in str(error.value)


def test_one_json_array_is_read_as_llava_writes_it(tmp_path, load):
    records = [{"image": "a.png", "conversations": ask()}, {"id": "b"}, {"conversations": ask("é")}]
    sign(tmp_path / "a.png")
    for name, text in (
        ("spread.json", json.dumps(records, indent=1, ensure_ascii=False)),
        ("one_line.jsonl", "\ufeff" + json.dumps(records)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        loader = load(dataset(tmp_path, file=name))
        assert len(loader.table.length) == 2
        (bad,) = loader.index_faults.bad["d"]
        assert bad.line == 2 and f"{name} record 2: " in str(bad.error)
    (tmp_path / "cut.json").write_text(json.dumps(records)[:-9])
    with pytest.raises(ConfigError, match=r"cut.json begins as a JSON array, .* element 3"):
        load(dataset(tmp_path, file="cut.json"))


def test_check_lists_fields_that_nothing_reads(tmp_path, check):
    sign(tmp_path / "a.png")
    line = {"image": "a.png", "conversations": ask(), "caption": "x", "score": 3}
    meta = dataset(tmp_path, line, line | {"split": "a"}, {"conversations": ask()})
    status, out, _, report = check(meta)
    assert status == 0 and "unknown fields    caption:2  score:2  split:1, which are" in out
    assert report["datasets"]["d"]["unknown_fields"] == {"caption": 2, "score": 2, "split": 1}


# --- bad samples have a place and a name ----------------------------------------------------------


def test_check_names_bad_lines(tmp_path, check):
    good = {"conversations": ask()}
    meta = dataset(tmp_path, good, b"{oops", *[{"id": n} for n in range(14)], good)
    status, out, _, report = check(meta)
    listed = report["datasets"]["d"]["bad_samples"]
    assert status == 0 and [each["line"] for each in listed] == list(range(2, 17))
    assert "d.jsonl line 2: not valid JSON" in out and "line 11: " in out
    assert "line 12: " not in out and "and 5 more, see check.json" in out


@pytest.mark.parametrize("encoding, words", [
    ("gbk", "save the file as UTF-8"),
    ("utf-16", "UTF-16 text; save the file as UTF-8"),
])  # fmt: skip
def test_a_file_in_another_encoding_says_so(encoding, words, tmp_path, load):
    lines = [json.dumps({"conversations": ask("红色")}, ensure_ascii=False)] * 5
    meta = dataset(tmp_path)
    (tmp_path / "d.jsonl").write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(ConfigError) as error:
        load(meta)
    message = str(error.value)
    assert words in message and "d.jsonl" in message and "\n" not in message
    if encoding == "gbk":
        places = [f"d.jsonl line {n}: " in message for n in range(1, 6)]
        assert places == [True] * 3 + [False] * 2, "the first three are shown"


def test_too_many_bad_samples_name_examples_before_there_is_a_run_folder(tmp_path, load):
    config = dataclasses.replace(CONFIG, faults=FaultConfig(max_share=0.0))
    meta = dataset(tmp_path, {"conversations": ask()}, {"id": 1})
    with pytest.raises(ConfigError, match=r"1 of 2 samples are bad.*for example .*line 2: "):
        load(meta, config)


# --- names that collide ---------------------------------------------------------------------------


def test_a_quarantine_is_about_annotations_not_labels(tmp_path, load):
    """Data of one name: what is wrong with validation says nothing about training."""
    metas, quarantine = {}, tmp_path / "quarantine-0.jsonl"
    for split in ("train", "val"):
        folder = tmp_path / split
        folder.mkdir()
        for n in range(4):
            sign(folder / f"{n}.png", seed=n)
        lines = [{"image": f"{n}.png", "width": 40, "height": 30, "conversations": ask()}
                 for n in range(4)]  # fmt: skip
        metas[split] = dataset(folder, *lines)
    for n in (0, 1):
        (tmp_path / "val" / f"{n}.png").write_bytes(b"not a picture")
    skip = dataclasses.replace(CONFIG, faults=FaultConfig(max_share=1.0, on_bad="skip"))
    for split in ("val", "train"):
        loader = load(metas[split], skip)
        loader.list_bad_samples(quarantine)
        list(loader.steps(0, loader.plan.total))
    rows = read_json_lines(quarantine, "dataset", "line", "annotation", "root")
    assert {(row["annotation"], row["line"]) for row in rows} == {
        (str(tmp_path / "val" / "d.jsonl"), 1),
        (str(tmp_path / "val" / "d.jsonl"), 2),
    }
    without = dataclasses.replace(CONFIG, faults=FaultConfig(exclude=(str(quarantine),)))
    with pytest.warns(UserWarning, match="2 of 2 listed samples are of annotations"):
        assert len(load(metas["train"], without).table.length) == 4
    assert len(load(metas["val"], without).table.length) == 2
    earlier = tmp_path / "earlier.jsonl"  # version 0.1 knew names only
    earlier.write_text('{"dataset": "d", "line": 4}\n')
    by_name = dataclasses.replace(CONFIG, faults=FaultConfig(exclude=(str(earlier),)))
    assert len(load(metas["train"], by_name).table.length) == 3


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"d": {"annotation": "a.jsonl"}, "d": {"annotation": "b.jsonl"}}', '"d" stands twice'),
        ('{"d": {"annotation": "a.jsonl", "annotation": "b"}}', '"annotation" stands twice'),
        ("{}", "names no datasets"),
        ("[]", "must map dataset names to objects"),
        ('{"d\\ud83d": {"annotation": "a.jsonl"}}', "not valid Unicode"),
        ('{"d": {"annotation": "a.jsonl", "repeat_time": NaN}}', '"repeat_time" must be'),
        ('{"d": {"annotation": "a.jsonl", "weight": Infinity}}', '"weight" must be a number'),
        ('{"d": {"annotation": "a.jsonl", "max_dynamic_patch": true}}', "must be a whole number"),
        ('{"d": {"annotation": "a.jsonl", "length": "9"}}', '"length" must be a whole number'),
        ('{"d": {"annotation": "a\\u0000.jsonl"}}', '"annotation" does not exist'),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_meta_files_that_do_not_say_what_they_mean(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises((ConfigError, FileNotFoundError)) as error:
        read_meta("meta.json")
    assert words in str(error.value) and "meta.json" in str(error.value)


# --- text that is not what it looks ---------------------------------------------------------------

ODD = ["a\u2028b", "a\u0085b", "a\u000bb", "a\u001cb", "nul \u0000", "\ufeffbom", "\U0001f600"]


def test_separators_inside_a_text_do_not_end_a_line(tmp_path, load):
    lines = [json.dumps({"conversations": ask(text)}, ensure_ascii=False).encode() for text in ODD]
    loader = load(dataset(tmp_path, b"\xef\xbb\xbf" + lines[0], *lines[1:]))
    assert len(loader.table.length) == len(ODD) and not loader.index_faults.reasons
    # The same in what a run writes and reads again.
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(encode_line({"step": 1, "text": text}) for text in ODD) + b'{"cut')
    assert [row["text"] for row in read_json_lines(path, "step")] == ODD
    path.write_bytes(b"".join(encode_line({"dataset": text, "line": 1}) for text in ODD))
    assert {each.dataset for each in read_quarantine([path])} == set(ODD)


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a\ud83d.png", "conversations": ask()},
        {"image": ["a.png", "\udc80"], "conversations": ask("<image><image>")},
        {"video": "v\ud83d", "conversations": ask()},
        {"id": "\ud83d", "conversations": ask()},
        {"conversations": ask(answer="\ud83d")},
        {"messages": [{"role": "user", "content": "\ud83d"}]},
    ],
)
def test_half_a_surrogate_pair_is_one_bad_sample(record, tmp_path, load):
    loader = load(dataset(tmp_path, {"conversations": ask()}, record))
    loader.list_bad_samples(tmp_path / "quarantine.jsonl")
    (row,) = read_json_lines(tmp_path / "quarantine.jsonl", "line", "error")
    assert row["line"] == 2 and "not valid Unicode" in row["error"]


def test_paths_with_nul_are_one_bad_sample_each(tmp_path, load):
    odd = [
        {"image": "a\0.png", "conversations": ask()},
        {"video": "v\0", "conversations": ask()},
    ]
    loader = load(dataset(tmp_path, {"conversations": ask()}, *odd))
    assert loader.index_faults.reasons == {("d", "unreadable"): 2}


def test_what_is_written_can_always_be_read():
    value = {"a": "x\ud83dy", "b": ["\u2028", "\0"]}
    assert json.loads(encode_line(value)) == value and encode_line(value).count(b"\n") == 1
    assert shorten("\ud83d" + "x" * 500) == "\\ud83d" + "x" * 79 + "... (501 characters)"


# --- caches and the files that they are about -----------------------------------------------------


def test_an_index_follows_its_images(tmp_path, load, check):
    lines = [{"image": f"{n}.png", "conversations": ask()} for n in range(6)]
    for n in range(4):
        sign(tmp_path / f"{n}.png", (28, 28), n)
    meta = dataset(tmp_path, *lines)
    assert "samples           4 of 6 records" in check(meta)[1]
    for n in (4, 5):
        sign(tmp_path / f"{n}.png", (28, 28), n)
    assert "samples           6 of 6 records" in check(meta)[1], "missing files are tried again"
    before = load(meta)
    assert before.table.tiles.tolist() == [1] * 6
    sign(tmp_path / "0.png", (110, 28))  # replaced by a larger picture
    status, out, _, _ = check(meta, "--decode")
    assert "samples           6 of 6" in out and "bad samples       none" in out
    again = load(meta)
    assert again.table.tiles[0] == 5 and not again.index_faults.reasons
    resumed = load(meta, state=again.state(0))
    assert resumed.plan_hash == again.plan_hash
    (tmp_path / "1.png").unlink()
    gone = load(meta)
    assert gone.index_faults.reasons == {("d", "unreadable"): 1}
    assert load(meta, state=gone.state(0)).index_faults.reasons == gone.index_faults.reasons


def test_a_resumed_run_keeps_the_index_that_it_began_with(tmp_path, load):
    for n in range(3):
        sign(tmp_path / f"{n}.png", (28, 28), n)
    meta = dataset(tmp_path, *({"image": f"{n}.png", "conversations": ask()} for n in range(3)))
    begun = load(meta)
    sign(tmp_path / "0.png", (110, 28))
    skip = dataclasses.replace(CONFIG, faults=FaultConfig(max_share=1.0, on_bad="skip"))
    resumed = load(meta, skip, state=begun.state(0))
    assert resumed.plan_hash == begun.plan_hash
    list(resumed.steps(0, resumed.plan.total))
    (fault,) = resumed.faults.bad["d"]
    assert fault.reason == "size_mismatch" and "d.jsonl.index-*.npz" in str(fault.error)


def test_a_damaged_index_is_made_again(tmp_path, load):
    sign(tmp_path / "0.png")
    meta = dataset(tmp_path, {"image": "0.png", "conversations": ask()})
    load(meta)
    (index,) = tmp_path.glob("*.index-*.npz")
    (headers,) = tmp_path.glob("*.headers-*/*.json")
    for content in (b"", b"PK\x03\x04cut", index.read_bytes()[:-40]):
        index.write_bytes(content)
        headers.write_bytes(content[:10])
        with pytest.warns(UserWarning, match="is damaged .* made again"):
            assert len(load(meta).table.length) == 1


# --- images ---------------------------------------------------------------------------------------


def png(*, exif=None, text=None, cut=1.0, behind=False):
    """Returns a PNG of random pixels, 40 x 30, with EXIF and text before or behind the pixels."""
    file = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    data = file.getvalue()
    chunks = b""
    for kind, content in ((b"eXIf", exif), (b"tEXt", text)):
        if content is not None:
            chunks += struct.pack(">I", len(content)) + kind + content
            chunks += struct.pack(">I", zlib.crc32(kind + content))
    place = data.index(b"IEND") - 4 if behind else 33
    data = data[:place] + chunks + data[place:]
    return data[: int(len(data) * cut)]


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes().removeprefix(b"Exif\0\0")


@pytest.mark.parametrize("behind", [False, True])
def test_exif_of_png_is_found_without_decoding(behind, monkeypatch):
    data = png(exif=turned(), behind=behind)
    expected = load_image(data, apply_exif=True)
    assert expected.size == (30, 40)
    plain = np.asarray(load_image(data))
    np.testing.assert_array_equal(np.asarray(expected), np.rot90(plain, -1))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(data, apply_exif=True) == (30, 40) and image_size(data) == (40, 30)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_a_cut_png_is_used_under_both_settings(exif, tmp_path, load):
    (tmp_path / "cut.png").write_bytes(png(exif=turned(), cut=0.66))
    meta = dataset(tmp_path, {"image": "cut.png", "conversations": ask()})
    config = dataclasses.replace(CONFIG, images=ImageConfig(exif=exif))
    loader = load(meta, config)
    list(loader.steps(0, loader.plan.total))
    assert loader.faults.reasons == {("d", "truncated"): 1} and not loader.index_faults.reasons


@pytest.mark.parametrize("behind", [False, True])
def test_text_beside_the_pixels_is_no_damage(behind):
    bomb = b"Comment\0" + b"x" * 70_000_000  # beyond Pillow's MAX_TEXT_MEMORY
    image = load_image(png(text=bomb, behind=behind), use_truncated=False)
    assert image.info["counted"] == () and np.asarray(image).any()
    assert image_size(png(text=bomb, behind=behind), apply_exif=True) == (40, 30)


def test_damaged_exif_says_nothing_about_the_pixels():
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert load_image(file.getvalue(), apply_exif=True).size == (40, 30)
    assert image_size(png(exif=b"garbage"), apply_exif=True) == (40, 30)


def test_images_inside_the_field_are_read(tmp_path, load):
    data = png()
    text = base64.b64encode(data).decode()
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(data)).save(jpeg, "JPEG")
    broken = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    fields = [
        f"data:image/png;base64,{text}",
        text,
        broken,
        text.rstrip("="),
        base64.b64encode(jpeg.getvalue()).decode(),
        {"bytes": text},
        {"url": f"DATA:image/png;base64,{text}"},
    ]
    lines = [{"image": field, "conversations": ask()} for field in fields]
    loader = load(dataset(tmp_path, *lines))
    assert len(loader.table.length) == len(fields) and not loader.index_faults.reasons
    (step, *_) = loader.steps(0, loader.plan.total)
    assert step.batch.inputs.tiles.any() and not loader.faults.reasons


@pytest.mark.parametrize(
    "field",
    [
        "data:image/png;base64," + "A" * 5000,
        "data:image/png;base64,@@@" + "A" * 5000,
        "data:," + "x" * 5000,
        "iVBORw0KGgo" + "!" * 5000,
        "x" * 5000,
        "/9j/" + "A" * 5000,
        ["y" * 5000, 7],
    ],
)
def test_messages_never_repeat_the_payload(field, tmp_path, load):
    bad = {"image": field, "conversations": ask()}
    loader = load(dataset(tmp_path, {"conversations": ask()}, bad))
    loader.list_bad_samples(tmp_path / "q.jsonl")
    (row,) = read_json_lines(tmp_path / "q.jsonl", "error")
    assert "d.jsonl line 2: " in row["error"] and len(row["error"]) < 1600
    assert row["error"].count("A" * 100) + row["error"].count("!" * 100) == 0


def test_messages_are_the_same_in_every_run(tmp_path):
    (tmp_path / "no.png").write_bytes(b"no picture at all")
    messages = set()
    for source in (b"no picture at all", str(tmp_path / "no.png"), str(tmp_path / "gone.png")):
        for _ in range(2):
            with pytest.raises(SampleError) as error:
                load_image(source)
            messages.add(str(error.value))
    assert len(messages) == 3 and not any("0x" in message for message in messages)
    weird = OSError("broken <_io.BytesIO object at 0x7f12ab> at 0x99ff")
    assert "0x" not in str(images_module.unreadable(b"", weird))


def test_a_folder_that_is_missing_names_the_path_it_tried(tmp_path, load):
    meta = dataset(tmp_path, {"image": "a.png", "conversations": ask()}, root="elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ConfigError) as error:
        load(meta)
    assert os.path.join("elsewhere", "a.png") in str(error.value)
    assert "No such file or directory" in str(error.value)


def test_a_picture_in_a_field_that_is_not_read_is_a_bad_sample():
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A page."}]
    record = {"image_path": "a.png", "conversations": talk}
    arguments = {"dataset": "d", "line": 1, "where": "d line 1", "root": ""}
    with pytest.raises(SampleError, match='"image_path" is set, but pictures are read from'):
        parse_sample(record, **arguments)
    shown = [{"from": "human", "value": "<image>\nWhat?"}, talk[1]]
    sample = parse_sample(record | {"image": "b.png", "conversations": shown}, **arguments)
    assert len(sample.images) == 1


@pytest.mark.parametrize("name", ["", " ", "a\nerror: b", "a\u2028b", "\0"])
def test_names_of_datasets_can_be_printed(name, tmp_path):
    (tmp_path / "d.jsonl").write_text("{}\n")
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({name: {"annotation": str(tmp_path / "d.jsonl")}}))
    with pytest.raises(ConfigError, match=r"meta.json: a dataset is called '.*Rename it") as error:
        read_meta(path)
    assert "\n" not in str(error.value)


def test_a_path_as_long_as_a_picture_is_not_repeated(tmp_path):
    with pytest.raises(SampleError) as error:
        load_image("x" * 100_000 + ".png")
    assert len(str(error.value)) < 700
