"""The usable samples of all datasets, and how often each comes (design: data.md 10, 11)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.faults import Listed, read_quarantine
from internvlx_jax.data.index import SizeIndex, frame_tokens
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.sources import Source, origin_of

_FRAMES = 3  # first word of the seeds, beside those of plan.py


class SampleTable(NamedTuple):
    """The usable samples of all datasets, one dataset after the other; int32[n] each.

    Attributes:
        dataset: number of the sample's dataset.
        position: of its record in the source.
        tiles: its tiles; those of a video are the frames that it has been given.
        length: its tokens.
        supervised: its supervised tokens.
        images: its images, or the frames of a video.
        off_tiles: its tiles under the tile rule `off`.
    """

    dataset: np.ndarray
    position: np.ndarray
    tiles: np.ndarray
    length: np.ndarray
    supervised: np.ndarray
    images: np.ndarray
    off_tiles: np.ndarray


_COLUMNS = ("tiles", "length", "supervised", "images", "off_tiles")


def make_table(
    entries: Sequence[DatasetEntry],
    sources: Sequence[Source],
    indexes: Sequence[SizeIndex],
    processors: Sequence[Processor],
    config: DataConfig,
    seed: int,
) -> SampleTable:
    """Returns the samples that are not bad and not excluded, videos with their frames drawn.

    Raises:
        ConfigError: a quarantine file of data.faults.exclude cannot be read.
    """
    excluded = read_quarantine(config.faults.exclude)
    used: set[Listed] = set()
    tables = []
    for number, (entry, source, index, processor) in enumerate(
        zip(entries, sources, indexes, processors, strict=True)
    ):
        origin = origin_of(source, entry)
        here = {sample for sample in excluded if sample.is_of(entry.name, origin)}
        used |= here
        left_out = [sample.line for sample in here]
        usable = (index.status == 0) & ~np.isin(source.lines[: len(index)], left_out)
        position = np.flatnonzero(usable).astype(np.int32)
        columns = {name: getattr(index, name)[position].astype(np.int32) for name in _COLUMNS}
        if index.frames[position].any():
            generator = np.random.default_rng((seed, _FRAMES, number))
            _draw_frames(columns, index, position, processor, config, generator)
        dataset = np.full(len(position), number, np.int32)
        tables.append(SampleTable(dataset, position, **columns))
    if excluded - used:
        warnings.warn(
            f"data.faults.exclude: {len(excluded - used)} of {len(excluded)} listed samples are of "
            f"annotations that this meta file does not name, such as {_place(excluded - used)}.",
            stacklevel=2,
        )
    return SampleTable(*(np.concatenate(column) for column in zip(*tables, strict=True)))


def _place(samples: set[Listed]) -> str:
    sample = min(samples, key=lambda each: (each.dataset, each.line))
    return f"{sample.origin.annotation if sample.origin else sample.dataset} line {sample.line}"


def _draw_frames(
    columns: dict[str, np.ndarray],
    index: SizeIndex,
    position: np.ndarray,
    processor: Processor,
    config: DataConfig,
    generator: np.random.Generator,
) -> None:
    """Adds the frames of every video but its first, which the index counts already."""
    video = config.video
    available = index.frames[position].astype(np.int64)
    # Drawn for all records, so that excluding one does not change the frames of the others.
    drawn = generator.integers(video.min_frames, video.max_frames + 1, len(index))[position]
    frames = np.where(available > 0, np.minimum(drawn, available), 1)
    columns["length"] += frame_tokens(processor, video.template, video.max_frames)[frames - 1]
    for name in ("tiles", "images", "off_tiles"):
        columns[name] += frames - 1


def mixture_rates(
    mixture: str, entries: Sequence[DatasetEntry], counts: Sequence[int] | np.ndarray
) -> list[Fraction]:
    """Returns for each dataset how often each of its samples comes per epoch.

    Args:
        mixture: `repeat`, `weight` or `sqrt`; see `DataConfig`.
        entries: the datasets.
        counts: usable samples of each.

    Raises:
        ConfigError: the mixture is `weight`, and a dataset has none.
    """
    if mixture == "repeat":
        return [Fraction(max(1, int(entry.repeat_time))) for entry in entries]
    weights = []
    for entry, count in zip(entries, counts, strict=True):
        if mixture == "weight" and entry.weight is None:
            raise ConfigError(
                f'dataset "{entry.name}" has no "weight" in the meta file; data.mixture = weight '
                "needs one for each"
            )
        weight = entry.weight if mixture == "weight" and entry.weight else count**0.5
        weights.append(weight if count else 0)
    total = sum(counts)
    return [
        Fraction(float(total * weight / sum(weights) / count)).limit_denominator(10**6)
        if count
        else Fraction(0)
        for weight, count in zip(weights, counts, strict=True)
    ]
