"""Size index: the shape of every sample, known without decoding a pixel (design: data.md 10).

The index of a source lies beside it (or in `data.index_dir`). Its name is a hash of all that
decides it: the records, the tokenizer, the template, the tiling, the capacity. Reading image
headers is slow, so their sizes are kept apart by chunks of records: an interrupted scan goes on,
and another tokenizer does not repeat it.

A stored index is looked through at the start of a new run: images that could not be read are tried
again, and images whose file has another size or time than before are measured again. A resumed run
keeps the index that it began with, because its order follows from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import uuid
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from internvlx_jax.core.data_config import MOST_FRAMES, DataConfig
from internvlx_jax.core.errors import REASONS, SampleError
from internvlx_jax.core.paths import STORES, RemotePath, as_path
from internvlx_jax.core.remote import protocol_of
from internvlx_jax.core.uploads import cache_folder
from internvlx_jax.data.buckets import Capacity
from internvlx_jax.data.conversations import ChatSample, Size
from internvlx_jax.data.fit import CHANGES, fit_sample, supervised_tokens
from internvlx_jax.data.header_scan import chunk_sizes
from internvlx_jax.data.index_parts import IndexParts, is_large, parts_folder, remove_parts
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.size_index import COLUMNS, SizeIndex
from internvlx_jax.data.sources import Source, cache_name, read_sample
from internvlx_jax.data.stamps import MISSING, NONE, stamp_of
from internvlx_jax.data.tiles import tile_counts
from internvlx_jax.data.video import frame_separator, list_frames, with_frames
from internvlx_jax.data.video_files import is_video_file

logger = logging.getLogger(__name__)

VERSION = 1
CHUNK = 1024  # records between two saves of a header scan; so many encoded images are in memory
THREADS = 32  # headers are waited for, not computed
# So many measured samples are looked at again when a run starts. Larger indexes are trusted,
# and an image that no longer fits is told when it is decoded.
LOOK_AGAIN = 100_000
# Reasons that another image file, or an installed decoder, may take away.
_RETRIED = ("unreadable", "too_many_pixels", "missing_decoder")
_OF_IMAGES = (*_RETRIED, "too_long", "size_mismatch")


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
    refresh: bool = True,
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
        refresh: whether images of a cached index are looked at again.
    """
    count = _count(source, entry)
    path, builder = _place(source, entry, processor, config, capacity, count)
    writable = builder.headers is not None
    stored = _stored(path)
    if stored is not None and len(stored) == count:
        index = builder.refreshed(stored) if refresh else stored
        if index is not stored and writable:
            index.save(path)
        return index
    if not writable:
        warnings.warn(
            f"{path.parent} cannot be written to, so the size index of {source.path} is made again "
            "at every start; set data.index_dir to a folder of your own.",
            stacklevel=2,
        )
    if not is_large(count):
        index = builder.build(range(count), progress)
    else:
        parts = IndexParts(builder, count, parts_folder(path) if writable else None)
        parts.make(workers=config.index_workers, progress=progress)
        index = parts.join()
    if writable:
        index.save(path)
        remove_parts(path)
    return index


def make_index_parts(
    source: Source,
    entry: DatasetEntry,
    processor: Processor,
    config: DataConfig,
    capacity: Capacity,
    *,
    process: int,
    processes: int,
    progress: bool = False,
) -> None:
    """Makes one process's share of an index that is missing, where `load_index` finds it.

    Nothing is done for a small dataset, for an index that exists, and in a folder that cannot be
    written to. Processes that share no folder make parts for themselves alone.

    Args:
        source, entry, processor, config, capacity: see `load_index`.
        process: number of this process.
        processes: number of processes that share the work.
        progress: whether to show a progress bar.
    """
    count = _count(source, entry)
    if not is_large(count):
        return
    path, builder = _place(source, entry, processor, config, capacity, count)
    if builder.headers is None or path.is_file():
        return
    parts = IndexParts(builder, count, parts_folder(path))
    parts.make(process, processes, workers=config.index_workers, progress=progress)


def _count(source: Source, entry: DatasetEntry) -> int:
    return len(source) if entry.repeat_time >= 1 else int(len(source) * entry.repeat_time)


def _place(
    source: Source,
    entry: DatasetEntry,
    processor: Processor,
    config: DataConfig,
    capacity: Capacity,
    count: int,
) -> tuple[Path, _Builder]:
    """Returns the path of an index, and what makes it; it keeps nothing if it cannot be written."""
    folder = as_path(config.index_dir) if config.index_dir else _beside(source)
    name = cache_name(source)
    sizes_key = _digest(
        VERSION, source.content_key, entry.root, dataclasses.astuple(processor.images)
    )
    path = folder / f"{name}.index-{_index_key(sizes_key, count, processor, config, capacity)}.npz"
    headers = folder / f"{name}.headers-{sizes_key}" if _is_writable(folder) else None
    return path, _Builder(source, entry, processor, config, capacity, headers)


def _beside(source: Source) -> Path:
    """Returns the folder of a source: hosts that share no disk share that of an object store."""
    protocol = protocol_of(source.path)
    if protocol in STORES:
        return as_path(source.path).parent
    if protocol:
        return cache_folder() / "indexes"
    return Path(source.beside).parent


