"""Where the records of a large text file lie: found once, kept, mapped (design: data.md 10).

A scan reads a file by blocks and holds 16 bytes per record. That of a large file is kept in the
local cache, keyed by the file's size and times, so that a restart and the worker processes of a
host map one copy instead of reading the file again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import BOM
from internvlx_jax.core.uploads import cache_folder

BLOCK = 2**24  # bytes that are looked at together
KEPT_FROM = 2**24  # bytes of a file from which its scan is kept
# A file that was written just now may be written again without a change of its time.
SETTLED_SECONDS = 2

PLACE = np.dtype([("start", "<i8"), ("size", "<u4"), ("line", "<u4")])

_NEWLINE, _LARGEST_SPACE, _BOM_START = 10, 32, BOM[0]


class Places(NamedTuple):
    """The records of a file.

    Attributes:
        places: PLACE[n], first byte, bytes and number (from 1) of each record.
        content_key: SHA-256 of the file.
        kept: .npy file that `places` is mapped from; None: it is in memory.
    """

    places: np.ndarray
    content_key: str
    kept: str | None = None


def kept_places(local: str, kind: str, scan: Callable[[str], Places]) -> Places:
    """Returns what `scan` finds in a file, or found there before.

    Args:
        local: path of the file.
        kind: format of its records, a word.
        scan: reads the whole file.
    """
    status = os.stat(local)
    changed = max(status.st_mtime, status.st_ctime)
    if status.st_size < KEPT_FROM or changed > time.time() - SETTLED_SECONDS:
        return scan(local)
    identity = (
        os.path.realpath(local),
        kind,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
    )
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    folder = cache_folder() / "places" / key
    found = _read(folder)
    if found is None:
        found = scan(local)
        with contextlib.suppress(OSError):  # a cache that cannot be written to is none
            _write(folder, found)
            found = _read(folder) or found
    return found


def map_places(kept: str) -> np.ndarray:
    """Returns the places in a kept file, mapped and read-only.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    places = np.load(kept, mmap_mode="r").view(np.ndarray)
    if places.dtype != PLACE or places.ndim != 1:
        raise ValueError(f"{kept} holds no places of records")
    return places


def _read(folder: Path) -> Places | None:
    kept = str(folder / "places.npy")
    try:
        places = map_places(kept)
        about = json.loads((folder / "about.json").read_text())
        if about["records"] != len(places):
            return None
        return Places(places, str(about["content_key"]), kept)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, found: Places) -> None:
    """Keeps a scan; the folder appears as a whole, and the first of several processes wins."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    try:
        np.save(aside / "places.npy", found.places)
        about = {"content_key": found.content_key, "records": len(found.places)}
        (aside / "about.json").write_text(json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)  # one that could not be read
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def scan_lines(local: str) -> Places:
    """Finds the lines of a file that are not empty, in memory of a few blocks and the result."""
    digest, parts = hashlib.sha256(), []
    for starts, ends, lines in _lines(local, digest):
        parts.append(_packed(local, starts, ends - starts, lines))
    places = np.concatenate(parts) if parts else np.empty(0, PLACE)
    return Places(places, digest.hexdigest())


def _packed(local: str, starts: np.ndarray, sizes: np.ndarray, lines: np.ndarray) -> np.ndarray:
    if len(sizes) and sizes.max() >= 2**32:
        raise ConfigError(f"{local} line {lines[sizes.argmax()]}: longer than 4 GiB; remove it")
    places = np.empty(len(starts), PLACE)
    places["start"], places["size"], places["line"] = starts, sizes, lines
    return places


def _lines(local: str, digest: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (first byte, byte behind the end, number) of lines that hold more than white space."""
    offset, number, rest = 0, 1, b""
    with open(local, "rb") as file:
        while True:
            block = file.read(BLOCK)
            digest.update(block)
            data = rest + block
            ends = np.flatnonzero(np.frombuffer(data, np.uint8) == _NEWLINE) + 1
            if not block and (not len(ends) or ends[-1] < len(data)) and data:
                ends = np.append(ends, len(data))  # the last line has no end
            if len(ends):
                starts = np.concatenate([[0], ends[:-1]])
                full = _full(data, starts, ends)
                numbers = np.arange(number, number + len(ends))
                yield starts[full] + offset, ends[full] + offset, numbers[full]
                number, offset = number + len(ends), offset + int(ends[-1])
                data = data[ends[-1] :]
            rest = data
            if not block:
                return


def _full(data: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns bool[n]: lines that hold more than white space and a byte-order mark."""
    first = np.frombuffer(data, np.uint8)[starts]
    full = (first > _LARGEST_SPACE) & (first != _BOM_START)
    for line in np.flatnonzero(~full):
        full[line] = bool(data[starts[line] : ends[line]].removeprefix(BOM).strip())
    return full


def scan_array(local: str) -> Places:
    """Finds the elements of a file that is one JSON array.

    Raises:
        ValueError: the file is no array; says what is wrong and where.
    """
    data = Path(local).read_bytes()
    spans = np.array(_elements(data), np.int64).reshape(-1, 2)
    places = _packed(local, spans[:, 0], spans[:, 1], np.arange(1, len(spans) + 1))
    return Places(places, hashlib.sha256(data).hexdigest())


def _elements(data: bytes) -> list[tuple[int, int]]:
    """Returns (first byte, bytes) of each element of a JSON array."""
    # Latin-1 keeps one character per byte, and JSON's own signs are ASCII.
    text, decoder, spans = data.decode("latin-1"), json.JSONDecoder(), []
    space = re.compile(r"[ \t\r\n]*")

    def skip(place: int) -> int:
        found = space.match(text, place)
        return found.end() if found else place

    place = skip(text.index("[") + 1)
    ended = text[place : place + 1] == "]"
    while not ended:
        try:
            _, stop = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"element {len(spans) + 1}: {error}") from None
        spans.append((place, stop - place))
        place = skip(stop)
        ended = text[place : place + 1] == "]"
        if not ended and text[place : place + 1] != ",":
            raise ValueError(f"element {len(spans)}: no comma or ] behind it (byte {place})")
        place = place if ended else skip(place + 1)
    if skip(place + 1) != len(text):
        raise ValueError(f"there is more behind its end (byte {place + 1})")
    return spans
