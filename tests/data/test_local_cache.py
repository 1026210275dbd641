"""Copies of remote files on the local disk: by generation, below a limit, shared by processes, and
without a trace in the batches (design: platform.md 10, data.md 17).
"""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import threading
import time

import fsspec
import numpy as np
import pytest
from PIL import Image

from internvlx_jax.core import byte_ranges
from internvlx_jax.core.data_config import CacheConfig, DataConfig, FaultConfig
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.local_cache import HEAD, LocalCache
from internvlx_jax.data.image_fetcher import Ahead, Fetched, ImageFetcher, open_cache
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.sources import open_source

ENTRY = 1000 + HEAD.size  # bytes of a copy of each file of `files`


@pytest.fixture
def files(tmp_path):
    """Twelve files of 1,000 bytes -> their URLs."""
    for n in range(12):
        (tmp_path / f"{n}.bin").write_bytes(bytes([n]) * 1000)
    return [f"file://{tmp_path}/{n}.bin" for n in range(12)]


@pytest.fixture
def asked(monkeypatch):
    """The requests to the store: (what, path)."""
    found = []
    client = fsspec.get_filesystem_class("file")
    for name in ("cat_file", "info"):
        method = getattr(client, name)

        def counted(self, path, *args, _name=name, _method=method, **kw):
            found.append((_name, os.path.basename(path)))
            return _method(self, path, *args, **kw)

        monkeypatch.setattr(client, name, counted)
    return found


def kept(cache: LocalCache) -> list[os.DirEntry]:
    return [
        path for pattern in ("images/*/*", "files/*/*/*") for path in cache.folder.glob(pattern)
    ]


def used(cache: LocalCache) -> int:
    """Bytes in the folder, which other processes may be changing."""
    total = 0
    for path in kept(cache):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_a_copy_is_asked_for_once_a_run_and_follows_its_generation(files, tmp_path, asked):
    first = LocalCache(tmp_path / "cache", 10**6, time.time())
    assert first.fetch(files[3]) == (bytes([3]) * 1000, False)
    assert asked == [("info", "3.bin"), ("cat_file", "3.bin")]
    assert first.fetch(files[3]) == (bytes([3]) * 1000, True) and len(asked) == 2
    later = dataclasses.replace(first, since=time.time() + 1)
    assert later.fetch(files[3])[1] and asked[2:] == [("info", "3.bin")]
    del asked[:]
    (tmp_path / "3.bin").write_bytes(b"new")
    assert first.fetch(files[3]) == (bytes([3]) * 1000, True), "a run reads what it has compared"
    assert later.fetch(files[3]) == (b"new", False)
    assert dataclasses.replace(first, since=0).fetch(files[3]) == (b"new", True)
    assert int((first.folder / "usage").read_text()) == used(first) == 3 + HEAD.size
    (copy,) = kept(first)
    copy.write_bytes(copy.read_bytes()[:-1])  # damaged
    assert first.fetch(files[3]) == (b"new", False)
    with pytest.raises(FileNotFoundError):
        first.fetch(files[3] + "no")


def test_without_a_limit_for_images_none_are_kept(files, tmp_path, asked):
    cache = LocalCache(tmp_path / "cache", 0, time.time())
    assert cache.fetch(files[1]) == cache.fetch(files[1]) == (bytes([1]) * 1000, False)
    assert asked == [("cat_file", "1.bin")] * 2 and not cache.folder.exists()


def test_the_oldest_copies_give_way(files, tmp_path):
    cache = LocalCache(tmp_path / "cache", 4 * ENTRY, time.time())
    for n in range(4):
        cache.fetch(files[n])
        os.utime(cache._entry(files[n]), (n, n))
    assert used(cache) == 4 * ENTRY
    cache.fetch(files[4])
    # A tenth of the limit is freed beyond what is needed.
    assert [cache._entry(files[n]).exists() for n in range(5)] == [False, False, True, True, True]
    assert int((cache.folder / "usage").read_text()) == used(cache) == 3 * ENTRY
    big = tmp_path / "big.bin"
    big.write_bytes(b"x" * 5 * ENTRY)
    assert cache.fetch(f"file://{big}") == (b"x" * 5 * ENTRY, False)
    assert used(cache) <= 4 * ENTRY, "what is larger than the limit is not kept"