def _stored(path: Path) -> SizeIndex | None:
    """Returns a cached index; None without one, and for a file that is damaged."""
    if not path.is_file():
        return None
    try:
        return SizeIndex.load(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        warnings.warn(
            f"{path} is damaged ({type(error).__name__}), so the size index is made again.",
            stacklevel=3,
        )
        return None


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

    @property
    def name(self) -> str:
        """Returns what the index is called where its progress is shown."""
        return f"index of {self.entry.name}"

    def build(self, positions: range, progress: bool = False) -> SizeIndex:
        """Returns the rows of the index for a range of records."""
        rows = {name: np.zeros(len(positions), dtype) for name, dtype in COLUMNS.items()}
        return self._filled(rows, [], positions, progress, first=positions.start)

    def refreshed(self, index: SizeIndex) -> SizeIndex:
        """Returns the index with what has changed measured again; the same one if nothing has."""
        changed = self._changed(index)
        if not changed:
            return index
        rows = {name: getattr(index, name).copy() for name in COLUMNS}
        for column in rows.values():
            column[changed] = 0
        known = [item for item in index.bad if item[0] not in set(changed)]
        new = self._filled(rows, known, changed, progress=False)
        same = all(np.array_equal(getattr(new, name), getattr(index, name)) for name in COLUMNS)
        if same:
            return index
        logger.info(f"{self.source.path}: {len(changed):,} samples measured again")
        return new

    def _changed(self, index: SizeIndex) -> list[int]:
        """Returns the samples whose images may be other ones than those that were measured."""
        bad = {position: error.reason for position, error in index.bad}
        again = [position for position, reason in bad.items() if reason in _OF_IMAGES]
        measured = np.flatnonzero((index.stamp != NONE) & (index.status == 0)).tolist()
        if len(measured) <= LOOK_AGAIN:
            again += measured

        def differs(position: int) -> bool:
            try:
                stamp = stamp_of(read_sample(self.source, self.entry, position))
            except SampleError:
                return False
            if stamp != index.stamp[position]:
                # Without a stamp the sizes are those of the annotation, or of version 0.1.
                return index.stamp[position] != NONE or position in bad
            return bad.get(position) in _RETRIED and stamp != MISSING

        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(differs, again))
        return sorted(position for position, other in zip(again, found, strict=True) if other)

    def _filled(
        self,
        rows: dict[str, np.ndarray],
        bad: list[tuple[int, SampleError]],
        positions: Sequence[int],
        progress: bool,
        first: int = 0,
    ) -> SizeIndex:
        """Returns the index with the columns of some samples computed, in place.

        The first element of the columns is that of the record `first`.
        """
        video = self.config.video
        tokens = frame_tokens(self.processor, video.template, video.max_frames)
        bar = tqdm(total=len(positions), desc=self.name, unit=" samples", disable=not progress)
        with ThreadPoolExecutor(THREADS) as pool, bar:
            for chunk, members in _by_chunk(positions):
                samples = self._samples(members, bad)
                cached = self.headers / f"{chunk:06d}.json" if self.headers else None
                sizes, stamps = chunk_sizes(samples, self.processor, pool, cached)
                for position, sample in samples.items():
                    rows["stamp"][position - first] = stamps.get(position, NONE)
                    try:
                        found = self._row(sample, sizes[position], tokens)
                    except SampleError as error:
                        bad.append((position, error))
                        continue
                    for name, value in found.items():
                        rows[name][position - first] = value
                bar.update(len(members))
        bad.sort(key=lambda item: item[0])
        for position, error in bad:
            rows["status"][position - first] = 1 + REASONS.index(error.reason)
        return SizeIndex(**rows, bad=tuple(bad))

    def _samples(
        self, positions: Iterable[int], bad: list[tuple[int, SampleError]]
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
            # A file has as many frames as are asked for: its last one is repeated.
            frames = MOST_FRAMES if _is_file(sample) else len(list_frames(sample))
            sample = with_frames(sample, [""], self.config.video.template)
            sizes, processor = [(1, 1)], processor.for_frames()
        encoded, tiles, _, change = fit_sample(processor, sample, sizes, capacity)
        if frames:
            fitting = int((tokens <= capacity.length - len(encoded.tokens)).sum())
            most = len(tokens) if capacity.tiles is None else capacity.tiles
            frames = min(frames, fitting, most)
        off = dataclasses.replace(processor.tiles, rule="off")
        return {
            "change": CHANGES.index(change),
            "tiles": sum(tiles),
            "length": len(encoded.tokens),
            "supervised": supervised_tokens(encoded.labels),
            "images": len(tiles),
            "off_tiles": sum(tile_counts(off, sizes)),
            "frames": frames,
        }


def _is_file(sample: ChatSample) -> bool:
    return isinstance(sample.video, str) and is_video_file(sample.video)


def _by_chunk(positions: Sequence[int]) -> Iterable[tuple[int, list[int]]]:
    """Returns (number of the chunk, its positions) of positions in ascending order."""
    if isinstance(positions, range):  # they begin with a chunk, and need not be listed at once
        return (
            (first // CHUNK, list(range(first, min(first + CHUNK, positions.stop))))
            for first in range(positions.start, positions.stop, CHUNK)
        )
    chunks: dict[int, list[int]] = defaultdict(list)
    for position in positions:
        chunks[position // CHUNK].append(position)
    return chunks.items()
