"""Millions of samples: compact records of where they lie, an index by parts, plans as before
(design: data.md 10).
"""

import dataclasses
import json
import os
import pickle
import tracemalloc

import numpy as np
import pytest

from internvlx_jax.core.data_config import CacheConfig, DataConfig, FaultConfig
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import BOM
from internvlx_jax.data import index as index_module
from internvlx_jax.data import index_parts, record_places
from internvlx_jax.data.buckets import assign_buckets, smallest_bucket
from internvlx_jax.data.image_fetcher import open_cache
from internvlx_jax.data.index import SizeIndex, load_index
from internvlx_jax.data.index_parts import IndexParts
from internvlx_jax.data.meta import read_meta
from internvlx_jax.data.opening_sources import make_share_of_indexes
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.record_places import PLACE, scan_array, scan_lines
from internvlx_jax.data.size_index import COLUMNS
from internvlx_jax.data.sources import open_source

CONFIG = DataConfig(
    meta="",
    max_length=256,
    tokens_per_step=512,
    index_workers=1,
    faults=FaultConfig(max_share=0.5),
)


@pytest.fixture
def meta(tmp_path):
    """Forty samples, every tenth bad -> path of the meta file."""
    lines = []
    for n in range(40):
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "one " * (n % 9)}]
        image = {"image": "none.png", "width": 30 + 5 * n, "height": 60} if n % 3 else {}
        lines.append(json.dumps(image | {"conversations": [] if n % 10 == 7 else turns}))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"d": {"annotation": "chat.jsonl", "root": str(tmp_path)}}))
    return path


@pytest.fixture
def small_parts(monkeypatch):
    """Makes a part of eight records, and an index of more than one by parts."""
    monkeypatch.setattr(index_parts, "PART", 8)
    monkeypatch.setattr(index_parts, "LARGE", 9)
    monkeypatch.setattr(index_module, "CHUNK", 4)


def made(meta, processor, config=CONFIG, **kw) -> SizeIndex:
    (entry,) = read_meta(meta)
    source = open_source(entry, open_cache(CacheConfig()))
    capacity = index_module.Capacity(config.max_length)
    return load_index(source, entry, processor.for_dataset(entry), config, capacity, **kw)


def assert_same(found: SizeIndex, expected: SizeIndex) -> None:
    for name, dtype in COLUMNS.items():
        assert getattr(found, name).dtype == dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert [(n, str(e)) for n, e in found.bad] == [(n, str(e)) for n, e in expected.bad]


# --- where records lie ----------------------------------------------------------------------------

