"""Records from JSONL, ArrayRecord, TFDS and remote files.

Videos as frames (design: data.md 2, 3, 16).
"""

import dataclasses
import io
import json
import pickle
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from PIL import Image

from internvlx_jax.core.data_config import CacheConfig, DataConfig, FaultConfig, VideoConfig
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.paths import as_path
from internvlx_jax.data.image_fetcher import open_cache
from internvlx_jax.data.meta import DatasetEntry, read_meta
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.sources import (
    ArrayRecords,
    JsonLines,
    open_source,
    read_sample,
    write_array_record,
)
from internvlx_jax.data.video import choose_frames, frame_separator, list_frames, with_frames

CONFIG = DataConfig(meta="", max_length=256, tokens_per_step=512, faults=FaultConfig(on_bad="fail"))
CACHE = open_cache(CacheConfig())


def picture(number: int, size=(40, 30), kind="PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def chat(question: str, answer: str) -> dict:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    }


RECORDS = [
    {"image": picture(0), "width": 40, "height": 30, **chat("<image>What?", "One.")},
    chat("Hello.", "Two."),
    {"image": [picture(1), picture(2)], **chat("<image> or <image>?", "Three.")},
    {"video": [picture(number) for number in range(9)], **chat("What happens?", "Four.")},
]


def load_all(meta, processor, **settings):
    """sample id -> (tokens, labels, tiles) of one epoch."""
    loader = Loader(
        str(meta),
        dataclasses.replace(CONFIG, **settings),
        processor,
        row_quantum=1,
        seed=0,
        epochs=1,
    )
    found = {}
    for step in loader.steps(0, loader.plan.total):
        rows = [
            row for row in range(len(step.batch.labels)) if step.batch.inputs.segment_ids[row].any()
        ]
        for name, row in zip(step.sample_ids, rows, strict=True):
            inputs = step.batch.inputs
            n = int(inputs.segment_ids[row].sum())
            tiles = (
                int((inputs.tokens[row] == processor.tokenizer.image_token_id).sum())
                // processor.tokens_per_tile
            )
            found[name] = (
                inputs.tokens[row, :n],
                step.batch.labels[row, :n],
                inputs.tiles[row, :tiles],
            )
    return found


@pytest.fixture(scope="module")
def as_files(processor, tmp_path_factory):
    """RECORDS as a JSONL file with images beside it -> (folder, its samples as loaded)."""
    folder = tmp_path_factory.mktemp("files")
    lines = []
    for number, record in enumerate(RECORDS):
        line = dict(record)
        for key in ("image", "video"):
            images = line.get(key, [])
            names = [
                f"{number}-{key}_{i}.png"
                for i in range(1 if isinstance(images, bytes) else len(images))
            ]
            for name, content in zip(names, [images] if isinstance(images, bytes) else images):
                (folder / name).write_bytes(content)
            if names:
                line[key] = names[0] if isinstance(images, bytes) else names
        lines.append(json.dumps(line))
    (folder / "chat.jsonl").write_text("\n".join(lines))
    (folder / "meta.json").write_text(
        json.dumps({"d": {"root": str(folder), "annotation": "chat.jsonl"}})
    )
    return folder, load_all(folder / "meta.json", processor)


def assert_same(found, expected):
    assert found.keys() == expected.keys() and len(found) == len(RECORDS)
    for name in expected:
        for ours, theirs in zip(found[name], expected[name], strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


# --- ArrayRecord ----------------------------------------------------------------------------------


def test_array_record_files_give_the_samples_of_the_jsonl_file(as_files, processor, tmp_path):
    assert write_array_record(tmp_path / "part-0.array_record", RECORDS[:3]) == 3
    assert write_array_record(tmp_path / "part-1.array_record", RECORDS[3:]) == 1
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"array_record": "part-*.array_record"}}))
    assert_same(load_all(tmp_path / "meta.json", processor), as_files[1])
    assert_same(load_all(tmp_path / "meta.json", processor, num_workers=1), as_files[1])


