"""Local paths and URLs such as gs://bucket/folder/file, read alike.

fsspec knows the protocols; a package per protocol implements them (core/remote.py).
"""

from __future__ import annotations

import glob
import os
from typing import BinaryIO, cast

import fsspec

from internvlx_jax.core.remote import explained, filesystem, is_url


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
    if not is_url(path):
        return os.path.isfile(path)
    with explained(path):
        return filesystem(path).isfile(path)


def is_folder(path: str) -> bool:
    """Returns whether the path or URL is a folder."""
    if not is_url(path):
        return os.path.isdir(path)
    with explained(path):
        return filesystem(path).isdir(path)


def names_in(folder: str) -> list[str]:
    """Returns the names of the files in a folder, sorted."""
    if not is_url(folder):
        return sorted(os.listdir(folder))
    with explained(folder):
        entries = filesystem(folder).ls(folder, detail=False)
    return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)


def matching(pattern: str) -> list[str]:
    """Returns local files that match a pattern such as data/part-*.array_record, sorted."""
    return sorted(glob.glob(pattern))


def local_copy(path: str, cache: str) -> str:
    """Returns a local path, or copies the file of a URL and returns the path of the copy.

    Args:
        path: local path or URL.
        cache: folder of the copies; a file that has changed is fetched again.
    """
    if not is_url(path):
        return path
    filesystem(path)  # its error names the missing package
    options = {"cache_storage": cache, "check_files": True}
    with explained(path):
        return cast(str, fsspec.open_local(f"filecache::{path}", filecache=options))