def test_what_a_killed_process_left_is_removed(files, tmp_path, monkeypatch):
    cache = LocalCache(tmp_path / "cache", 4 * ENTRY, time.time())
    cache.fetch(files[0])
    left = cache._entry(files[1]).with_name(f"left.1-1.{3 * ENTRY}.partial")
    left.parent.mkdir(exist_ok=True)
    left.touch()
    (cache.folder / "usage").write_text("no number")
    cache.fetch(files[2])  # the bytes that were promised to the other file count
    assert not cache._entry(files[0]).exists() and left.exists()
    os.utime(left, (1, 1))
    (cache.folder / "usage").write_text(str(4 * ENTRY))
    cache.fetch(files[3])
    assert not left.exists() and cache._entry(files[2]).exists()
    assert int((cache.folder / "usage").read_text()) == used(cache) == 2 * ENTRY


def test_a_folder_that_cannot_be_written_is_said_once(files, tmp_path, caplog):
    (tmp_path / "cache").write_bytes(b"a file")
    cache = LocalCache(tmp_path / "cache", 10**6, time.time())
    for n in (1, 2):
        assert cache.fetch(files[n]) == (bytes([n]) * 1000, False)
    assert caplog.text.count("images are not kept") == 1


def test_large_files_are_fetched_by_ranges_and_pinned(files, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(byte_ranges, "PART", 300)
    cache = LocalCache(tmp_path / "cache", 3 * ENTRY, time.time())
    annotation = tmp_path / "chat.jsonl"
    lines = [json.dumps({"n": n}) for n in range(100)]
    annotation.write_text("\n".join(lines))
    entry = DatasetEntry("d", annotation=f"file://{annotation}")
    source = open_source(entry, cache)
    assert len(source) == 100 and source.record(7) == b'{"n": 7}\n'
    assert asked.count(("cat_file", "chat.jsonl")) == -(-annotation.stat().st_size // 300)
    before = len(asked)
    again = open_source(entry, cache)
    assert asked[before:] == [("info", "chat.jsonl")]
    annotation.write_text("\n".join(lines[:3]))
    newer = open_source(entry, cache)
    assert len(newer) == 3 and again.record(7) == b'{"n": 7}\n'
    assert len(list(cache.folder.glob("files/*/*/*"))) == 2, "the older one is being read"
    for n in range(6):
        cache.fetch(files[n])
    assert used(cache) <= cache.max_bytes and source.record(99) == b'{"n": 99}'
    del source, again
    open_source(entry, cache)
    assert len(list(cache.folder.glob("files/*/*/*"))) == 1
    assert int((cache.folder / "usage").read_text()) == used(cache)
    annotation.write_bytes(b"{}\n" * 2000)
    with pytest.raises(ConfigError, match=r"6,000 bytes, more than data.cache.max_gb .*raise it"):
        open_source(entry, cache)


def fetch_all(folder, limit, urls, seed, worst) -> None:
    cache = LocalCache(folder, limit, time.time())
    for n in np.random.default_rng(seed).integers(0, len(urls), 60):
        content, _ = cache.fetch(urls[n])
        assert content == bytes([n]) * 1000
        # Under the lock of the cache: what others write or remove meanwhile would be counted twice.
        with cache._locked(), worst.get_lock():
            worst.value = max(worst.value, used(cache))


def test_processes_share_one_folder_and_one_limit(files, tmp_path):
    context = multiprocessing.get_context("fork")
    limit, worst = 5 * ENTRY, context.Value("q", 0)
    processes = [
        context.Process(target=fetch_all, args=(tmp_path / "cache", limit, files, seed, worst))
        for seed in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert 3 * ENTRY <= worst.value <= limit
    cache = LocalCache(tmp_path / "cache", limit, time.time())
    assert int((cache.folder / "usage").read_text()) == used(cache) <= limit


# --- in a loader ----------------------------------------------------------------------------------


@pytest.fixture
def pages(tmp_path):
    """Sixteen samples with one or two images, one of which does not exist -> folder."""
    folder = tmp_path / "pages"
    folder.mkdir()
    lines = []
    for n in range(16):
        for kind in "ab":
            file, draw = io.BytesIO(), np.random.default_rng(n)
            Image.fromarray(draw.integers(0, 256, (30, 40, 3), np.uint8)).save(file, "PNG")
            (folder / f"{n}{kind}.png").write_bytes(file.getvalue())
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"It is {n}."}]
        one = {"image": f"{n}a.png", "width": 40, "height": 30, "conversations": turns}
        asked = [{"from": "human", "value": "<image><image>?"}, turns[1]]
        two = {"image": [f"{n}a.png", f"{n}b.png"], "width_list": [40, 40], "height_list": [30, 30]}
        lines.append(json.dumps(two | {"conversations": asked} if n % 5 == 0 else one))
    (folder / "chat.jsonl").write_text("\n".join(lines))
    (folder / "7a.png").unlink()
    return folder


def batches(folder, root, processor, **kw):
    meta = folder.parent / "meta.json"
    meta.write_text(json.dumps({"d": {"annotation": f"{root}/chat.jsonl", "root": root}}))
    faults = FaultConfig(max_share=0.5)
    config = DataConfig(meta="", max_length=256, tokens_per_step=512, faults=faults, **kw)
    loader = Loader(str(meta), config, processor, row_quantum=1, seed=0)
    steps = list(loader.steps(0, 12))
    arrays = [
        [x for x in step.batch.inputs if x is not None] + [step.batch.labels] for step in steps
    ]
    reasons = [(fault.line, fault.reason) for step in steps for fault in step.faults]
    return loader, arrays, [step.sample_ids for step in steps], reasons


def assert_same(found, expected) -> None:
    assert found[2] == expected[2] and found[3] == expected[3] and found[3]
    for here, there in zip(found[1], expected[1], strict=True):
        for one, other in zip(here, there, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_do_not_depend_on_where_images_come_from(pages, processor, tmp_path, workers):
    local = batches(pages, str(pages), processor)
    assert local[0].fetched == Fetched()
    remote = batches(pages, f"file://{pages}", processor, num_workers=workers)
    assert_same(remote, local)
    assert remote[0].fetched.hits == 0 < remote[0].fetched.misses
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_gb=1e-3)
    for number in range(2):
        kept_too = batches(pages, f"file://{pages}", processor, num_workers=workers, cache=cache)
        assert_same(kept_too, local)
        hits, misses, nbytes = kept_too[0].fetched
        sizes = [path.stat().st_size for path in pages.glob("*.png")]
        # In threads, two steps may ask for one image at the same time.
        assert (misses == nbytes == 0) if number else (misses >= len(sizes) / 2 and nbytes > 0)
        assert hits > 0 and hits + misses == sum(remote[0].fetched[:2])


def test_the_images_of_a_step_are_asked_for_together(pages, processor, monkeypatch):
    """Two requests wait for each other, which only ends if they are under way at the same time."""
    meeting = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(LocalCache, "fetch", lambda self, url: (bytes(meeting.wait() * 0), False))
    fetcher = ImageFetcher(open_cache(CacheConfig()), 2)
    ahead = fetcher.ask(["gs://b/1.png", "gs://b/2.png", "gs://b/1.png", "local.png", b"\x89PNG"])
    assert list(ahead) == ["gs://b/1.png", "gs://b/2.png"]
    assert [content.result() for content in ahead.values()] == [b"", b""]
    images = fetcher.opened(("gs://b/2.png", "local.png", b"\x89PNG"), Ahead(ahead, {}))
    assert images[0].open().read() == b"" and str(images[0]) == "gs://b/2.png"
    assert images[1:] == ("local.png", b"\x89PNG")
    assert fetcher.take_counts() == Fetched(0, 2, 0) and fetcher.take_counts() == Fetched()


def test_a_folder_of_copies_is_local():
    with pytest.raises(ConfigError, match="data.cache.folder must be a folder of this host"):
        CacheConfig(folder="gs://bucket/cache")
