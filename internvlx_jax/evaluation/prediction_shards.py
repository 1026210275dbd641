"""Answers on their way to predictions.jsonl (design: evaluation.md 9).

Each process appends to one part file and flushes it after every batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.disk import named_on_error
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import written_aside
from internvlx_jax.core.json_text import decode_json, encode_line, read_lines
from internvlx_jax.core.line_log import LineLog, read_whole, segments
from internvlx_jax.core.paths import is_remote
from internvlx_jax.evaluation.records import Row


class Parts:
    """The part files of one task; all of their rows belong to one settings hash.

    Attributes:
        folder: folder of the part files.
        settings: the settings hash.
    """

    def __init__(self, folder: Path, settings: str):
        self.folder, self.settings = folder, settings

    def exist(self) -> bool:
        """Whether there is any part file."""
        return any(self.folder.glob("*.jsonl"))

    def read(self) -> dict[int, Row]:
        """Returns all finished rows by index; a line that an interruption cut off does not count.

        Raises:
            ConfigError: rows come from other settings, or two rows of one index differ.
        """
        rows: dict[int, Row] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(read_whole(path).split(b"\n"), start=1):
                try:
                    stored = decode_json(line)
                except ValueError:
                    continue
                where = f"{path} line {number}"
                if not isinstance(stored, dict):
                    raise ConfigError(f"{where}: not a JSON object; remove the line")
                if stored.pop("settings", None) != self.settings:
                    raise ConfigError(
                        f"{where}: answered with other settings (checkpoint, data, prompts, tiles "
                        "or decoding); use them again, another --out_dir, or remove this folder"
                    )
                row = Row.from_json(stored, where)
                if rows.setdefault(row.index, row) != row:
                    raise ConfigError(
                        f"{where}: index {row.index} has two different answers; remove "
                        f"{self.folder}"
                    )
        return rows

    def writer(self, name: str) -> PartWriter:
        """Opens NAME.jsonl; rows are appended behind those of an earlier run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return PartWriter(self.folder / f"{name}.jsonl", self.settings)

    def remove(self) -> None:
        """Removes the part files and their folder."""
        for path in self.folder.glob("*.jsonl"):
            for segment in segments(path):
                segment.unlink()
            path.unlink(missing_ok=True)
        if self.folder.is_dir():
            self.folder.rmdir()


class PartWriter:
    """A context manager whose `write` returns when the rows are on the disk."""

    def __init__(self, path: Path, settings: str):
        self.path, self.settings = path, settings

    def __enter__(self) -> PartWriter:
        self._log = LineLog(self.path) if is_remote(self.path) else None
        if self._log is None:
            self._file = self.path.open("ab")
            # Ends a line that an interruption cut off.
            self._file.write(b"\n" if self._file.tell() else b"")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._log is None:
            self._file.close()
        else:
            self._log.close()

    def write(self, rows: Sequence[Row]) -> None:
        """Appends rows and waits until they are on the disk."""
        lines = [encode_line({"settings": self.settings} | row.to_json()) for row in rows]
        if self._log is not None:
            self._log.append(lines)
            self._log.flush()
            return
        with named_on_error(self.path):
            self._file.writelines(lines)
            self._file.flush()
            os.fsync(self._file.fileno())


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a predictions.jsonl, one row per line."""
    with written_aside(path) as aside, aside.open("wb") as file:
        file.writelines(encode_line(row.to_json()) for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Reads a predictions.jsonl.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: a line is no row; the message names it.
    """
    return [Row.from_json(stored, where) for where, stored in read_objects(path)]


def read_objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads the lines of a predictions.jsonl as ("FILE line N", JSON object).

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: a line is no JSON object; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give the predictions.jsonl of an eval.py run"
        )
    objects = []
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        try:
            stored = decode_json(line)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}; run eval.py again") from None
        if not isinstance(stored, dict):
            raise ConfigError(f"{where}: not a JSON object; run eval.py again")
        objects.append((where, stored))
    return objects
