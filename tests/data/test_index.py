"""The size index: right without decoding, cached by content, made again when something changes
(design: data.md 10).
"""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from internvlx_jax.core.data_config import CacheConfig, DataConfig, ImageConfig
from internvlx_jax.data import index as index_module
from internvlx_jax.data import processor as processor_module
from internvlx_jax.data.buckets import Capacity
from internvlx_jax.data.fit import encode
from internvlx_jax.data.image_fetcher import open_cache
from internvlx_jax.data.index import SizeIndex, load_index
from internvlx_jax.data.meta import read_meta
from internvlx_jax.data.sources import open_source, read_sample
from internvlx_jax.data.templates import get_template

CAPACITY = Capacity(512)
CONFIG = DataConfig(meta="")
CACHE = open_cache(CacheConfig())


def chat(question: str, answer: str = "It is.") -> dict:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    }


@pytest.fixture
def data(tmp_path):
    """Six lines: two with sizes, one without, a text, and two bad ones -> (meta, annotation)."""
    for name, size in (("wide", (84, 28)), ("tall", (28, 56))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    lines = [
        {"image": "wide.png", "width": 84, "height": 28, **chat("What?")},
        {"image": "tall.png", **chat("What?")},
        {"image": "gone.png", **chat("What?")},
        chat("Hello.", "Hello to you."),
        {"conversations": []},
        {
            "image": ["wide.png", "tall.png"],
            "width_list": [84, 28],
            "height_list": [28, 56],
            **chat("<image><image>?"),
        },
    ]
    annotation = tmp_path / "chat.jsonl"
    annotation.write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"d": {"root": str(tmp_path), "annotation": str(annotation)}}))
    return meta, annotation


@pytest.fixture
def headers(monkeypatch):
    """The image files whose headers are read."""
    read = []
    size = processor_module.image_size
    monkeypatch.setattr(
        processor_module,
        "image_size",
        lambda path, **kw: read.append(path.rpartition("/")[2]) or size(path, **kw),
    )
    return read


def made(meta, processor, config=CONFIG, capacity=CAPACITY) -> SizeIndex:
    (entry,) = read_meta(meta)
    return load_index(
        open_source(entry, CACHE), entry, processor.for_dataset(entry), config, capacity
    )


def test_shapes_are_those_of_the_encoded_samples(data, processor):
    found = made(data[0], processor)
    assert found.tiles.tolist() == [4, 3, 0, 0, 0, 6] and found.images.tolist() == [
        1,
        1,
        0,
        0,
        0,
        2,
    ]
    assert found.off_tiles.tolist() == [4, 3, 0, 0, 0, 6]
    assert [(position, error.reason) for position, error in found.bad] == [
        (2, "unreadable"),
        (4, "role_order"),
    ]
    assert found.reasons == {"unreadable": 1, "role_order": 1} and (found.status > 0).tolist() == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    (entry,) = read_meta(data[0])
    for position, tiles in ((0, [4]), (1, [3]), (3, []), (5, [3, 3])):
        sample = read_sample(open_source(entry, CACHE), entry, position)
        encoded = encode(processor, sample, tiles)
        assert found.length[position] == len(encoded.tokens)
        assert found.supervised[position] == (encoded.labels >= 0).sum() > 0


def test_only_missing_sizes_are_read_and_only_once(data, processor, headers):
    first = made(data[0], processor)
    assert sorted(headers) == ["gone.png", "tall.png"]
    again = made(data[0], processor)
    assert len(headers) == 2, "the second time comes from the cache"
    for name in ("status", "tiles", "length", "supervised", "frames"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    assert [(p, str(e)) for p, e in again.bad] == [(p, str(e)) for p, e in first.bad]
    longer = made(data[0], processor, capacity=Capacity(1024))
    np.testing.assert_array_equal(longer.length, first.length)
    assert headers[2:] == ["gone.png"], (
        "sizes outlive a change of the settings; what was missing may be there by now"
    )


def test_sizes_of_the_annotation_may_be_distrusted(data, processor, headers):
    _, annotation = data
    annotation.write_text(annotation.read_text().replace('"width": 84', '"width": 9999'))
    assert made(data[0], processor).tiles[0] != 4
    careful = dataclasses.replace(processor, images=ImageConfig(trust_sizes=False))
    assert made(data[0], careful).tiles.tolist() == [4, 3, 0, 0, 0, 6]
    assert {"wide.png", "tall.png"} <= set(headers)


def test_the_index_follows_its_sources(data, processor):
    meta, annotation = data
    before = made(meta, processor)
    annotation.write_text(annotation.read_text() + json.dumps(chat("New.")) + "\n")
    after = made(meta, processor)
    assert len(after) == len(before) + 1
    narrow = dataclasses.replace(processor, tiles=dataclasses.replace(processor.tiles, max_num=1))
    assert made(meta, narrow).tiles.max() == 2
    other = dataclasses.replace(processor, template=get_template("internvl2_5"))
    assert (made(meta, other).length[[0, 1, 3]] != after.length[[0, 1, 3]]).all()
    assert len(list(annotation.parent.glob("chat.jsonl.index-*.npz"))) == 4


def test_an_interrupted_scan_goes_on(data, processor, headers, monkeypatch):
    monkeypatch.setattr(index_module, "CHUNK", 2)
    calls = iter([1, 1])
    monkeypatch.setattr(index_module, "supervised_tokens", lambda labels: next(calls))
    with pytest.raises(StopIteration):
        made(data[0], processor)
    assert "tall.png" in headers
    monkeypatch.undo()
    read = []
    size = processor_module.image_size
    monkeypatch.setattr(index_module, "CHUNK", 2)
    monkeypatch.setattr(
        processor_module, "image_size", lambda path, **kw: read.append(path) or size(path, **kw)
    )
    assert made(data[0], processor).tiles[1] == 3
    assert not [path for path in read if path.endswith("tall.png")], "its size was remembered"


def test_only_the_lines_that_repeat_time_leaves_are_indexed(data, processor):
    meta, annotation = data
    meta.write_text(
        json.dumps(
            {
                "d": {
                    "root": str(annotation.parent),
                    "annotation": str(annotation),
                    "repeat_time": 0.5,
                }
            }
        )
    )
    assert len(made(meta, processor)) == 3


def test_another_folder_and_a_folder_that_cannot_be_written(data, processor, tmp_path, monkeypatch):
    elsewhere = tmp_path / "indexes"
    made(data[0], processor, dataclasses.replace(CONFIG, index_dir=str(elsewhere)))
    assert list(elsewhere.glob("chat.jsonl.index-*.npz")) and not list(
        tmp_path.glob("chat.jsonl.index-*.npz")
    )
    monkeypatch.setattr(index_module.os, "access", lambda *_: False)
    with pytest.warns(UserWarning, match="cannot be written to, .* set data.index_dir"):
        found = made(data[0], processor)
    assert len(found) == 6 and not list(tmp_path.glob("chat.jsonl.index-*.npz"))


def test_pixel_limits_are_known_before_decoding(data, processor):
    strict = dataclasses.replace(processor, images=ImageConfig(max_pixels=2000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made(data[0], strict).reasons["too_many_pixels"] == 2
