"""Where sample records come from: JSONL files, ArrayRecord files, prepared TFDS datasets (design: data.md 2 and 16).

Every source has random access by position, so that a plan can be read in any order. A source is picklable: a copy in a
worker opens its files on first use.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.data import storage
from internvlx_jax.data.conversations import ChatSample, parse_sample
from internvlx_jax.data.meta import DatasetEntry

TAIL = (
    2**20
)  # bytes at the end of an ArrayRecord file that are hashed: they hold its index of records


class Source(Protocol):
    """Attributes:
    path: what messages call the source.
    beside: local path that a cache may lie beside.
    content_key: changes when the records do; equal for equal content, wherever and whenever it was copied.
    lines: the numbers that people find the records by, counted from 1.
    """

    path: str
    beside: str
    content_key: str
    lines: Sequence[int]

    def __len__(self) -> int: ...

    def record(self, position: int) -> bytes | Mapping[str, Any]:
        """A sample as a JSON object or as its mapping. Raises SampleError when it cannot be read."""


def open_source(entry: DatasetEntry, cache: str) -> Source:
    """The source of one entry of a meta file; `cache` is a folder for copies of remote annotation files."""
    if entry.array_record is not None:
        return ArrayRecords(entry.array_record)
    if entry.tfds is not None:
        return TfdsRecords(entry)
    return JsonLines(entry.annotation, storage.local_copy(entry.annotation, cache))


def read_sample(source: Source, entry: DatasetEntry, position: int) -> ChatSample:
    """Read and check one record. Raises SampleError naming source and line."""
    line = int(source.lines[position])
    where = f"{source.path} {'line' if isinstance(source, JsonLines) else 'record'} {line}"
    try:
        record = source.record(position)
    except SampleError as error:
        raise error.at(where) from None
    return parse_sample(record, dataset=entry.name, line=line, where=where, root=entry.root)


class JsonLines:
    """A JSONL file; empty lines do not count. Holds 24 bytes a line."""

    def __init__(self, path: str, local: str):
        self.path, self.beside, self._local = path, local, local
        digest, offset = hashlib.sha256(), 0
        lines, offsets = [], []
        with open(local, "rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    lines.append(number)
                    offsets.append((offset, len(line)))
                offset += len(line)
        self.content_key = digest.hexdigest()
        self.lines = np.array(lines, np.int64)
        self._offsets = np.array(offsets, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.lines)

    def record(self, position: int) -> bytes:
        offset, size = self._offsets[position].tolist()
        with open(self._local, "rb") as file:
            file.seek(offset)
            return file.read(size)


class ArrayRecords:
    """ArrayRecord files whose records are msgpack maps: a sample in which images may be encoded files (bytes)."""

    def __init__(self, pattern: str):
        self.path = pattern
        self._files = storage.matching(pattern)
        self.beside = self._files[0]
        digest = hashlib.sha256()
        for name in self._files:
            size = os.path.getsize(name)
            with open(name, "rb") as file:
                file.seek(max(0, size - TAIL))
                digest.update(repr((os.path.basename(name), size)).encode() + file.read())
        self.content_key = digest.hexdigest()

    @functools.cached_property
    def _reader(self):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(self._files)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def lines(self) -> range:
        return range(1, len(self) + 1)

    def record(self, position: int) -> Mapping[str, Any]:
        try:
            return msgpack.unpackb(self._reader[position])
        except Exception as error:  # damaged files: errors of the reader, of msgpack, of UTF-8
            raise SampleError(
                "json",
                f"not a msgpack map ({type(error).__name__}: {error}).",
                "Write the file again with internvlx_jax.data.sources.write_array_record.",
            ) from error


def write_array_record(path: str | os.PathLike, samples: Iterable[Mapping[str, Any]]) -> int:
    """Samples (design: data.md 2) whose images are paths or encoded files, to an ArrayRecord file -> their number."""
    from array_record.python.array_record_module import ArrayRecordWriter

    # Groups of one record: samples are read one by one, in any order.
    writer, count = ArrayRecordWriter(os.fspath(path), "group_size:1"), 0
    try:
        for count, sample in enumerate(samples, start=1):
            writer.write(msgpack.packb(dict(sample)))
    finally:
        writer.close()
    return count


class TfdsRecords:
    """A prepared TFDS dataset in ArrayRecord format, read without TensorFlow. Images stay encoded."""

    def __init__(self, entry: DatasetEntry):
        self.path = f"{entry.tfds} {entry.split}"
        self._entry = entry
        module, _, function = entry.builder.partition(":")
        try:
            self._convert = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f'dataset "{entry.name}": "builder" {entry.builder} cannot be imported ({error}); give '
                '"module:function" of a module on the Python path'
            ) from error
        folder = Path(self._builder.data_dir)
        self.beside = str(folder / entry.split)
        digest = hashlib.sha256(inspect.getsource(self._convert).encode())
        for name in ("dataset_info.json", "features.json"):
            digest.update((folder / name).read_bytes())
        self.content_key = hashlib.sha256(digest.digest() + entry.split.encode()).hexdigest()

    @functools.cached_property
    def _builder(self):
        import tensorflow_datasets as tfds

        try:
            return tfds.builder(self._entry.tfds, data_dir=self._entry.data_dir)
        except Exception as error:
            raise ConfigError(
                f'dataset "{self._entry.name}": TFDS has no {self._entry.tfds} in '
                f"{self._entry.data_dir or 'its default folder'} ({error}); prepare it there with "
                'file_format="array_record"'
            ) from error

    @functools.cached_property
    def _examples(self):
        import tensorflow_datasets as tfds

        images = [
            name
            for name, feature in self._builder.info.features.items()
            if isinstance(feature, tfds.features.Image)
        ]
        decoders = {name: tfds.decode.SkipDecoding() for name in images}
        return self._builder.as_data_source(split=self._entry.split, decoders=decoders)

    def __getstate__(self) -> dict:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_builder", "_examples")
        }

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def lines(self) -> range:
        return range(1, len(self) + 1)

    def record(self, position: int) -> Mapping[str, Any]:
        try:
            return self._convert(self._examples[position])
        except Exception as error:  # of the user's function, too
            raise SampleError(
                "json",
                f"{self._entry.builder} cannot make a sample of it ({type(error).__name__}: "
                f"{error}).",
                "Correct the function, or leave the example out.",
            ) from error


def cache_name(source: Source) -> str:
    """A file name for what is cached about a source."""
    return re.sub(r"[^\w.-]+", "_", os.path.basename(source.beside))
