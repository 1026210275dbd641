"""Size index: the shape of every sample, known without decoding a pixel (design: data.md 10).

The index of a source lies beside it (or in `data.index_dir`). Its name is a hash of all that
decides it: the records, the tokenizer, the template, the tiling, the capacity. Reading image
headers is slow, so their sizes are kept apart by chunks of records: an interrupted scan goes on,
and another tokenizer does not repeat it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import REASONS, SampleError
from internvlx_jax.core.files import written_aside
from internvlx_jax.core.paths import STORES, RemotePath, as_path
from internvlx_jax.core.remote import protocol_of
from internvlx_jax.data.buckets import Capacity
from internvlx_jax.data.conversations import ChatSample, Size
from internvlx_jax.data.fit import CHANGES, fit_sample, supervised_tokens
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.sources import Source, cache_name, read_sample
from internvlx_jax.data.video import frame_separator, list_frames, with_frames

VERSION = 1
CHUNK = 1024  # records between two saves of a header scan; so many encoded images are in memory
THREADS = 32  # headers are waited for, not computed


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
        bad: (position, error) of the bad samples.
    """

    status: np.ndarray
    change: np.ndarray
    tiles: np.ndarray
    length: np.ndarray
    supervised: np.ndarray
    images: np.ndarray
    off_tiles: np.ndarray
    frames: np.ndarray
    bad: tuple[tuple[int, SampleError], ...]

    def __len__(self) -> int:
        return len(self.status)

    @property
    def reasons(self) -> Counter[str]:
        """Returns the number of bad samples by reason."""
        return Counter(error.reason for _, error in self.bad)

    def save(self, path: Path) -> None:
        """Writes the index as a compressed .npz file."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        bad = json.dumps([(position, *error.args) for position, error in self.bad])
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, bad=np.frombuffer(bad.encode(), np.uint8), **arrays)

    @classmethod
    def load(cls, path: Path) -> SizeIndex:
        """Reads what `save` wrote."""
        with path.open("rb") as file, np.load(file) as stored:
            bad = json.loads(stored["bad"].tobytes())
            return cls(
                **{name: stored[name] for name in _ARRAYS},
                bad=tuple((position, SampleError(*error)) for position, *error in bad),
            )


# Columns and their types.
_ARRAYS = {
    "status": np.uint8,
    "change": np.uint8,
    "tiles": np.int32,
    "length": np.int32,
    "supervised": np.int32,
    "images": np.int32,
    "off_tiles": np.int32,
    "frames": np.int32,
}


def frame_tokens(processor: Processor, template: str, max_frames: int) -> np.ndarray:
    """Returns int32[max_frames]: tokens that 1, 2, ... frames have more than one frame."""
    separators = [
        len(processor.tokenizer.encode(frame_separator(template, number)))
        + 2
        + processor.tokens_per_tile
        for number in range(2, max_frames + 1)
    ]
    return np.cumsum([0, *separators], dtype=np.int32)


def load_index(
    source: Source,
    entry: DatasetEntry,
    processor: Processor,
    config: DataConfig,
    capacity: Capacity,
    *,
    progress: bool = False,
) -> SizeIndex:
    """Returns the cached index of a source, or makes one and caches it.

    A folder that cannot be written to is a warning.

    Args:
        source: the records.
        entry: settings of the dataset.
        processor: how the model reads the dataset.
        config: settings of the pipeline.
        capacity: bounds under which the samples are encoded.
        progress: whether to show a progress bar.
    """
    count = len(source) if entry.repeat_time >= 1 else int(len(source) * entry.repeat_time)
    folder = as_path(config.index_dir) if config.index_dir else _beside(source)
    name = cache_name(source)
    sizes_key = _digest(
        VERSION, source.content_key, entry.root, dataclasses.astuple(processor.images)
    )
    path = folder / f"{name}.index-{_index_key(sizes_key, count, processor, config, capacity)}.npz"
    if path.is_file():
        return SizeIndex.load(path)
    writable = _is_writable(folder)
    if not writable:
        warnings.warn(
            f"{folder} cannot be written to, so the size index of {source.path} is made again at "
            "every start; set data.index_dir to a folder of your own.",
            stacklevel=2,
        )
    headers = folder / f"{name}.sizes-{sizes_key}" if writable else None
    index = _Builder(source, entry, processor, config, capacity, headers).build(count, progress)
    if writable:
        index.save(path)
    return index


def _beside(source: Source) -> Path:
    """Returns the folder of a source: hosts that share no disk share that of an object store."""
    if protocol_of(source.path) in STORES:
        return as_path(source.path).parent
    return Path(source.beside).parent


def _is_writable(folder: Path) -> bool:
    if isinstance(folder, RemotePath):
        probe = folder / f".{uuid.uuid4().hex}.probe"
        try:
            probe.write_bytes(b"")
            probe.unlink(missing_ok=True)
            return True
        except OSError:
            return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    except OSError:
        return False


def _index_key(
    sizes_key: str, count: int, processor: Processor, config: DataConfig, capacity: Capacity
) -> str:
    return _digest(
        sizes_key,
        count,
        processor.tokenizer.fingerprint(),
        processor.template,
        processor.system_message,
        processor.tiles,
        processor.tokens_per_tile,
        processor.special_text,
        # Earlier versions hashed a named tuple; its text keeps their index files valid.
        _Verbatim(f"Room(length={capacity.length}, tiles={capacity.tiles}, short_length=0)"),
        config.video,
    )


class _Verbatim(str):
    """A text whose repr is itself, without quotes."""

    __repr__ = str.__str__


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Makes the index of one source.

    Attributes:
        headers: folder of the sizes that image headers gave; None: they are not kept.
    """

    source: Source
    entry: DatasetEntry
    processor: Processor
    config: DataConfig
    capacity: Capacity
    headers: Path | None

    def build(self, count: int, progress: bool) -> SizeIndex:
        """Returns the index of the first `count` records."""
        rows = {name: np.zeros(count, dtype) for name, dtype in _ARRAYS.items()}
        bad: list[tuple[int, SampleError]] = []
        video = self.config.video
        tokens = frame_tokens(self.processor, video.template, video.max_frames)
        label = f"index of {self.entry.name}"
        bar = tqdm(total=count, desc=label, unit=" samples", disable=not progress)
        with ThreadPoolExecutor(THREADS) as pool, bar:
            for first in range(0, count, CHUNK):
                stop = min(count, first + CHUNK)
                samples = self._samples(range(first, stop), bad)
                cached = self.headers / f"{first // CHUNK:06d}.json" if self.headers else None
                sizes = _chunk_sizes(samples, self.processor, pool, cached)
                for position, sample in samples.items():
                    try:
                        found = self._row(sample, sizes[position], tokens)
                    except SampleError as error:
                        bad.append((position, error))
                        continue
                    for name, value in found.items():
                        rows[name][position] = value
                bar.update(stop - first)
        bad.sort(key=lambda item: item[0])
        for position, error in bad:
            rows["status"][position] = 1 + REASONS.index(error.reason)
        return SizeIndex(**rows, bad=tuple(bad))

    def _samples(
        self, positions: range, bad: list[tuple[int, SampleError]]
    ) -> dict[int, ChatSample]:
        """Returns the samples of these positions that can be read; the others go to `bad`."""
        samples: dict[int, ChatSample] = {}
        for position in positions:
            try:
                samples[position] = read_sample(self.source, self.entry, position)
            except SampleError as error:
                bad.append((position, error))
        return samples

    def _row(
        self, sample: ChatSample, sizes: list[Size] | SampleError, tokens: np.ndarray
    ) -> dict[str, int]:
        """Returns the columns of one sample; `tokens` are those of more frames than one."""
        if isinstance(sizes, SampleError):
            raise sizes
        frames, processor, capacity = 0, self.processor, self.capacity
        if sample.video is not None:
            frames = len(list_frames(sample))
            sample = with_frames(sample, [""], self.config.video.template)
            sizes, processor = [(1, 1)], processor.for_frames()
        encoded, tiles, _, change = fit_sample(processor, sample, sizes, capacity)
        if frames:
            fitting = int((tokens <= capacity.length - len(encoded.tokens)).sum())
            most = len(tokens) if capacity.tiles is None else capacity.tiles
            frames = min(frames, fitting, most)
        off = dataclasses.replace(processor, tiles=dataclasses.replace(processor.tiles, rule="off"))
        return {
            "change": CHANGES.index(change),
            "tiles": sum(tiles),
            "length": len(encoded.tokens),
            "supervised": supervised_tokens(encoded.labels),
            "images": len(tiles),
            "off_tiles": sum(off.tiles_per_image(sizes)),
            "frames": frames,
        }


