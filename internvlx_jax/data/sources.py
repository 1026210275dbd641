"""Where records come from: JSONL, ArrayRecord, prepared TFDS datasets (design: data.md 2 and 16).

Every source has random access by position, so that a plan can be read in any order. A source is
picklable: a copy in a worker opens its files on first use.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.json_text import BOM, shorten
from internvlx_jax.core.local_cache import LocalCache, pin
from internvlx_jax.core.remote import StorageError
from internvlx_jax.data import storage
from internvlx_jax.data.conversations import ChatSample, parse_sample
from internvlx_jax.data.faults import Origin
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.record_places import (
    Places,
    kept_places,
    map_places,
    scan_array,
    scan_lines,
)

# Bytes at the end of an ArrayRecord file that are hashed: they hold its index of records.
TAIL = 2**20
TAILS_TOGETHER = 16


class Source(Protocol):
    """Records with random access.

    Attributes:
        path: what messages call the source.
        beside: local path that a cache may lie beside.
        content_key: changes when the records do; equal for equal content, wherever it was copied.
    """

    path: str
    beside: str
    content_key: str

    @property
    def lines(self) -> np.ndarray:
        """Returns int64[n]: the numbers by which people find the records, from 1."""
        ...

    def __len__(self) -> int:
        """Returns the number of records."""
        ...

    def record(self, position: int) -> bytes | Mapping[str, Any]:
        """Returns a sample as a JSON object or as its mapping.

        Raises:
            SampleError: the record cannot be read.
        """
        ...


def open_source(entry: DatasetEntry, cache: LocalCache) -> Source:
    """Opens the source of one entry of a meta file.

    Args:
        entry: settings of the dataset.
        cache: where copies of remote annotation files lie.

    Raises:
        ConfigError: the entry names no source, or the source cannot be opened.
    """
    if entry.array_record is not None:
        return ArrayRecords(entry.array_record)
    if entry.tfds is not None:
        return TfdsRecords(entry)
    if entry.annotation is None:
        raise ConfigError(f'dataset "{entry.name}" names no annotation, array_record or tfds')
    path = entry.annotation
    return open_annotation(path, str(cache.local_copy(path)) if storage.is_url(path) else path)


def read_sample(
    source: Source,
    entry: DatasetEntry,
    position: int,
    record: Callable[[], bytes | Mapping[str, Any]] | None = None,
) -> ChatSample:
    """Reads and checks one record.

    Args:
        source: the records.
        entry: settings of the dataset.
        position: of the record.
        record: gives the record, where it has been asked for already.

    Raises:
        SampleError: names source and line.
    """
    line = int(source.lines[position])
    where = place_of(source, line)
    try:
        found = source.record(position) if record is None else record()
    except SampleError as error:
        raise error.at(where) from None
    return parse_sample(found, dataset=entry.name, line=line, where=where, root=entry.root)


def origin_of(source: Source, entry: DatasetEntry) -> Origin:
    """Returns where the samples of a dataset come from, whatever the meta file calls it."""

    def absolute(path: str) -> str:
        return path if storage.is_url(path) else os.path.abspath(path)

    named = entry.tfds is not None  # a name is no path
    root = absolute(entry.root) if entry.root else ""
    return Origin(source.path if named else absolute(source.path), root)


def place_of(source: Source, line: int) -> str:
    """Returns the place of a record for messages, such as "receipts/train.jsonl line 41"."""
    return f"{source.path} {'line' if isinstance(source, JsonLines) else 'record'} {line}"


def open_annotation(path: str, local: str) -> JsonLines | JsonArray:
    """Opens an annotation file: JSON Lines, or one JSON array as LLaVA's files are.

    Args:
        path: path or URL, for messages.
        local: path of the file or of its copy.

    Raises:
        ConfigError: the file is UTF-16, or a .json file begins as an array and is damaged.
    """
    with open(local, "rb") as file:
        head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: UTF-16 text; save the file as UTF-8")
    if not head.removeprefix(BOM).lstrip().startswith(b"["):
        return JsonLines(path, local)
    try:
        return JsonArray(path, local)
    except ValueError as error:
        if path.endswith("jsonl"):
            return JsonLines(path, local)  # its first line is bad, as may be any other
        raise ConfigError(
            f"{path} begins as a JSON array, which is damaged: {error}; fetch or write it again"
        ) from None


_OPENED = ("_descriptor", "_pinned")  # what a worker opens itself


class _RecordsOfFile:
    """Records at known places of a local file. Holds 16 bytes per record, or maps them.

    Args:
        path: path or URL, for messages.
        local: path of the file or of its copy.
        found: places of its records.
    """

    def __init__(self, path: str, local: str, found: Places):
        self.path, self.beside, self._local = path, local, local
        self.content_key, self._kept, self._places = found.content_key, found.kept, found.places
        self._pinned = self._descriptor if path != local else None

    @functools.cached_property
    def _descriptor(self) -> int:
        """Returns the open file; a copy in the cache is not removed while it is open."""
        descriptor = os.open(self._local, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        if self.path != self._local:
            pin(descriptor)
        return descriptor

    def __getstate__(self) -> dict:
        places = None if self._kept else self._places  # a worker maps them as its parent does
        kept = {name: value for name, value in self.__dict__.items() if name not in _OPENED}
        return {**kept, "_places": places}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self._kept is not None:
            self._places = map_places(self._kept)

    @property
    def lines(self) -> np.ndarray:
        """Returns uint32[n]: the numbers of the records, from 1."""
        return self._places["line"]

    def __len__(self) -> int:
        return len(self._places)

    def record(self, position: int) -> bytes:
        """Returns the JSON text of a record."""
        start, size, _ = self._places[position].item()
        return os.pread(self._descriptor, size, start)


class JsonLines(_RecordsOfFile):
    """A JSONL file; empty lines do not count.

    Args:
        path: path or URL, for messages.
        local: path of the file or of its copy.
    """

    def __init__(self, path: str, local: str):
        super().__init__(path, local, kept_places(local, "lines", scan_lines))


class JsonArray(_RecordsOfFile):
    """A file that is one JSON array of records, as LLaVA writes it.

    Args:
        path: path or URL, for messages.
        local: path of the file or of its copy.

    Raises:
        ValueError: the file is no array; says what is wrong and where.
    """

    def __init__(self, path: str, local: str):
        super().__init__(path, local, kept_places(local, "array", scan_array))


class ArrayRecords:
    """ArrayRecord files whose records are msgpack maps.

    A map is a sample (design: data.md 2) in which images may be encoded files (bytes).

    Those behind gs:// are read by range: the library has a client of its own, which takes the
    credentials of the host.

    Args:
        pattern: path or URL of the files; it may contain `*`.
    """

    def __init__(self, pattern: str):
        self.path = pattern
        self._files = storage.matching(pattern)
        self.beside = self._files[0]
        with ThreadPoolExecutor(TAILS_TOGETHER) as pool:
            sizes = list(pool.map(storage.file_size, self._files))
            tails = pool.map(storage.read_tail, self._files, sizes, repeat(TAIL))
            digest = hashlib.sha256()
            for name, size, tail in zip(self._files, sizes, tails, strict=True):
                digest.update(repr((os.path.basename(name), size)).encode() + tail)
        self.content_key = digest.hexdigest()

    @property
    def is_remote(self) -> bool:
        """Returns whether each record is a request."""
        return storage.is_url(self.path)

    @functools.cached_property
    def _reader(self):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(self._files)

    def __getstate__(self) -> dict:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_reader", "_lines")
        }

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def lines(self) -> np.ndarray:
        """Returns int64[n]: the numbers of the records, from 1."""
        return self._lines

    @functools.cached_property
    def _lines(self) -> np.ndarray:
        return np.arange(1, len(self) + 1)

    def record(self, position: int) -> Mapping[str, Any]:
        """Returns the sample of a record.

        Raises:
            SampleError: the record is no msgpack map.
            StorageError: its object store does not answer.
        """
        try:
            packed = self._reader[position]
        except Exception as error:
            if self.is_remote and "Invalid Riegeli" not in str(error):
                raise StorageError(
                    f"{self.path} record {position + 1} cannot be read: {shorten(str(error))}"
                ) from error
            raise self._no_map(error) from error
        try:
            return msgpack.unpackb(packed)
        except Exception as error:  # damaged files: errors of the reader, of msgpack, of UTF-8
            raise self._no_map(error) from error

    @staticmethod
    def _no_map(error: Exception) -> SampleError:
        return SampleError(
            "json",
            f"not a msgpack map ({type(error).__name__}: {shorten(str(error))}).",
            "Write the file again with internvlx_jax.data.sources.write_array_record.",
        )


def write_array_record(path: str | os.PathLike, samples: Iterable[Mapping[str, Any]]) -> int:
    """Writes samples to an ArrayRecord file.

    Args:
        path: of the file.
        samples: mappings (design: data.md 2) whose images are paths or encoded files.

    Returns:
        The number of samples.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    # Groups of one record: samples are read one by one, in any order.
    writer, count = ArrayRecordWriter(os.fspath(path), "group_size:1"), 0
    try:
        for sample in samples:
            writer.write(msgpack.packb(dict(sample)))
            count += 1
    finally:
        writer.close()
    return count


