"""Reads folders of safetensors files, tensor by tensor, mapped (design: checkpoints.md 6)."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from internvlx_jax.core.byte_ranges import read_part, read_range
from internvlx_jax.core.errors import CheckpointError
from internvlx_jax.core.json_text import decode_text, shown
from internvlx_jax.core.paths import RemotePath, as_path

FLOAT_TYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_FIRST_READ = 2**20  # bytes at the beginning of a remote file, which most headers are within
_HASHED = 2**28  # bytes of a remote file that are in memory while it is hashed
_LARGEST_HEADER = 10**8  # bytes, as in the library
CHECKSUMS = "SHA256SUMS"  # as sha256sum(1) writes and checks them


class SafetensorsFolder:
    """`STEM.safetensors`, or the shards that `STEM.safetensors.index.json` names.

    Opening raises CheckpointError for missing, unreadable or contradicting files.

    Attributes:
        path: the folder.
        notes: what a report should mention: a wrong total_size, .bin files that are not read.
    """

    def __init__(self, path: Path, stem: str = "model", files: Path | None = None):
        """Opens a folder; no weights are read.

        Args:
            path: the folder, which may be one of an object store.
            stem: how the names of the files begin.
            files: folder of the weight files, where it is not that of their index.
        """
        self.path = as_path(path)
        self._folder = self.path if files is None else files
        self.notes: list[str] = []
        self._where: dict[str, tuple[str, int]] = {}  # tensor -> file, first byte
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        problems: list[str] = []
        index, single = self.path / f"{stem}.safetensors.index.json", f"{stem}.safetensors"
        weight_map, total = {}, None
        if index.is_file():
            weight_map, total = read_index(index)
            names = sorted(set(weight_map.values()))
            problems += self._second_set(single, index, names)
        elif (self._folder / single).is_file():
            names = [single]
        else:
            raise CheckpointError(
                self.path,
                [f"no {single} and no {index.name}; convert other formats to safetensors first"],
            )
        for name in names:
            problems += self._open(name, index.name)
        for tensor, name in weight_map.items():
            if self._exists(name) and self._where.get(tensor, ("",))[0] != name:
                problems.append(
                    f"tensor {tensor}: {index.name} places it in {name}, which does not hold it"
                )
        if problems:
            raise CheckpointError(self.path, problems)
        if total not in (None, self.nbytes()):
            self.notes.append(
                f"{index.name}: metadata.total_size is {total}, the tensors have {self.nbytes()} "
                "bytes"
            )
        if bins := sorted(file.name for file in self.path.glob("pytorch_model*.bin")):
            self.notes.append(f"{', '.join(bins)} not read: safetensors files come first")

    def _second_set(self, single: str, index: Path, shards: Sequence[str]) -> list[str]:
        """Describes a single file beside an index that does not name it.

        transformers would read the single file, older tools the shards: one of them is stale.
        """
        file = self._folder / single
        if single in shards or not file.is_file():
            return []
        newer = single if _time(file) > _time(index) else index.name
        return [
            f"both {single} and {index.name}, which does not name it, are in the folder, and only "
            f"one can hold the weights ({newer} is newer). Remove {single}, or the index and its "
            "shards"
        ]

    def _open(self, name: str, index: str) -> list[str]:
        """Lists the tensors of one file; returns what is wrong with it."""
        file = self._folder / name
        try:
            if isinstance(file, RemotePath):
                header, start = read_remote_header(file)
                types = {
                    key: (str(each["dtype"]), tuple(each["shape"]))
                    for key, each in header.items()
                    if key != "__metadata__"
                }
            else:
                types = _types(file)
                header, start = read_header(file)
        except FileNotFoundError:
            return [f"{name}: named by {index} but missing; copy the shard into the folder"]
        except (SafetensorError, OSError, ValueError) as error:
            return [f"{name}: not a readable safetensors file ({error}); copy it again"]
        problems = [
            f"{name}: tensor {tensor} stands twice in the header; its values are ambiguous"
            for tensor in header.twice
        ]
        for tensor, (dtype, shape) in types.items():
            if tensor in self._where:
                problems.append(f"tensor {tensor} is in both {self._where[tensor][0]} and {name}")
            self._where[tensor] = (name, start + header[tensor]["data_offsets"][0])
            self._shapes[tensor], self._dtypes[tensor] = shape, dtype
        return problems

    def _exists(self, name: str) -> bool:
        """Returns whether a weight file has been found."""
        return (
            any(file == name for file, _ in self._where.values()) or (self._folder / name).is_file()
        )

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """File type, e.g. `BF16`."""
        return self._dtypes[name]

    def nbytes(self) -> int:
        return sum(
            int(np.prod(self._shapes[name])) * bits(self._dtypes[name]) // 8 for name in self._where
        )

    def files(self) -> list[str]:
        return sorted({name for name, _ in self._where.values()})

    def read(self, name: str) -> np.ndarray:
        """Returns a read-only view of one tensor in its file.

        Bytes are read when touched, and unmapped with the last view. Those of a remote file are
        read here, by ranges.
        """
        file, start = self._where[name]
        shape, dtype = self._shapes[name], FLOAT_TYPES[self._dtypes[name]]
        path = self._folder / file
        if 0 in shape:
            return np.zeros(shape, dtype)
        if isinstance(path, RemotePath):
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            return read_range(path, start, start + nbytes).view(dtype).reshape(shape)
        return np.memmap(path, dtype, "r", start, shape)

    def check_sums(self) -> int:
        """Compares every file with its SHA-256 where that is known; returns how many had one.

        Sums are listed in `SHA256SUMS`, or are the names of the files in a Hugging Face cache.

        Raises:
            CheckpointError: names the damaged files.
        """
        listed = read_sums(self.path / CHECKSUMS)
        problems, checked = [], 0
        for name in self.files():
            target = (self._folder / name).resolve().name
            expected = listed.get(name) or (
                target if re.fullmatch(r"[0-9a-f]{64}", target) else None
            )
            if expected is None:
                continue
            checked += 1
            if (found := sha256(self._folder / name)) != expected:
                problems.append(
                    f"{name}: SHA-256 is {found}, expected {expected}; the file is damaged, "
                    "copy it again"
                )
        if problems:
            raise CheckpointError(self.path, problems)
        return checked


def _time(file: Path) -> float:
    """Returns when a file was written; in an object store its generation, 0 without one."""
    try:
        return float(file.stat().st_mtime_ns)
    except ValueError:
        return 0.0


class _Header(dict):
    """A safetensors header that remembers names which stand in it twice."""

    def __init__(self, pairs):
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.twice = (
            sorted({name for name in names if names.count(name) > 1})
            if len(names) > len(self)
            else []
        )


def read_header(file: Path) -> tuple[_Header, int]:
    """Returns the JSON header of a safetensors file and where the tensors begin; or ValueError."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length), object_pairs_hook=_Header), 8 + length


