"""Disks that are full or cannot be written to, named with their path."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.remote import is_url

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


def is_full(error: BaseException) -> bool:
    """Returns whether an error, or one that it comes from, says that a disk is full.

    Libraries that write in the background (TensorStore) have their own words for it.
    """
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or os.strerror(errno.ENOSPC) in text:
        return True
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    before = (error.__cause__, error.__context__, *parts)
    return any(is_full(each) for each in before if each is not None)


@contextmanager
def full_disk_named(path: str | os.PathLike, more: str = "") -> Iterator[None]:
    """Turns whatever a library raises on a full disk into one OSError that names the path.

    Args:
        path: what is written.
        more: what a reader should know beside, such as "; the last complete checkpoint is 100".
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        said = f"{os.strerror(errno.ENOSPC)}, {free_space(path)} free{more}"
        raise OSError(errno.ENOSPC, said, os.fspath(path)) from None


def free_bytes(path: str | os.PathLike) -> int | None:
    """Returns the free bytes of the disk on which a path lies or would lie; None if unknown."""
    if is_url(path):
        return None
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


def check_space(folder: str | os.PathLike, needed: float, what: str) -> None:
    """Refuses a disk that has no room for what will be written to it.

    Args:
        folder: where it will be written; it may not exist yet.
        needed: bytes of it.
        what: what it is, for the message.

    Raises:
        ConfigError: names the folder, the bytes and the free space.
    """
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise ConfigError(
            f"{folder}: {what} takes about {human_bytes(needed)}, but only {human_bytes(free)} are "
            "free; make room, or choose another disk"
        )


def check_writable(folder: str | os.PathLike, field: str) -> None:
    """Refuses a folder that could not be made or filled, before anything expensive begins.

    Raises:
        ConfigError: names the field and the path.
    """
    if is_url(folder):  # known when its lock is written, which is the first that a run does
        return
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