class TfdsRecords:
    """A prepared TFDS dataset in ArrayRecord format, read without TensorFlow.

    Images at the top level of an example stay encoded.

    Args:
        entry: settings of the dataset.

    Raises:
        ConfigError: the dataset is not prepared, or its builder cannot be imported.
    """

    def __init__(self, entry: DatasetEntry):
        if entry.tfds is None or entry.builder is None:
            raise ConfigError(f'dataset "{entry.name}" needs "tfds" and "builder"')
        self.path = f"{entry.tfds} {entry.split}"
        self._entry, self._name = entry, entry.tfds
        module, _, function = entry.builder.partition(":")
        try:
            self._convert = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f'dataset "{entry.name}": "builder" {entry.builder} cannot be imported ({error}); '
                'give "module:function" of a module on the Python path'
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
            return tfds.builder(self._name, data_dir=self._entry.data_dir)
        except Exception as error:
            raise ConfigError(
                f'dataset "{self._entry.name}": TFDS has no {self._name} in '
                f"{self._entry.data_dir or 'its default folder'} ({error}); prepare it there with "
                'file_format="array_record"'
            ) from error

    @functools.cached_property
    def _examples(self):
        import tensorflow_datasets as tfds

        features: Any = self._builder.info.features
        images = [
            name for name, feature in features.items() if isinstance(feature, tfds.features.Image)
        ]
        decoders = {name: tfds.decode.SkipDecoding() for name in images}
        builder: Any = self._builder  # tfds has no types for the keywords of as_data_source
        return builder.as_data_source(split=self._entry.split, decoders=decoders)

    def __getstate__(self) -> dict:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_builder", "_examples", "_lines")
        }

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def lines(self) -> np.ndarray:
        """Returns int64[n]: the numbers of the examples, from 1."""
        return self._lines

    @functools.cached_property
    def _lines(self) -> np.ndarray:
        return np.arange(1, len(self) + 1)

    def record(self, position: int) -> Mapping[str, Any]:
        """Returns the sample that the builder makes of an example.

        Raises:
            SampleError: the example cannot be read, or the builder fails.
        """
        try:
            return self._convert(self._examples[position])
        except Exception as error:  # of the user's function, too
            raise SampleError(
                "json",
                f"{self._entry.builder} cannot make a sample of it ({type(error).__name__}: "
                f"{shorten(str(error))}).",
                "Correct the function, or leave the example out.",
            ) from error


def cache_name(source: Source) -> str:
    """Returns a file name for what is cached about a source."""
    return re.sub(r"[^\w.-]+", "_", os.path.basename(source.beside))
