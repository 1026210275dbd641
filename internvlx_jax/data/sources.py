"""Where records come from: JSONL, ArrayRecord, prepared TFDS datasets (design: data.md 2 and 16).

Every source has random access by position, so that a plan can be read in any order. A source is
picklable: a copy in a worker opens its files on first use.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.json_text import BOM, shorten
from internvlx_jax.data import storage
from internvlx_jax.data.conversations import ChatSample, parse_sample
from internvlx_jax.data.faults import Origin
from internvlx_jax.data.meta import DatasetEntry

# Bytes at the end of an ArrayRecord file that are hashed: they hold its index of records.
TAIL = 2**20


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


def open_source(entry: DatasetEntry, cache: str) -> Source:
    """Opens the source of one entry of a meta file.

    Args:
        entry: settings of the dataset.
        cache: folder for copies of remote annotation files.

    Raises:
        ConfigError: the entry names no source, or the source cannot be opened.
    """
    if entry.array_record is not None:
        return ArrayRecords(entry.array_record)
    if entry.tfds is not None:
        return TfdsRecords(entry)
    if entry.annotation is None:
        raise ConfigError(f'dataset "{entry.name}" names no annotation, array_record or tfds')
    return open_annotation(entry.annotation, storage.local_copy(entry.annotation, cache))


def read_sample(source: Source, entry: DatasetEntry, position: int) -> ChatSample:
    """Reads and checks one record.

    Raises:
        SampleError: names source and line.
    """
    line = int(source.lines[position])
    where = place_of(source, line)
    try:
        record = source.record(position)
    except SampleError as error:
        raise error.at(where) from None
    return parse_sample(record, dataset=entry.name, line=line, where=where, root=entry.root)


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


class _RecordsOfFile:
    """Records at known places of a local file. Holds 24 bytes per record."""

    lines: np.ndarray  # int64[N], number of each record, from 1
    _offsets: np.ndarray  # int64[N, 2], first byte and bytes of each

    def __init__(self, path: str, local: str):
        self.path, self.beside, self._local = path, local, local

    def __len__(self) -> int:
        return len(self.lines)

    def record(self, position: int) -> bytes:
        """Returns the JSON text of a record."""
        offset, size = self._offsets[position].tolist()
        with open(self._local, "rb") as file:
            file.seek(offset)
            return file.read(size)


class JsonLines(_RecordsOfFile):
    """A JSONL file; empty lines do not count.

    Args:
        path: path or URL, for messages.
        local: path of the file or of its copy.
    """

    def __init__(self, path: str, local: str):
        super().__init__(path, local)
        digest, offset = hashlib.sha256(), 0
        lines, offsets = [], []
        with open(local, "rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.removeprefix(BOM).strip():
                    lines.append(number)
                    offsets.append((offset, len(line)))
                offset += len(line)
        self.content_key = digest.hexdigest()
        self.lines = np.array(lines, np.int64)
        self._offsets = np.array(offsets, np.int64).reshape(-1, 2)


class JsonArray(_RecordsOfFile):
    """A file that is one JSON array of records, as LLaVA writes it.

    Args:
        path: path or URL, for messages.
        local: path of the file or of its copy.

    Raises:
        ValueError: the file is no array; says what is wrong and where.
    """

    def __init__(self, path: str, local: str):
        super().__init__(path, local)
        data = Path(local).read_bytes()
        self._offsets = np.array(_elements(data), np.int64).reshape(-1, 2)
        self.content_key = hashlib.sha256(data).hexdigest()
        self.lines = np.arange(1, len(self._offsets) + 1)


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


class ArrayRecords:
    """ArrayRecord files whose records are msgpack maps.

    A map is a sample (design: data.md 2) in which images may be encoded files (bytes).

    Args:
        pattern: path of local files; it may contain `*`.
    """

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
        """
        try:
            return msgpack.unpackb(self._reader[position])
        except Exception as error:  # damaged files: errors of the reader, of msgpack, of UTF-8
            raise SampleError(
                "json",
                f"not a msgpack map ({type(error).__name__}: {shorten(str(error))}).",
                "Write the file again with internvlx_jax.data.sources.write_array_record.",
            ) from error


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
