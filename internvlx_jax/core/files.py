"""Writing files so that a reader never sees half of one: aside, then renamed. Reading those that grow by lines."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` at the end of the block, and is removed if the block fails."""
    aside = path.with_name(
        f"{path.name}.{os.getpid()}.partial"
    )  # several processes may write the same file
    try:
        yield aside
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `path` at the end of the block, and is removed if the block fails.

    Raises FileExistsError when `path` is there already and not an empty folder.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; choose another folder, or remove it")
    aside = path.with_name(path.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if path.exists():
            path.rmdir()
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object; an empty one without the file. Raises ConfigError naming the file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object; fetch it again")
    return value


def read_json_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """Objects of a file that a run appends to, in order; none without the file.

    A last line without its end is one that a running or killed run has not finished; it is left out. Raises ConfigError
    naming a line that is no object with the `needed` fields.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8").splitlines(keepends=True), start=1
    ):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            [row[name] for name in needed]
        except (ValueError, TypeError, KeyError):
            names = ", ".join(f'"{name}"' for name in needed)
            raise ConfigError(
                f"{path} line {number}: not a JSON object with {names}; remove the line"
            ) from None
        rows.append(row)
    return rows
