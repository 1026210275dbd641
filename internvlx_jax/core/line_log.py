"""Files that grow by lines, on a disk and in an object store (design: platform.md 11).

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

from internvlx_jax.core.paths import RemotePath

SEGMENT_BYTES = 2**18
# An object may be written about once per second.
SECONDS = 1.0


class LineLog:
    """Appends lines to a file of one writer; a reader sees whole lines.

    On a disk a line is written at once. In an object store lines may wait up to SECONDS for the
    next one; `flush` and `close` write them.
    """

    def __init__(self, path: Path):
        self._path = path
        self._number: int | None = None  # of the newest segment
        self._lines: list[str] = []  # of the newest segment
        self._waiting, self._written = False, 0.0

    def append(self, lines: Iterable[str]) -> None:
        """Appends lines, each with its end."""
        if not isinstance(self._path, RemotePath):
            if self._path.is_dir():  # a copy of a run in an object store
                self._replace("".join(read_text_lines(self._path)))
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
            return
        if self._number is None:
            self._number = 1 + max(map(_number, segments(self._path)), default=0)
        self._lines += lines
        self._waiting = True
        if time.monotonic() - self._written >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the lines that wait."""
        if not self._waiting or self._number is None:
            return
        text = "".join(self._lines)
        _segment(self._path, self._number).write_text(text, encoding="utf-8")
        self._waiting, self._written = False, time.monotonic()
        if len(text) > SEGMENT_BYTES:
            self._number, self._lines = self._number + 1, []

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Drops the other lines, and a last one without its end."""

        def kept(lines: list[str]) -> str:
            return "".join(line for line in lines if line.endswith("\n") and wanted(line))

        if not isinstance(self._path, RemotePath):
            self._replace(kept(read_text_lines(self._path)))
            return
        for path in segments(self._path):
            before = path.read_text(encoding="utf-8")
            after = kept(_lines(before))
            if not after:
                path.unlink(missing_ok=True)
            elif after != before:
                path.write_text(after, encoding="utf-8")
        self._number, self._lines, self._waiting = None, [], False

    def _replace(self, text: str) -> None:
        aside = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        aside.write_text(text, encoding="utf-8")
        if self._path.is_dir():
            shutil.rmtree(self._path)
        aside.replace(self._path)

    def close(self) -> None:
        """Writes the lines that wait."""
        self.flush()


def segments(path: Path) -> list[Path]:
    """Returns the segments of a file in their order."""
    if not path.is_dir():
        return []
    return sorted(each for each in path.iterdir() if each.name[:-6].isdigit())


def read_text_lines(path: Path) -> list[str]:
    """Returns the lines of a file with their ends, also of one in segments; none without it.

    The last one may lack its end, where a run was killed or is running.
    """
    found = segments(path) or ([path] if path.is_file() else [])
    return _lines("".join(each.read_text(encoding="utf-8") for each in found))


def _lines(text: str) -> list[str]:
    """Splits at line feeds only: texts may hold other separators of Unicode."""
    *whole, last = text.split("\n")
    return [line + "\n" for line in whole] + ([last] if last else [])


def _segment(path: Path, number: int) -> Path:
    return path / f"{number:06d}{path.suffix}"


def _number(path: Path) -> int:
    return int(path.name.partition(".")[0])
