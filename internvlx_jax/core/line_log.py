"""Files that grow by lines, on a disk and in an object store (design: platform.md 8).

Nothing can be appended to an object. There the lines are in numbered segments below the name of the
file, such as RUN/metrics.jsonl/000003.jsonl: the newest segment is written again with each line,
until it is large and the next one begins. The same folder of segments is read on a disk, where a
copy of a run may lie.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from internvlx_jax.core.disk import named_on_error
from internvlx_jax.core.json_text import complete_lines
from internvlx_jax.core.paths import RemotePath

SEGMENT_BYTES = 2**18
# An object may be written about once per second.
SECONDS = 1.0


class LineLog:
    """Appends lines to a file of one writer; a reader sees whole lines.

    On a disk a line is written at once. In an object store lines may wait up to SECONDS for the
    next one; `flush` and `close` write them. With `durable`, `append` returns when the lines are
    on the disk or in the store.
    """

    def __init__(self, path: Path, *, durable: bool = False):
        self._path, self._durable = path, durable
        self._number: int | None = None  # of the newest segment
        self._lines: list[bytes] = []  # of the newest segment
        self._waiting, self._written = False, 0.0

    def append(self, lines: Iterable[bytes]) -> None:
        """Appends lines, each with its end."""
        if not isinstance(self._path, RemotePath):
            if self._path.is_dir():  # a copy of a run in an object store
                self._replace(read_whole(self._path))
            with named_on_error(self._path), self._path.open("ab") as file:
                file.write(b"".join(lines))
                if self._durable:
                    file.flush()
                    os.fsync(file.fileno())
            return
        if self._number is None:
            self._number = 1 + max(map(_number, segments(self._path)), default=0)
        self._lines += lines
        self._waiting = True
        if self._durable or time.monotonic() - self._written >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the lines that wait."""
        if not self._waiting or self._number is None:
            return
        content = b"".join(self._lines)
        _segment(self._path, self._number).write_bytes(content)
        self._waiting, self._written = False, time.monotonic()
        if len(content) > SEGMENT_BYTES:
            self._number, self._lines = self._number + 1, []

    def close(self) -> None:
        """Writes the lines that wait."""
        self.flush()

    def keep(self, wanted: Callable[[bytes], bool]) -> None:
        """Drops the other lines, and a last one without its end."""

        def kept(content: bytes) -> bytes:
            lines = complete_lines(content)
            return b"".join(line + b"\n" for line in lines if wanted(line))

        if not isinstance(self._path, RemotePath):
            self._replace(kept(read_whole(self._path)))
            return
        for path in segments(self._path):
            before = path.read_bytes()
            after = kept(before)
            if not after:
                path.unlink(missing_ok=True)
            elif after != before:
                path.write_bytes(after)
        self._number, self._lines, self._waiting = None, [], False

    def _replace(self, content: bytes) -> None:
        aside = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        try:
            with named_on_error(self._path):
                aside.write_bytes(content)
                if self._path.is_dir():
                    shutil.rmtree(self._path)
                aside.replace(self._path)
        finally:
            aside.unlink(missing_ok=True)


def segments(path: Path) -> list[Path]:
    """Returns the segments of a file in their order; none of an ordinary file."""
    if not path.is_dir():
        return []
    return sorted(each for each in path.iterdir() if each.stem.isdigit())


def holds_lines(path: Path) -> bool:
    """Returns whether there is such a file, or segments of it."""
    return path.is_file() or bool(segments(path))


def read_whole(path: Path) -> bytes:
    """Returns the content of a file, also of one in segments; empty without it."""
    found = segments(path) or ([path] if path.is_file() else [])
    return b"".join(each.read_bytes() for each in found)


def _segment(path: Path, number: int) -> Path:
    return path / f"{number:06d}{path.suffix}"


def _number(path: Path) -> int:
    return int(path.stem)
