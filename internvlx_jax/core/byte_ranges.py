"""Parts of large remote files, several at a time (design: platform.md 8)."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from internvlx_jax.core.remote import StorageError, explained, filesystem

PART = 2**25  # bytes that one request reads
THREADS = 8  # requests at a time


def read_part(path: str | os.PathLike, start: int, stop: int) -> bytes:
    """Reads the bytes start .. stop - 1 of a remote file in one request.

    Raises:
        OSError, StorageError: they cannot be read, or the file ends before them.
    """
    url = os.fspath(path)
    with explained(url):
        data = filesystem(url).cat_file(url, start=start, end=stop)
    if len(data) != stop - start:
        raise StorageError(
            f"{url}: {len(data)} of {stop - start} bytes from byte {start} on; the file is shorter "
            "than it should be, or was cut on its way"
        )
    return data


def for_each_part(
    path: str | os.PathLike, start: int, stop: int, take: Callable[[int, bytes], object]
) -> None:
    """Calls `take(first byte, content)` for all parts of a range, in threads and in any order.

    Raises:
        OSError, StorageError: see `read_part`.
    """

    def read(first: int) -> None:
        take(first, read_part(path, first, min(first + PART, stop)))

    firsts = range(start, stop, PART)
    if len(firsts) <= 1:
        for first in firsts:
            read(first)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(read, firsts):
            pass


def read_range(path: str | os.PathLike, start: int, stop: int) -> np.ndarray:
    """Returns uint8[stop - start]: a range of a remote file. It and some parts are in memory.

    Raises:
        OSError, StorageError: see `read_part`.
    """
    result = np.empty(stop - start, np.uint8)

    def take(first: int, data: bytes) -> None:
        result[first - start : first - start + len(data)] = np.frombuffer(data, np.uint8)

    for_each_part(path, start, stop, take)
    return result
