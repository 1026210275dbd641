"""Disks that are full or cannot be written to, named with their path."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvlx_jax.core.errors import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def named_on_error(path: str | os.PathLike) -> Iterator[None]:
    """Names a path in an OSError of the block that names none: writes do not say what they wrote.

    A full disk is told with the space that is left.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.errno not in FULL):
            raise
        said = error.strerror or os.strerror(error.errno)
        if error.errno in FULL and " free" not in said:
            said = f"{said}, {free_space(path)} free"
        raise OSError(error.errno, said, os.fspath(path)) from error


def free_bytes(path: str | os.PathLike) -> int | None:
    """Returns the free bytes of the disk on which a path lies or would lie; None if unknown."""
    try:
        return shutil.disk_usage(_nearest(path)).free
    except OSError:
        return None


def free_space(path: str | os.PathLike) -> str:
    """Returns the free space of a path's disk in words."""
    free = free_bytes(path)
    return "an unknown amount" if free is None else human_bytes(free)


def human_bytes(count: float) -> str:
    """Returns a number of bytes in words, such as "5.2 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def check_writable(folder: str | os.PathLike, field: str) -> None:
    """Refuses a folder that could not be made or filled, before anything expensive begins.

    Raises:
        ConfigError: names the field and the path.
    """
    place = _nearest(folder)
    if not place.is_dir():
        raise ConfigError(f"{field} {folder}: {place} is a file; choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{field} {folder}: {place} cannot be written to; choose another folder")


def _nearest(path: str | os.PathLike) -> Path:
    """Returns the path itself or the nearest parent that exists."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
