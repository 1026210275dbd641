"""Paths of objects behave as those of files do (platform.md 8)."""

import dataclasses
import sys

import aiohttp
import fsspec
import fsspec.config
import pytest

from internvlx_jax.core import remote
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.paths import RemotePath, as_path
from internvlx_jax.core.remote import (
    TRAFFIC,
    StorageError,
    check_access,
    read_version,
    remove_version,
    write_version,
)
from internvlx_jax.data import storage


def test_an_object_is_used_like_a_file(folder, tmp_path):
    for root in (as_path(folder), as_path(str(tmp_path))):
        path = root / "a" / "x.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists() and not path.is_file()
        with path.open("w", encoding="utf-8") as file:
            file.write("één\n")
        assert path.read_text(encoding="utf-8") == "één\n" and path.stat().st_size == 6
        (root / "b.json").write_bytes(b"{}")
        assert [each.name for each in sorted(root.iterdir())] == ["a", "b.json"]
        assert [each.name for each in root.glob("*.json")] == ["b.json"]
        assert [each.name for each in root.rglob("*.json*")] in (
            ["x.jsonl", "b.json"],
            ["b.json", "x.jsonl"],
        )
        assert path.is_file() and path.parent.is_dir() and not path.is_dir()
        assert path.with_suffix(".md").name == "x.md" and path.resolve() == path
        with path.open("rb") as file:
            file.seek(2 + 1 - 3)
            assert file.read(2) == "é".encode()
        path.unlink()
        path.unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError):
            path.read_bytes()
    assert str(as_path(folder) / "a") == f"{folder}/a"
    assert isinstance(as_path(folder).parent, RemotePath)


@pytest.mark.parametrize("kind", ["folder", "s3_folder"])
def test_what_is_asked_is_counted(request, kind):
    path = as_path(request.getfixturevalue(kind)) / "x"
    before = dataclasses.replace(TRAFFIC)
    path.write_bytes(b"1" * 10_000)
    assert TRAFFIC.requests > before.requests and TRAFFIC.sent - before.sent >= 10_000
    received = TRAFFIC.received
    assert len(path.read_bytes()) == 10_000
    assert 10_000 <= TRAFFIC.received - received < 20_000


@pytest.mark.parametrize("kind", ["folder", "s3_folder"])
def test_conditional_writes(request, kind):
    path = f"{request.getfixturevalue(kind)}/lock.json"
    assert read_version(path) is None
    first = write_version(path, b"1", None)
    assert first and write_version(path, b"2", None) is None
    assert read_version(path) == (b"1", first)
    second = write_version(path, b"2", first)
    assert second and write_version(path, b"3", first) is None
    remove_version(path, first)
    assert read_version(path) == (b"2", second)
    remove_version(path, second)
    assert read_version(path) is None


def test_faults_are_tried_again_and_counted(folder, gcs):
    gcs.faults(unavailable=0.15, cut=0.1)  # seldom six times in a row, which is given up
    failed = TRAFFIC.failed
    for number in range(20):
        (as_path(folder) / str(number)).write_bytes(b"x" * 1000)
        assert (as_path(folder) / str(number)).read_bytes() == b"x" * 1000
    counted = gcs.faults()
    assert counted["unavailable"] + counted["cut"] > 0 and TRAFFIC.failed > failed


def test_no_view_of_a_written_file_outlives_its_buffer(folder, gcs):
    """An error that is tried again keeps one, and Python 3.12 crashes when it collects both."""
    path = as_path(f"{folder}/written")
    start, rest = b"01234567" * 8, bytes(range(256)) * (25 << 10)  # more than is sent at once
    with path.open("wb") as file:
        file.write(start)
        view = file.buffer.getbuffer()
        file.write(rest)  # a buffer with views cannot grow
    assert bytes(view) == start
    assert path.read_bytes() == start + rest


@pytest.mark.parametrize(
    "url, words",
    [
        ("gs://forbidden/run", "permission denied"),
        ("gs://absent/run", "there is no bucket gs://absent"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(gcs, url, words):
    with pytest.raises(StorageError) as error:
        check_access(url)
    assert words in str(error.value) and url in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bucket, words", [("forbidden", "permission denied"), ("expired", "401")])
def test_what_may_not_be_read_is_not_called_missing(gcs, monkeypatch, bucket, words):
    monkeypatch.setattr(remote, "PROBE_SECONDS", 1)
    url = f"gs://{bucket}/file"
    for ask in (storage.is_file, storage.is_folder, lambda each: as_path(each).exists()):
        with pytest.raises(StorageError, match=words):
            ask(url)
    assert not storage.is_file("gs://bucket/file") and not as_path("gs://absent/file").exists()


def test_unknown_protocols_and_missing_extras_are_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="gss://bucket/run: gss:// cannot be used here"):
        as_path("gss://bucket/run")
    for url, module, extra in (("gs://b/r", "gcsfs", "gcs"), ("s3://b/r", "s3fs", "s3")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=rf"needs {module}, .*internvlx-jax\[{extra}\]"):
            as_path(url)


def test_silence_is_tried_again(folder, gcs, monkeypatch):
    """A connection on which nothing comes is given up, and the request sent again."""
    as_path(f"{folder}/x").write_text("here")
    patience = aiohttp.ClientTimeout(total=None, sock_read=0.3)
    for name in ("gs", "gcs"):
        monkeypatch.setitem(fsspec.config.conf[name], "requests_timeout", patience)
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    gcs.faults(stall=0.25, seconds=1)  # seldom six times in a row, which is given up
    failed, left = TRAFFIC.failed, 40
    while TRAFFIC.failed == failed and (left := left - 1):
        assert as_path(f"{folder}/x").read_text() == "here"
    assert TRAFFIC.failed > failed
