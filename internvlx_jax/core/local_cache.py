"""Copies of remote files on the local disk, keyed by generation, below a size limit.

(design: platform.md 10)

All processes of a host may use one folder. A file appears by a rename; the bytes in use are counted
under a lock, and counted before they are written, so that the limit holds at every moment. What was
looked at longest ago is removed first. fsspec's own caches have no limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvlx_jax.core.byte_ranges import for_each_part
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.remote import StorageError, explained, filesystem

logger = logging.getLogger(__name__)

HEAD = struct.Struct("<4sQ32s")  # of an entry: magic, size, digest of the version
MAGIC = b"IVX1"
ROOM = 0.1  # share of the limit that is freed together: finding what is old takes a while
STALE_SECONDS = 600  # until a file that nobody goes on writing is removed
# What tells one content from another, the first that a store gives.
_VERSIONS = ("generation", "ETag", "etag", "LastModified", "Last-Modified", "mtime", "updated")


def version_of(info: dict[str, Any]) -> str:
    """Returns what differs when the content of a file differs, from what fsspec says of it."""
    found = (info[name] for name in (*_VERSIONS, "created") if info.get(name))
    return f"{next(found, '')} {info.get('size')}"


@dataclasses.dataclass(frozen=True)
class LocalCache:
    """A folder of copies. Workers hold a pickled copy of this record.

    Attributes:
        folder: local folder.
        max_bytes: bytes of all files in it; 0 keeps no small files, and large ones without limit.
        since: start of the run, seconds since the epoch. A copy that has been compared with the
            store after it is taken without another request.
    """

    folder: Path
    max_bytes: int
    since: float

    def fetch(self, url: str) -> tuple[bytes, bool]:
        """Returns the content of a small file, and whether it came from the disk.

        Raises:
            OSError, StorageError: the file cannot be read.
        """
        if not self.max_bytes:
            with explained(url):
                return filesystem(url).cat_file(url), False
        path = self._entry(url)
        kept = _read(path)
        if kept is not None and kept.checked >= self.since:
            return kept.content, True
        with explained(url):
            client = filesystem(url)
            version = _digest(version_of(client.info(url)))
            if kept is not None and kept.version == version:
                with contextlib.suppress(OSError):
                    os.utime(path)
                return kept.content, True
            content = client.cat_file(url)
        try:
            self._write(path, version, content)
        except OSError as error:
            reason = error.strerror or error
            _warn_once(f"{self.folder} cannot be written to ({reason}), so images are not kept")
        return content, False

    def local_copy(self, url: str) -> Path:
        """Returns a copy of a large file, fetched by ranges side by side where it is missing.

        The store is always asked for the generation. Copies of other generations are removed,
        unless a process reads them (`pin`).

        Raises:
            ConfigError: the file is larger than the limit.
            OSError, StorageError: the file cannot be read.
        """
        client = filesystem(url)
        with explained(url):
            info = client.info(url)
        name = url.rstrip("/").rpartition("/")[2]
        home = self.folder / "files" / _digest(url).hex()[:16]
        path = home / _digest(version_of(info)).hex()[:16] / name
        if not path.is_file():
            self._fetch_ranges(client, url, info, path)
        for other in [each for each in home.glob("*/*") if each.parent != path.parent]:
            size = _size(other)
            if not other.name.endswith(".partial") and _remove_unless_pinned(other):
                with self._locked() as usage, contextlib.suppress(OSError):
                    usage.bytes -= size
                    other.parent.rmdir()
        return path

    def _fetch_ranges(self, client: Any, url: str, info: dict[str, Any], path: Path) -> None:
        if info.get("size") is None:  # HTTP servers need not say it
            raise StorageError(f"{url} has no known size, so it cannot be copied; copy it yourself")
        size = int(info["size"])
        if self.max_bytes and size > self.max_bytes:
            raise ConfigError(
                f"{url} has {size:,} bytes, more than data.cache.max_gb allows for the whole cache "
                f"({self.max_bytes:,}); raise it"
            )
        with self._reserved(path, size) as aside:
            assert aside is not None, "it was compared with the limit"
            with aside.open("r+b") as file:

                def write(first: int, data: bytes) -> None:
                    os.pwrite(file.fileno(), data, first)

                for_each_part(url, 0, size, write)
            with explained(url):
                if version_of(client.info(url)) != version_of(info):
                    raise StorageError(f"{url} was replaced while it was read; start again")

    # --- entries ----------------------------------------------------------------------------------

    def _entry(self, url: str) -> Path:
        name = _digest(url).hex()
        return self.folder / "images" / name[:2] / name[2:34]

    def _write(self, path: Path, version: bytes, content: bytes) -> None:
        with self._reserved(path, HEAD.size + len(content)) as aside:
            if aside is not None:
                aside.write_bytes(HEAD.pack(MAGIC, len(content), version) + content)

    @contextlib.contextmanager
    def _reserved(self, path: Path, size: int) -> Iterator[Path | None]:
        """Gives a file to write `size` bytes to, which becomes `path`; None if it does not fit."""
        aside = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.{size}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._reserve(aside, size):
            yield None
            return
        try:
            yield aside
            with self._locked() as usage:  # what it replaces may come and go until here
                usage.bytes -= _size(path)
                aside.rename(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            with self._locked() as usage:
                usage.bytes -= size
            raise

    def _reserve(self, aside: Path, more: int) -> bool:
        """Counts the bytes of a new file, and frees some of others; makes the empty file."""
        with self._locked() as usage:
            if self.max_bytes and usage.bytes + more > self.max_bytes:
                usage.bytes = self._freed(self.max_bytes * (1 - ROOM) - more)
                if usage.bytes + more > self.max_bytes:
                    return False
            usage.bytes += more
            aside.touch()
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Usage]:
        """Gives the bytes in use, which no other process reads or changes inside the block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "usage").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            try:
                usage = _Usage(int(file.read()))
            except ValueError:  # new, or damaged
                usage = _Usage(self._freed(float("inf")))
            yield usage
            file.truncate(0)
            file.write(str(max(0, usage.bytes)).encode())

    def _freed(self, wanted: float) -> int:
        """Removes copies, those looked at longest ago first, until at most `wanted` bytes remain.

        Returns:
            The bytes that remain, those of files which are being written included.
        """
        found: list[tuple[float, int, Path]] = []
        total, now = 0, time.time()
        for path in [*self.folder.glob("images/*/*"), *self.folder.glob("files/*/*/*")]:
            with contextlib.suppress(OSError):  # another process removed it
                status = path.stat()
                partial = path.name.endswith(".partial")
                if partial and status.st_mtime < now - STALE_SECONDS:
                    path.unlink()
                    continue
                size = int(path.name.split(".")[-2]) if partial else status.st_size
                total += size
                if not partial:
                    found.append((status.st_mtime, size, path))
        for _, size, path in sorted(found):
            if total <= wanted:
                break
            if _remove_unless_pinned(path):
                total -= size
        return total


@dataclasses.dataclass
class _Usage:
    """The bytes in use, changed under the lock."""

    bytes: int


@dataclasses.dataclass(frozen=True)
class _Kept:
    content: bytes
    version: bytes
    checked: float


def _read(path: Path) -> _Kept | None:
    """Returns an entry; None without one, and for one that is damaged."""
    try:
        with path.open("rb") as file:
            checked = os.fstat(file.fileno()).st_mtime
            data = file.read()
        magic, size, version = HEAD.unpack_from(data)
    except (OSError, struct.error):
        return None
    if magic != MAGIC or len(data) != HEAD.size + size:
        return None
    return _Kept(data[HEAD.size :], version, checked)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def pin(descriptor: int) -> None:
    """Keeps an open copy from being removed for as long as it is open."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _remove_unless_pinned(path: Path) -> bool:
    """Removes a copy that no process holds open; returns whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        return True
    except FileNotFoundError:
        return True
    except OSError:
        return False


_WARNED: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _WARNED:
        _WARNED.add(text)
        logger.warning(text)
