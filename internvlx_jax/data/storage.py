"""Local paths and URLs such as gs://bucket/folder/file, read alike.

fsspec knows the protocols; a package per protocol implements them, gcsfs for gs://.
"""

from __future__ import annotations

import glob
import os
from typing import BinaryIO, cast

import fsspec

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.extras import require


def is_url(path: str) -> bool:
    """Returns whether the path names a protocol."""
    return "://" in path


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
    return cast(BinaryIO, _filesystem(path).open(path, "rb"))


def is_file(path: str) -> bool:
    """Returns whether the path or URL is a file."""
    return _filesystem(path).isfile(path) if is_url(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Returns whether the path or URL is a folder."""
    return _filesystem(path).isdir(path) if is_url(path) else os.path.isdir(path)


def names_in(folder: str) -> list[str]:
    """Returns the names of the files in a folder, sorted."""
    if not is_url(folder):
        return sorted(os.listdir(folder))
    return sorted(
        entry.rstrip("/").rpartition("/")[2]
        for entry in _filesystem(folder).ls(folder, detail=False)
    )


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
    _filesystem(path)  # its error names the missing package
    options = {"cache_storage": cache, "check_files": True}
    return cast(str, fsspec.open_local(f"filecache::{path}", filecache=options))


def _filesystem(path: str) -> fsspec.AbstractFileSystem:
    protocol = path.partition("://")[0]
    if protocol in ("gs", "gcs"):
        require("gcsfs", extra="gcs", purpose=f"reading {path}")
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:  # fsspec knows the protocol, its package is not installed
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: unknown protocol {protocol}:// ({error})") from error