def test_array_record_files_behind_gs_are_read_by_range(as_files, processor, tmp_path, folder, gcs):
    """The library asks for the rest of a file from the record on, and hangs up when it has it."""
    for name, records in (
        ("part-0.array_record", RECORDS[:3]),
        ("part-1.array_record", RECORDS[3:]),
    ):
        write_array_record(tmp_path / name, records)
        as_path(f"{folder}/{name}").upload(tmp_path / name)
    (tmp_path / "meta.json").write_text(
        json.dumps({"d": {"array_record": f"{folder}/part-*.array_record"}})
    )
    index_dir = str(tmp_path / "index")
    assert_same(load_all(tmp_path / "meta.json", processor, index_dir=index_dir), as_files[1])
    remote, local = ArrayRecords(f"{folder}/part-*"), ArrayRecords(str(tmp_path / "part-*"))
    assert remote.content_key == local.content_key and remote.is_remote and not local.is_remote
    assert remote.record(3) == RECORDS[3]
    gcs.faults()
    remote.record(0)
    assert gcs.faults()["GET"] <= 2  # the reader of its file may have to be opened
    (tmp_path / "meta.json").write_text(json.dumps({"d": {"array_record": "s3://b/part-*"}}))
    with pytest.raises(ConfigError, match='"array_record" must be local files or gs://'):
        read_meta(tmp_path / "meta.json")


def test_array_record_sources_are_pickled_without_open_files_and_know_their_content(tmp_path):
    for name in ("a", "b", "c"):
        write_array_record(tmp_path / name, RECORDS[: 2 if name == "c" else 4])
    a, c = ArrayRecords(str(tmp_path / "a")), ArrayRecords(str(tmp_path / "c"))
    assert len(a) == 4 and a.record(1) == RECORDS[1]
    copy = pickle.loads(pickle.dumps(a))
    assert copy.record(3) == RECORDS[3] and list(copy.lines) == [1, 2, 3, 4]
    assert a.content_key != c.content_key
    same = tmp_path / "elsewhere"
    same.mkdir()
    (same / "a").write_bytes((tmp_path / "a").read_bytes())
    assert ArrayRecords(str(same / "a")).content_key == a.content_key


def test_a_record_that_is_no_sample_is_named(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "a"), "group_size:1")
    writer.write(b"\xc1 not msgpack")
    writer.close()
    with pytest.raises(SampleError, match=f"{tmp_path / 'a'} record 1: not a msgpack map"):
        read_sample(ArrayRecords(str(tmp_path / "a")), DatasetEntry("d", array_record="a"), 0)


# --- TFDS -----------------------------------------------------------------------------------------

BUILDER = """
import io, sys
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(), "question": tfds.features.Text(),
             "answer": tfds.features.Text()}))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        from PIL import Image
        for number in range(4):
            file = io.BytesIO()
            Image.new("RGB", (40 + number, 30), (number, 0, 0)).save(file, "PNG")
            file.seek(0)
            yield number, {"image": file, "question": f"Which {number}?", "answer": str(number)}

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""
CONVERT = """
def to_sample(example):
    turns = [("human", example["question"].decode()), ("gpt", example["answer"].decode())]
    conversations = [{"from": role, "value": text} for role, text in turns]
    return {"image": example["image"], "conversations": conversations}
