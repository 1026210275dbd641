"""Writes safetensors shards tensor by tensor, in any order (design: checkpoints.md 6).

The library's own writer needs all tensors of a file in memory. The format is a header with names,
types and offsets before the bytes, so the shapes fix the files, and tensors (or rows of them) are
put in their places in any order.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from internvlx_jax.checkpoints.safetensors_folder import CHECKSUMS, FLOAT_TYPES, format_sums, sha256
from internvlx_jax.core.files import write_text

MAX_SHARD_BYTES = 5_000_000_000
TYPES = {dtype: name for name, dtype in FLOAT_TYPES.items()}


Plan = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape, dtype


def plan_files(
    tensors: Plan, *, stem: str = "model", max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, str]:
    """Returns name -> file, in the given order.

    A new file begins before a tensor would push the last one past `max_bytes`.
    """
    shards, size = [[]], 0
    for name, each in tensors.items():
        if shards[-1] and size + _nbytes(*each) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(*each)
    if len(shards) == 1:
        return dict.fromkeys(tensors, f"{stem}.safetensors")
    return {
        name: f"{stem}-{n:05}-of-{len(shards):05}.safetensors"
        for n, shard in enumerate(shards, 1)
        for name in shard
    }


def index_text(tensors: Plan, files: Mapping[str, str]) -> str:
    """Returns the text of `model.safetensors.index.json`."""
    total = sum(_nbytes(*each) for each in tensors.values())
    return (
        json.dumps(
            {"metadata": {"total_size": total}, "weight_map": files}, indent=2, sort_keys=True
        )
        + "\n"
    )


class SafetensorsWriter:
    """Writes files for named tensors; `finish` checks that every byte was written.

    Attributes:
        folder: where the files are.
        files: their names: `model.safetensors` for the stem `model`, or shards of at most
            `max_bytes`, which an index lists.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Plan,
        *,
        stem: str = "model",
        max_bytes: int = MAX_SHARD_BYTES,
        send: Callable[[Path], None] | None = None,
    ):
        """Plans the files.

        Args:
            folder: local folder.
            tensors: shape and dtype of each tensor, in file order.
            stem: how the names of the files begin.
            max_bytes: of the tensors of a shard.
            send: takes a file once it is complete, and may remove it. Files are then begun one by
                one, and few exist at a time if tensors are written about in their order.
        """
        self.folder, self._tensors, self._stem, self._send = folder, dict(tensors), stem, send
        self._files = plan_files(tensors, stem=stem, max_bytes=max_bytes)
        self._start: dict[str, int] = {}
        self._left = {name: _nbytes(*each) for name, each in tensors.items()}
        self._names: dict[str, list[str]] = {}
        for name, file in self._files.items():
            self._names.setdefault(file, []).append(name)
        self.files = list(self._names)
        self._sums: dict[str, str] = {}
        for file in self.files if send is None else ():
            self._create(file, self._names[file])

    def _create(self, file: str, names: list[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            shape, dtype = self._tensors[name]
            end = offset + _nbytes(shape, dtype)
            header[name] = {
                "dtype": TYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        for name in names:
            self._start[name] = 8 + len(text) + header[name]["data_offsets"][0]
        with (self.folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + offset)

    def write(self, name: str, array: np.ndarray, first_row: int = 0) -> None:
        """Writes a whole tensor, or its rows from `first_row` on."""
        shape, dtype = self._tensors[name]
        if array.dtype != dtype or array.shape[1:] != shape[1:]:
            raise ValueError(f"{name}: {array.dtype}{list(array.shape)} for {dtype}{list(shape)}")
        file = self._files[name]
        if name not in self._start:
            self._create(file, self._names[file])
        row = _nbytes(shape[1:], dtype) if shape else 0
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with (self.folder / file).open("r+b") as stream:
            stream.seek(self._start[name] + first_row * row)
            stream.write(data.data)
        self._left[name] -= data.size
        if self._send is not None and not any(self._left[each] for each in self._names[file]):
            self._end(file)

    def _end(self, file: str) -> None:
        """Takes the checksum of a complete file, and hands it over."""
        self._sums[file] = sha256(self.folder / file)
        if self._send is not None:
            self._send(self.folder / file)

    def finish(self) -> None:
        """Writes index and checksums. Raises ValueError where bytes are missing."""
        if unfinished := [name for name, left in self._left.items() if left]:
            raise ValueError(f"not all bytes were written of {', '.join(unfinished[:5])}")
        if len(self.files) > 1:
            write_text(
                self.folder / f"{self._stem}.safetensors.index.json",
                index_text(self._tensors, self._files),
            )
        for file in self.files:
            if file not in self._sums:
                if not (self.folder / file).exists():  # its tensors have no bytes
                    self._create(file, self._names[file])
                self._end(file)
        write_text(self.folder / CHECKSUMS, format_sums(self._sums))


def _nbytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
