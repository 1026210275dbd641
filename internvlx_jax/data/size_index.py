"""The record of a size index, and its file (design: data.md 10)."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.files import written_aside


@dataclasses.dataclass(frozen=True)
class SizeIndex:
    """Holds one row per record of the source, in its order. A video is described with one frame.

    Attributes:
        status: uint8[n], 0 or 1 + the position of the reason in REASONS.
        change: uint8[n], position in CHANGES of what was done to make the sample fit.
        tiles: int32[n], tiles; 0 for bad samples, as in the next three.
        length: int32[n], tokens.
        supervised: int32[n], supervised tokens.
        images: int32[n], images.
        off_tiles: int32[n], tiles under the tile rule `off`.
        frames: int32[n], frames that a video has and has room for; 0 for everything else.
        stamp: int64[n], `stamps.stamp_of` the images whose headers were read; 0 for all others.
        bad: (position, error) of the bad samples; positions are those of the whole index.
    """

    status: np.ndarray
    change: np.ndarray
    tiles: np.ndarray
    length: np.ndarray
    supervised: np.ndarray
    images: np.ndarray
    off_tiles: np.ndarray
    frames: np.ndarray
    stamp: np.ndarray
    bad: tuple[tuple[int, SampleError], ...]

    def __len__(self) -> int:
        return len(self.status)

    @property
    def reasons(self) -> Counter[str]:
        """Returns the number of bad samples by reason."""
        return Counter(error.reason for _, error in self.bad)

    def save(self, path: Path) -> None:
        """Writes the index as a compressed .npz file."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in COLUMNS}
        bad = json.dumps([(position, *error.args) for position, error in self.bad])
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, bad=np.frombuffer(bad.encode(), np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path) -> SizeIndex:
        """Reads what `save` wrote; files of version 0.1 have no stamps."""
        # Read as a whole: behind a URL, each of the many small reads of an archive would be one.
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            bad = json.loads(stored["bad"].tobytes())
            unknown = np.zeros(len(stored["status"]), np.int64)
            return cls(
                **{name: stored.get(name, unknown) for name in COLUMNS},
                bad=tuple((position, SampleError(*error)) for position, *error in bad),
            )

    @classmethod
    def join(cls, parts: Sequence[SizeIndex]) -> SizeIndex:
        """Returns one index of parts that follow each other."""
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS
        }
        return cls(**columns, bad=tuple(each for part in parts for each in part.bad))


# Columns and their types.
COLUMNS = {
    "status": np.uint8,
    "change": np.uint8,
    "tiles": np.int32,
    "length": np.int32,
    "supervised": np.int32,
    "images": np.int32,
    "off_tiles": np.int32,
    "frames": np.int32,
    "stamp": np.int64,
}
