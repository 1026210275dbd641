"""Local paths and URLs such as gs://bucket/folder/file, read alike. fsspec knows the protocols (gcsfs for gs://)."""

from __future__ import annotations

import glob
import os
from typing import IO

import fsspec

from internvlx_jax.core.errors import ConfigError


def is_url(path: str) -> bool:
    return "://" in path


def join(root: str, path: str) -> str:
    """Ordinary path join: an absolute path, or a URL, wins."""
    return path if is_url(path) else os.path.join(root, path)


def open_binary(path: str | os.PathLike) -> IO[bytes]:
    """A file opened for reading. Raises OSError when it is not there."""
    path = os.fspath(path)
    if not is_url(path):
        return open(path, "rb")
    return _filesystem(path).open(path, "rb")


def is_file(path: str) -> bool:
    return _filesystem(path).isfile(path) if is_url(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    return _filesystem(path).isdir(path) if is_url(path) else os.path.isdir(path)


def names_in(folder: str) -> list[str]:
    """Names of the files in a folder, sorted."""
    if not is_url(folder):
        return sorted(os.listdir(folder))
    return sorted(
        entry.rstrip("/").rpartition("/")[2]
        for entry in _filesystem(folder).ls(folder, detail=False)
    )


def matching(pattern: str) -> list[str]:
    """Local files that match a pattern such as data/part-*.array_record, sorted."""
    return sorted(glob.glob(pattern))


def local_copy(path: str, cache: str) -> str:
    """The path itself, or a copy of a URL's file below the folder `cache`, fetched again when it has changed."""
    if not is_url(path):
        return path
    _filesystem(path)  # names the missing package
    return fsspec.open_local(
        f"filecache::{path}", filecache={"cache_storage": cache, "check_files": True}
    )


def _filesystem(path: str) -> fsspec.AbstractFileSystem:
    protocol = path.partition("://")[0]
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:  # fsspec knows the protocol, its package is not installed
        extra = "; pip install 'internvlx-jax[gcs]'" if protocol in ("gs", "gcs") else ""
        raise ConfigError(f"{path} cannot be read: {error}{extra}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: unknown protocol {protocol}:// ({error})") from error
