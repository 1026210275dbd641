"""Files that appear whole or not at all: written aside, then renamed, or sent to an object store.

Reads JSON, and files that grow by lines. Paths may be those of objects (core/paths.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvlx_jax.core.disk import named_on_error
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import (
    complete_lines,
    decode_json,
    encode_text,
    read_json_object,
    shown,
)
from internvlx_jax.core.line_log import read_whole
from internvlx_jax.core.paths import RemotePath
from internvlx_jax.core.uploads import upload_folder


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a local path to write to, which becomes `path` at the end of the block.

    It is removed if the block fails. Several processes may write the same file.
    """
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="internvlx-") as scratch:
            aside = Path(scratch) / path.name
            yield aside
            path.upload(aside)
        return
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with named_on_error(path):
            yield aside
            aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a local folder to fill, which becomes `path` at the end of the block.

    It is removed if the block fails. A folder of an object store is filled from a local one, which
    needs room for it in the folder of temporary files (TMPDIR).

    Raises:
        FileExistsError: `path` exists and is no empty folder, or another process is writing it.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; choose another folder, or remove it")
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="internvlx-") as scratch:
            yield Path(scratch)
            upload_folder(Path(scratch), path)
        return
    aside = path.with_name(path.name + ".partial")
    aside.mkdir(parents=True, exist_ok=True)
    with _alone_in(aside, path):
        try:
            for left in aside.iterdir():  # by a process that was killed
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            with named_on_error(path):
                yield aside
                if path.exists():
                    path.rmdir()
                aside.rename(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _alone_in(aside: Path, path: Path) -> Iterator[None]:
    """Holds the kernel's lock on a folder, which ends with the process.

    Raises:
        FileExistsError: another process has it.
    """
    taken = f"{path} is being written by another process; wait for it, or choose another folder"
    try:
        number = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise FileExistsError(taken) from None
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _Taken from None
        if not aside.exists() or not os.path.samestat(os.fstat(number), aside.stat()):
            raise _Taken
        yield
    except _Taken:
        raise FileExistsError(taken) from None
    finally:
        os.close(number)


class _Taken(Exception):
    """The folder is another process's."""


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text."""
    if isinstance(path, RemotePath):
        path.write_text(text)  # an object is replaced as a whole
        return
    with written_aside(path) as aside:
        aside.write_bytes(encode_text(text))


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_run_settings(run: Path) -> dict[str, Any]:
    """Reads config.json of a run folder; without the file, the object is empty.

    Raises:
        ConfigError: The file is not JSON, or does not hold the fields of a run and its model.
    """
    path = run / "config.json"
    settings = read_json_object(path)
    for name in ("train", "model") if settings else ():
        if not isinstance(settings.get(name), dict):
            raise ConfigError(
                f'{path}: "{name}" is {shown(settings.get(name))}, expected the settings of a run; '
                "restore the file"
            )
    return settings


def read_json_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """Reads the objects of a file that a run appends to, in order; none without the file.

    A last line without its end is one that a running or killed run has not finished; it is left
    out.

    Raises:
        ConfigError: A line is no object with the `needed` fields.
    """
    rows = []
    for number, line in enumerate(complete_lines(read_whole(path)), start=1):
        try:
            row = decode_json(line)
            [row[name] for name in needed]
        except (ValueError, TypeError, KeyError):
            names = ", ".join(f'"{name}"' for name in needed)
            raise ConfigError(
                f"{path} line {number}: not a JSON object with {names}; remove the line"
            ) from None
        rows.append(row)
    return rows
