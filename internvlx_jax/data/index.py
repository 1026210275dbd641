"""Size index: shape of every sample of a dataset, known without decoding a pixel (design: data.md 10).

The index of a source lies beside it (or in `data.index_dir`) and is named by the hash of all that decides it: the records,
the tokenizer, the template, the tiling, the room. What is slow, reading image headers, is kept apart by chunks of
records, so that an interrupted scan goes on and another tokenizer does not repeat it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import REASONS, SampleError
from internvlx_jax.core.files import written_aside
from internvlx_jax.data.conversations import ChatSample, Size
from internvlx_jax.data.fit import CHANGES, Room, fit_sample, supervised_tokens
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.sources import Source, cache_name, read_sample
from internvlx_jax.data.video import frame_separator, list_frames, with_frames

VERSION = 1
CHUNK = 1024  # records between two saves of a header scan; so many encoded images are in memory
THREADS = 32  # headers are waited for, not computed


@dataclasses.dataclass(frozen=True)
class SizeIndex:
    """One row a record of the source, in its order. A video is described with one frame.

    Attributes:
        status: uint8[n], 0 or 1 + the position of the reason in REASONS.
        change: uint8[n], position in CHANGES of what was done to make the sample fit.
        tiles, length, supervised, images: int32[n], tiles, tokens, supervised tokens and images; 0 for bad samples.
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
        return Counter(error.reason for _, error in self.bad)

    def save(self, path: Path) -> None:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        bad = json.dumps([(position, *error.args) for position, error in self.bad])
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **arrays, bad=np.frombuffer(bad.encode(), np.uint8))

    @classmethod
    def load(cls, path: Path) -> SizeIndex:
        with np.load(path) as stored:
            bad = json.loads(stored["bad"].tobytes())
            return cls(
                **{name: stored[name] for name in _ARRAYS},
                bad=tuple((position, SampleError(*error)) for position, *error in bad),
            )


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
    """int32[max_frames]: tokens that 1, 2, ... frames have more than one frame."""
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
    room: Room,
    *,
    progress: bool = False,
) -> SizeIndex:
    """The cached index, or a new one, which is then cached. A folder that cannot be written to is a warning."""
    count = len(source) if entry.repeat_time >= 1 else int(len(source) * entry.repeat_time)
    folder = Path(config.index_dir) if config.index_dir else Path(source.beside).parent
    name = cache_name(source)
    sizes_key = _digest(
        VERSION, source.content_key, entry.root, dataclasses.astuple(processor.images)
    )
    key = _digest(
        sizes_key,
        count,
        processor.tokenizer.fingerprint(),
        processor.template,
        processor.system_message,
        processor.tiles,
        processor.tokens_per_tile,
        processor.special_text,
        room,
        config.video,
    )
    path = folder / f"{name}.index-{key}.npz"
    if path.is_file():
        return SizeIndex.load(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        warnings.warn(
            f"{folder} cannot be written to, so the size index of {source.path} is made again at every start; "
            "set data.index_dir to a folder of your own.",
            stacklevel=2,
        )
    headers = folder / f"{name}.sizes-{sizes_key}" if writable else None
    index = _build(source, entry, processor, config, room, count, headers, progress)
    if writable:
        index.save(path)
    return index


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _build(
    source: Source,
    entry: DatasetEntry,
    processor: Processor,
    config: DataConfig,
    room: Room,
    count: int,
    headers: Path | None,
    progress: bool,
) -> SizeIndex:
    rows = {name: np.zeros(count, dtype) for name, dtype in _ARRAYS.items()}
    bad: list[tuple[int, SampleError]] = []
    tokens = frame_tokens(processor, config.video.template, config.video.max_frames)
    bar = tqdm(total=count, desc=f"index of {entry.name}", unit=" samples", disable=not progress)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        for first in range(0, count, CHUNK):
            samples: dict[int, ChatSample] = {}
            for position in range(first, min(count, first + CHUNK)):
                try:
                    samples[position] = read_sample(source, entry, position)
                except SampleError as error:
                    bad.append((position, error))
            cached = headers / f"{first // CHUNK:06d}.json" if headers else None
            sizes = _chunk_sizes(samples, processor, pool, cached)
            for position, sample in samples.items():
                try:
                    found = _index(sample, sizes[position], processor, config, room, tokens)
                except SampleError as error:
                    bad.append((position, error))
                else:
                    for name, value in found.items():
                        rows[name][position] = value
            bar.update(min(count, first + CHUNK) - first)
    bad.sort(key=lambda item: item[0])
    for position, error in bad:
        rows["status"][position] = 1 + REASONS.index(error.reason)
    return SizeIndex(**rows, bad=tuple(bad))


def _chunk_sizes(
    samples: dict[int, ChatSample],
    processor: Processor,
    pool: ThreadPoolExecutor,
    cached: Path | None,
) -> dict[int, list[Size] | SampleError]:
    """Sizes of the images of each sample; only those without stated ones are read, in threads."""

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
    known = {
        position: sizes_of(sample)
        for position, sample in samples.items()
        if position not in unknown
    }
    if not unknown:
        return known
    if cached is not None and cached.is_file():
        scanned = {
            int(position): [tuple(size) for size in found]
            for position, found in json.loads(cached.read_bytes()).items()
        }
    else:
        scanned = {}
    # A file that could not be read may be there by now: only sizes are remembered.
    missing = {position: sample for position, sample in unknown.items() if position not in scanned}
    found = dict(zip(missing, pool.map(sizes_of, missing.values())))
    new = {
        position: sizes for position, sizes in found.items() if not isinstance(sizes, SampleError)
    }
    if cached is not None and new:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(cached) as aside:
            aside.write_text(json.dumps(scanned | new))
    return known | scanned | found


def _index(
    sample: ChatSample,
    sizes: list[Size] | SampleError,
    processor: Processor,
    config: DataConfig,
    room: Room,
    tokens: np.ndarray,
) -> dict[str, int]:
    if isinstance(sizes, SampleError):
        raise sizes
    frames = 0
    if sample.video is not None:
        frames = len(list_frames(sample))
        sample = with_frames(sample, [""], config.video.template)
        sizes, processor = [(1, 1)], processor.for_frames()
    encoded, tiles, _, change = fit_sample(processor, sample, sizes, room)
    if frames:
        fitting = (tokens <= room.length - len(encoded.tokens)).sum()
        frames = min(frames, int(fitting), len(tokens) if room.tiles is None else room.tiles)
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