# Sizes of the images of a sample by its position, or why they cannot be read.
_Sizes = dict[int, list[Size] | SampleError]


def _chunk_sizes(
    samples: dict[int, ChatSample],
    processor: Processor,
    pool: ThreadPoolExecutor,
    cached: Path | None,
) -> _Sizes:
    """Returns the sizes of the images of each sample; threads read those that are not stated."""

    def sizes_of(sample: ChatSample) -> list[Size] | SampleError:
        try:
            return processor.sizes(sample.images, sample.where, sample.sizes)
        except SampleError as error:
            return error

    stated = processor.images.trust_sizes
    unknown = {
        position: sample
        for position, sample in samples.items()
        if sample.images and not (stated and all(sample.sizes))
    }
    known: _Sizes = {
        position: sizes_of(sample)
        for position, sample in samples.items()
        if position not in unknown
    }
    if not unknown:
        return known
    scanned = _read_sizes(cached)
    # A file that could not be read may be available by now: only sizes are remembered.
    missing = {position: sample for position, sample in unknown.items() if position not in scanned}
    found = dict(zip(missing, pool.map(sizes_of, missing.values()), strict=True))
    new = {
        position: sizes for position, sizes in found.items() if not isinstance(sizes, SampleError)
    }
    if cached is not None and new:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(cached) as aside:
            aside.write_text(json.dumps(scanned | new))
    return {**known, **scanned, **found}


def _read_sizes(cached: Path | None) -> dict[int, list[Size]]:
    if cached is None or not cached.is_file():
        return {}
    stored = json.loads(cached.read_bytes())
    return {
        int(position): [(width, height) for width, height in sizes]
        for position, sizes in stored.items()
    }