TEXTS = [
    b"",
    b"\n",
    b"a",
    b"a\n",
    b"\n\n a\n\t\r\n\x0b\nb",
    BOM + b"a\n" + BOM + b"\nb\r\n" + BOM + b" \n\xef\n",
    b"first\n" + b"x" * 50 + b"\n\n" + b"y" * 9,
    " \u00a0\n\u2028\nlast\n".encode(),
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("block", [1, 3, 7, 2**24])
def test_places_are_those_of_a_plain_loop(text, block, tmp_path, monkeypatch):
    monkeypatch.setattr(record_places, "BLOCK", block)
    path = tmp_path / "chat.jsonl"
    path.write_bytes(text)
    expected, offset = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.removeprefix(BOM).strip():
                expected.append((offset, len(line), number))
            offset += len(line)
    assert scan_lines(str(path)).places.tolist() == expected


def test_a_scan_takes_sixteen_bytes_per_record(tmp_path, monkeypatch):
    monkeypatch.setattr(record_places, "BLOCK", 2**14)
    path, records = tmp_path / "chat.jsonl", 100_000
    path.write_bytes(b'{"n": 123}\n' * records)
    tracemalloc.start()
    found = scan_lines(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.places.nbytes == 16 * records
    # Twice the result, while its parts are joined, and some blocks.
    assert peak < 2 * 16 * records + 50 * 2**14


def test_a_large_scan_is_kept_and_mapped(tmp_path, monkeypatch, meta):
    monkeypatch.setattr(record_places, "KEPT_FROM", 1)
    annotation = tmp_path / "chat.jsonl"
    scans = []
    scan = record_places._lines
    monkeypatch.setattr(record_places, "_lines", lambda *a: scans.append(a) or scan(*a))

    def opened():
        return open_source(read_meta(meta)[0], open_cache(CacheConfig()))

    fresh = opened()
    opened()
    assert len(scans) == 2, "a file that was written just now may change without a trace"
    os.utime(annotation, (1, 1))
    monkeypatch.setattr(record_places, "SETTLED_SECONDS", -1)
    first, second = opened(), opened()
    assert len(scans) == 3
    assert second.content_key == first.content_key == fresh.content_key
    sent = pickle.dumps(second)
    assert len(sent) < 1000, "a worker maps the places"
    worker = pickle.loads(sent)
    for position in (0, 5, 39):
        assert worker.record(position) == fresh.record(position)
    assert worker.lines.tolist() == fresh.lines.tolist()
    annotation.write_text(annotation.read_text().replace("one two", "two one"))
    assert opened().content_key == fresh.content_key and len(scans) == 4
    (kept,) = {str(path) for path in [second._kept]}
    with open(kept, "wb") as file:  # a damaged one is made again
        file.write(b"no array")
    os.utime(annotation, (1, 1))
    assert opened().lines.tolist() == fresh.lines.tolist()


def test_an_array_has_the_same_places(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text('[{"a": 1},\n {"b": [2]}]')
    found = scan_array(str(path))
    assert found.places.dtype == PLACE and found.places.tolist() == [(1, 8, 1), (12, 10, 2)]


# --- an index by parts ----------------------------------------------------------------------------


def test_an_index_by_parts_is_the_index(meta, processor, small_parts, monkeypatch, tmp_path):
    monkeypatch.setattr(index_parts, "LARGE", 1000)
    whole = made(meta, processor)
    (path,) = tmp_path.glob("*.index-*.npz")
    path.unlink()
    monkeypatch.setattr(index_parts, "LARGE", 9)
    parts = made(meta, processor)
    assert_same(parts, whole)
    assert [error.where for _, error in parts.bad] == [error.where for _, error in whole.bad]
    assert not list(tmp_path.glob("*.parts")), "parts are removed once the index is complete"
    assert_same(made(meta, processor), whole)
    monkeypatch.setattr(index_module.os, "access", lambda *_: False)
    path.unlink()
    with pytest.warns(UserWarning, match="cannot be written to"):
        assert_same(made(meta, processor), whole)


def test_processes_share_the_parts(meta, processor, small_parts, monkeypatch, tmp_path):
    built = []
    build = index_module._Builder.build

    def counted(self, positions, progress=False):
        built.append(positions)
        return build(self, positions, progress)

    monkeypatch.setattr(index_module._Builder, "build", counted)
    for process in (2, 0):
        make_share_of_indexes(str(meta), CONFIG, processor, process=process, processes=3)
    assert [positions.start // 8 for positions in built] == [2, 0, 3]
    (folder,) = tmp_path.glob("*.parts")
    (folder / "000003.npz").write_bytes(b"damaged")
    found = made(meta, processor)
    # The process that is missing made none: who joins the parts makes those.
    assert sorted(positions.start // 8 for positions in built[3:]) == [1, 3, 4]
    (tmp_path / "other").mkdir()
    alone = made(meta, processor, dataclasses.replace(CONFIG, index_dir=str(tmp_path / "other")))
    assert_same(found, alone)
    built.clear()
    make_share_of_indexes(str(meta), CONFIG, processor, process=1, processes=3)
    assert not built, "the index exists"


@pytest.mark.slow
def test_worker_processes_make_the_parts(meta, processor, small_parts, tmp_path):
    """The workers see the usual sizes of parts and chunks, which are larger than the data."""
    expected = made(meta, processor)
    (entry,) = read_meta(meta)
    source = open_source(entry, open_cache(CacheConfig()))
    capacity = index_module.Capacity(CONFIG.max_length)
    builder = index_module._Builder(source, entry, processor, CONFIG, capacity, None)
    for folder in (None, tmp_path / "parts"):
        parts = IndexParts(builder, 40, folder)
        parts.make(workers=2)
        assert_same(parts.join(), expected)
    broken = IndexParts(_Ended(), 40, None)
    with pytest.raises(ConfigError, match="index of d has ended.*data.index_workers below 2"):
        broken.make(workers=2)


class _Ended:
    """A builder whose process is killed."""

    name = "index of d"

    def build(self, positions, progress=False):
        os._exit(9)


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [0, 2**22])
def test_buckets_do_not_depend_on_how_they_are_counted(counted, monkeypatch):
    monkeypatch.setattr("internvlx_jax.data.buckets._COUNTED", counted)
    draw = np.random.default_rng(0)
    tiles, lengths = draw.integers(0, 14, 500), draw.integers(1, 2000, 500)
    buckets, code = assign_buckets(tiles, lengths, 500, 64)
    for each, n, length in zip(code, tiles.tolist(), lengths.tolist(), strict=True):
        assert buckets[each] == smallest_bucket(n, length, 64)


def test_what_a_loader_holds_per_sample(meta, processor):
    """Bytes per sample of the columns that grow with the data; docs/data.md states their sum."""
    loader = Loader(str(meta), CONFIG, processor, row_quantum=1, seed=0)
    samples = len(loader.table.length)
    table = sum(column.nbytes for column in loader.table) / samples
    index = sum(getattr(loader.indexes[0], name).nbytes for name in COLUMNS) / 40
    assert (table, index, loader.code.nbytes / samples) == (28, 34, 4)