"""


def test_a_prepared_tfds_data_set_is_read_without_tensorflow(processor, tmp_path, monkeypatch):
    (tmp_path / "prepare.py").write_text(BUILDER)
    (tmp_path / "tiny_samples.py").write_text(CONVERT)
    subprocess.run(
        [sys.executable, tmp_path / "prepare.py", tmp_path / "data"],
        check=True,
        capture_output=True,
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    meta = tmp_path / "meta.json"
    fields = {
        "tfds": "tiny:1.0.0",
        "split": "train[:3]",
        "data_dir": "data",
        "builder": "tiny_samples:to_sample",
    }
    meta.write_text(json.dumps({"d": fields}))
    found = load_all(meta, processor)
    assert sorted(found) == ["d:1", "d:2", "d:3"]
    for tokens, _, tiles in found.values():
        text = processor.tokenizer.decode(tokens)
        number = int(text[text.index("Which ") + 6])
        assert len(tiles) > 0 and (tiles == [number, 0, 0]).all()
    (entry,) = read_meta(meta)
    source = open_source(entry, CACHE)
    assert pickle.loads(pickle.dumps(source)).record(0)["image"].startswith(b"\x89PNG")
    assert "tensorflow" not in sys.modules
    for change, message in [
        ({"builder": "tiny_samples:gone"}, "cannot be imported"),
        ({"tfds": "huge:1.0.0"}, "TFDS has no huge:1.0.0 in .*data"),
    ]:
        meta.write_text(json.dumps({"d": fields | change}))
        with pytest.raises(ConfigError, match=message):
            open_source(read_meta(meta)[0], CACHE)


# --- remote files ---------------------------------------------------------------------------------


def test_annotations_and_images_behind_a_url(as_files, processor, tmp_path):
    """memory:// goes through the same layer as gs://."""
    folder, expected = as_files
    remote = fsspec.filesystem("memory")
    for path in folder.iterdir():
        if path.suffix in (".png", ".jsonl"):
            remote.pipe(f"/bucket/{path.name}", path.read_bytes())
    (tmp_path / "meta.json").write_text(
        json.dumps({"d": {"root": "memory://bucket", "annotation": "memory://bucket/chat.jsonl"}})
    )
    assert_same(
        load_all(tmp_path / "meta.json", processor, index_dir=str(tmp_path / "index")), expected
    )
    remote.pipe(
        "/bucket/meta.json", json.dumps({"d": {"annotation": "chat.jsonl", "root": "/"}}).encode()
    )
    (entry,) = read_meta("memory://bucket/meta.json")
    assert entry.annotation == "memory://bucket/chat.jsonl"
    # A changed file is fetched again.
    remote.pipe("/bucket/chat.jsonl", b"\n".join(remote.cat("/bucket/chat.jsonl").splitlines()[:2]))
    assert len(open_source(entry, CACHE)) == 2


def test_a_missing_package_and_an_unknown_protocol_are_named(tmp_path, monkeypatch):
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"d": {"annotation": "gs://bucket/a.jsonl"}}))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ConfigError, match=r"gs://bucket/a.jsonl needs gcsfs, .*internvlx-jax\[gcs\]"
    ):
        read_meta(meta)
    meta.write_text(json.dumps({"d": {"annotation": "nonsense://a.jsonl"}}))
    with pytest.raises(ConfigError, match="unknown protocol nonsense://"):
        read_meta(meta)


# --- video ----------------------------------------------------------------------------------------


def video(processor, **record):
    lines = json.dumps(record | chat("What happens?", "It moves.")).encode()
    return read_sample_of(lines)


def read_sample_of(line: bytes):
    from internvlx_jax.data.conversations import parse_sample

    return parse_sample(line, dataset="d", line=1, where="a.jsonl line 1", root="")


