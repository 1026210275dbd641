"""Answers on their way to predictions.jsonl: one part file a process, flushed a batch (design: evaluation.md 9)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import write_text

Row = dict[str, Any]


class Parts:
    """The part files of one task. Rows are known by their `index`; all of them belong to one settings hash."""

    def __init__(self, folder: Path, settings: str):
        self.folder, self.settings = folder, settings

    def exist(self) -> bool:
        return any(self.folder.glob("*.jsonl"))

    def read(self) -> dict[int, Row]:
        """All finished rows by index. A line that was cut off by the end of its process does not count.

        Raises ConfigError when rows come from other settings, or two rows of one index differ.
        """
        rows: dict[int, Row] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if row.pop("settings") != self.settings:
                    raise ConfigError(
                        f"{path} line {number}: answered with other settings (checkpoint, data, prompts, "
                        "tiles or decoding); use them again, another --out_dir, or remove this folder"
                    )
                if rows.setdefault(row["index"], row) != row:
                    raise ConfigError(
                        f"{path} line {number}: index {row['index']} has two different answers; remove "
                        f"{self.folder}"
                    )
        return rows

    def writer(self, name: str) -> PartWriter:
        """Appends to NAME.jsonl, behind what an earlier run left there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return PartWriter(self.folder / f"{name}.jsonl", self.settings)

    def remove(self) -> None:
        for path in self.folder.glob("*.jsonl"):
            path.unlink()
        if self.folder.is_dir():
            self.folder.rmdir()


class PartWriter:
    """Use with `with`; each call of `write` is on the disk when it returns."""

    def __init__(self, path: Path, settings: str):
        self.path, self.settings = path, settings

    def __enter__(self) -> PartWriter:
        self._file = self.path.open("ab")
        self._file.write(
            b"\n" if self._file.tell() else b""
        )  # ends a line that an interruption cut off
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, rows: Mapping[int, Row]) -> None:
        for index in sorted(rows):
            self._file.write(
                json.dumps({"settings": self.settings} | rows[index], ensure_ascii=False).encode()
                + b"\n"
            )
        self._file.flush()
        os.fsync(self._file.fileno())


def write_rows(path: Path, rows: list[Row]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote. Raises FileNotFoundError, or ConfigError naming the line."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give the predictions.jsonl of an eval.py run"
        )
    rows = []
    with path.open(
        encoding="utf-8"
    ) as file:  # not splitlines: texts may hold other Unicode line separators
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ConfigError(f"{path} line {number}: not a JSON object; run eval.py again")
            rows.append(row)
    return rows
