"""Local paths and URLs such as gs://bucket/folder/file, read alike.

fsspec knows the protocols; a package per protocol implements them (core/remote.py).
"""

from __future__ import annotations

import glob
import os
from typing import BinaryIO, cast

from internvlx_jax.core.byte_ranges import read_part
from internvlx_jax.core.remote import explained, filesystem, is_url, kind_of, protocol_of


def join(root: str, path: str) -> str:
    """Joins paths; an absolute path, or a URL, replaces the root."""
    return path if is_url(path) else os.path.join(root, path)


def open_binary(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading.

    Raises:
        OSError: the file does not exist or cannot be read.
        ConfigError: nothing can read URLs of this protocol.
    """
    path = os.fspath(path)
    if not is_url(path):
        return open(path, "rb")
    with explained(path):
        return cast(BinaryIO, filesystem(path).open(path, "rb"))


def is_file(path: str) -> bool:
    """Returns whether the path or URL is a file."""
    return kind_of(path) == "file" if is_url(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Returns whether the path or URL is a folder."""
    return kind_of(path) == "directory" if is_url(path) else os.path.isdir(path)


def names_in(folder: str) -> list[str]:
    """Returns the names of the files in a folder, sorted."""
    if not is_url(folder):
        return sorted(os.listdir(folder))
    with explained(folder):
        entries = filesystem(folder).ls(folder, detail=False)
    return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)


def matching(pattern: str) -> list[str]:
    """Returns the files that match a pattern such as data/part-*.array_record, sorted."""
    if not is_url(pattern):
        return sorted(glob.glob(pattern))
    with explained(pattern):
        names = filesystem(pattern).glob(pattern)
    return sorted(f"{protocol_of(pattern)}://{name}" for name in names)


def file_size(path: str) -> int:
    """Returns the bytes of a file."""
    if not is_url(path):
        return os.path.getsize(path)
    with explained(path):
        return int(filesystem(path).info(path)["size"])


def read_tail(path: str, size: int, most: int) -> bytes:
    """Returns the last bytes of a file of `size` bytes, at most `most` of them."""
    start = max(0, size - most)
    if is_url(path):
        return read_part(path, start, size)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read()