def test_frames_of_a_folder_are_ordered_by_their_numbers(processor, tmp_path):
    for number in (10, 9, 1):
        (tmp_path / f"shot_{number}.png").write_bytes(picture(number))
    (tmp_path / "notes.txt").write_text("")
    sample = video(processor, video=str(tmp_path))
    assert [frame.rpartition("_")[2] for frame in list_frames(sample)] == [
        "1.png",
        "9.png",
        "10.png",
    ]
    for folder in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(SampleError, match="a.jsonl line 1: .* is no folder of frames"):
            list_frames(video(processor, video=str(folder)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SampleError, match="holds no frames"):
        list_frames(video(processor, video=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    "template, expected",
    [
        ("model_card", "Frame1: <image>\nFrame2: <image>\nWhat happens?"),
        ("x_release", "Frame1: <image>\nFrame2: <image>What happens?"),
        ("internvl2_5", "Frame-1: <image>\nFrame-2: <image>\nWhat happens?"),
    ],
)
def test_frame_texts(template, expected, processor):
    sample = with_frames(video(processor, video=["a.png", "b.png"]), ["a.png", "b.png"], template)
    assert sample.turns[0] == ("human", expected) and sample.images == ("a.png", "b.png")
    before, _, _ = expected.partition("What")
    assert frame_separator(template, 2) == before.split("<image>")[1]


def test_the_placeholder_keeps_its_place(processor):
    line = json.dumps({"video": ["a.png"], **chat("See <video>\nWell?", "Yes.")}).encode()
    sample = with_frames(read_sample_of(line), ["a.png"], "model_card")
    assert sample.turns[0][1] == "See Frame1: <image>\nWell?"


def test_one_frame_of_each_interval():
    assert choose_frames(9, 3, None) == [1, 4, 7] and choose_frames(3, 3, None) == [0, 1, 2]
    drawn = np.array([choose_frames(10, 4, np.random.default_rng(seed)) for seed in range(200)])
    bounds = [0, 2, 5, 7, 10]
    for column, low, high in zip(drawn.T, bounds, bounds[1:]):
        assert set(column) == set(range(low, high)), "every frame of the interval, the last one too"


def test_frames_are_drawn_for_the_plan_and_fit_their_bucket(processor, tmp_path):
    records = [
        {"video": [picture(i) for i in range(frames)], **chat("What happens?", "It moves.")}
        for frames in (1, 3, 20, 20, 20, 20, 20, 20, 20, 20, 20, 20)
    ]
    write_array_record(tmp_path / "clips", records)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"clips": {"array_record": "clips"}}))
    # One row a step, so that every sample comes in each of the first passes.
    config = dataclasses.replace(
        CONFIG, video=VideoConfig(min_frames=2, max_frames=6), tokens_per_step=128
    )
    loader = Loader(str(meta), config, processor, row_quantum=1, seed=0)
    assert loader.table.tiles[:2].tolist() == [1, 2] or loader.table.tiles[:2].tolist() == [1, 3]
    assert (
        set(loader.table.tiles[2:].tolist()) <= set(range(2, 7))
        and len(set(loader.table.tiles[2:].tolist())) > 2
    )
    # Lengths were computed from one frame; the exact ones are those of the rows.
    first, second = ({}, {})
    for seen, steps in (
        (first, range(loader.plan.first_step(1))),
        (second, range(loader.plan.first_step(1), loader.plan.first_step(2))),
    ):
        for step in loader.steps(steps.start, steps.stop):
            for row, name in enumerate(step.sample_ids):
                inputs = step.batch.inputs
                n, sample = int(inputs.segment_ids[row].sum()), int(name.split(":")[1]) - 1
                assert n == loader.table.length[sample]
                seen[name] = inputs.tiles[row, : loader.table.tiles[sample]].copy()
    assert any(
        not np.array_equal(first[name], second[name]) for name in first.keys() & second.keys()
    ), "the next pass draws other frames"
    short = Loader(
        str(meta), dataclasses.replace(config, max_length=64), processor, row_quantum=1, seed=0
    )
    assert short.table.length.max() <= 64 and short.table.tiles.max() < 6, (
        "as many frames as there is room for"
    )


# --- augmentation ---------------------------------------------------------------------------------


def test_augmented_tiles_are_jpeg_copies_that_depend_on_seed_and_pass(as_files, processor):
    folder, plain = as_files
    meta = folder / "augmented.json"
    meta.write_text(
        json.dumps({"d": {"root": str(folder), "annotation": "chat.jsonl", "data_augment": True}})
    )
    first, again = load_all(meta, processor), load_all(meta, processor)
    assert_same(first, again)
    ours, theirs = first["d:1"][2].astype(int), plain["d:1"][2].astype(int)
    assert 0 < np.abs(ours - theirs).mean() < 40
    np.testing.assert_array_equal(first["d:1"][0], plain["d:1"][0])


def test_json_lines_far_apart_are_read_by_offset(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(chat("Q" * n, "A")) + "\n" for n in range(500)))
    source = JsonLines("a.jsonl", str(path))
    sample = read_sample(
        pickle.loads(pickle.dumps(source)), DatasetEntry("d", annotation="a.jsonl"), 321
    )
    assert sample.turns[0] == ("human", "Q" * 321) and sample.where == "a.jsonl line 322"