def _types(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of each tensor of a file.

    The library checks that the header parses and that its offsets fill the file exactly.
    """
    with safe_open(file, framework="np") as opened:
        tensors = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        return {
            key: (tensor.get_dtype(), tuple(tensor.get_shape())) for key, tensor in tensors.items()
        }


def read_remote_header(file: RemotePath) -> tuple[_Header, int]:
    """Returns the header of a remote file and where the tensors begin, checked as the library does.

    Raises:
        ValueError: it is no header, or its tensors do not fill the file exactly.
    """
    size = file.stat().st_size
    start = min(size, _FIRST_READ)
    begin = read_part(file, 0, start)
    if size < 8:
        raise ValueError("the file is too short for a header")
    (length,) = struct.unpack_from("<Q", begin)
    if length > min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"its header has {length} bytes, the file has {size}")
    text = begin[8 : 8 + length]
    if len(text) < length:
        text += read_part(file, start, 8 + length)
    header = json.loads(text, object_pairs_hook=_Header)
    end = 0
    try:
        tensors = [each for key, each in header.items() if key != "__metadata__"]
        for each in sorted(tensors, key=lambda each: each["data_offsets"]):
            first, last = each["data_offsets"]
            count = math.prod(each["shape"])
            if first != end or last - first != -(-count * bits(each["dtype"]) // 8):
                raise ValueError(f"its offsets {[first, last]} do not follow from its shapes")
            end = last
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the header of a safetensors file ({error!r})") from None
    if 8 + length + end != size:
        raise ValueError(f"its tensors end at byte {8 + length + end}, the file at {size}")
    return header, 8 + length


def read_index(index: Path) -> tuple[dict[str, str], int | None]:
    """Returns weight_map and total_size of an index file. Raises CheckpointError."""
    try:
        value = json.loads(decode_text(index.read_bytes()), object_pairs_hook=_Header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            index, [f"not a safetensors index ({error}); copy it again"]
        ) from error
    weight_map = value.get("weight_map") if isinstance(value, _Header) else None
    if not isinstance(weight_map, _Header):
        found = shown(value if weight_map is None else weight_map)
        raise CheckpointError(
            index, [f"not a safetensors index ({found}); expected an object with weight_map"]
        )
    problems = [f"weight_map lists tensor {tensor} twice" for tensor in weight_map.twice]
    problems += [
        f"weight_map places {shown(tensor)} in {shown(name)}, which is no file name; copy it again"
        for tensor, name in weight_map.items()
        if not isinstance(name, str) or Path(name).name != name
    ]
    if problems:
        raise CheckpointError(index, problems[:20])
    metadata = value.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def read_sums(file: Path) -> dict[str, str]:
    """Returns file name -> SHA-256 of a sums file; empty without the file."""
    if not file.is_file():
        return {}
    rows = (line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip())
    return {row[1].lstrip("*"): row[0] for row in rows if len(row) == 2}


def format_sums(sums: Mapping[str, str]) -> str:
    return "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))


def sha256(file: Path) -> str:
    if isinstance(file, RemotePath):
        return _remote_sha256(file)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remote_sha256(file: RemotePath) -> str:
    digest, size = hashlib.sha256(), file.stat().st_size
    for start in range(0, size, _HASHED):
        digest.update(read_range(file, start, min(start + _HASHED, size)).data)
    return digest.hexdigest()


def bits(dtype: str) -> int:
    """Returns the bits of an element, e.g. 16 for `BF16`: the number in the name of its type."""
    number = re.search(r"\d+", dtype)
    return 8 if number is None else int(number.group())  # BOOL
