"""What a meta file holds, without a model: a table and histograms (design: data.md 18)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.files import write_json
from internvlx_jax.core.json_text import decode_json, shorten
from internvlx_jax.data.buckets import Capacity, SlotCosts
from internvlx_jax.data.conversations import KNOWN_FIELDS
from internvlx_jax.data.faults import Fault
from internvlx_jax.data.fit import CHANGES
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.plan import Sample
from internvlx_jax.data.processor import Processor

LENGTH_BIN = 128  # tokens, of the length histogram
SHOWN = 10  # bad samples of a dataset that the table shows; check.json has all of them


@dataclasses.dataclass(frozen=True)
class TokenLengths:
    """Token lengths of the samples of a dataset."""

    mean: float
    largest: int


@dataclasses.dataclass(frozen=True)
class Savings:
    """What the tile rule saves against the rule `off`: numbers, and shares of what `off` takes."""

    tiles_saved: int
    tile_share_saved: float
    tokens_saved: int
    token_share_saved: float


@dataclasses.dataclass(frozen=True)
class BadSample:
    """Names a bad sample: its record from 1, its reason, and what is wrong with it where."""

    line: int
    reason: str
    error: str


@dataclasses.dataclass(frozen=True)
class DatasetCheck:
    """Describes one dataset.

    Attributes:
        records: records of its source that are used.
        samples: usable samples.
        images: their images.
        tiles: number of samples by their number of tiles.
        lengths: number of samples by token length, rounded down to a multiple of LENGTH_BIN.
        tokens: their token lengths.
        supervised_tokens: tokens to learn from.
        made_to_fit: number of samples by what was done to make them fit.
        off: what the tile rule saves.
        bad: number of faults by reason.
        bad_samples: the bad samples, in the order in which they were found.
        unknown_fields: number of records by field that nothing reads.
    """

    records: int
    samples: int
    images: int
    tiles: dict[str, int]
    lengths: dict[str, int]
    tokens: TokenLengths
    supervised_tokens: int
    made_to_fit: dict[str, int]
    off: Savings
    bad: dict[str, int]
    bad_samples: tuple[BadSample, ...]
    unknown_fields: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Padding:
    """Describes one epoch of a batching mode: shares of padded slots, executables, steps."""

    padded_tokens: float
    padded_tiles: float
    executables: int
    steps: int


@dataclasses.dataclass(frozen=True)
class BucketRows:
    """Describes a bucket and the rows of its steps."""

    tiles: int
    length: int
    short_length: int
    rows: int


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What `check` finds.

    Attributes:
        datasets: by name.
        padding: for `bucket` and `pack`, whatever data.batch_mode is.
        buckets: those of data.batch_mode.
    """

    datasets: Mapping[str, DatasetCheck]
    padding: Mapping[str, Padding]
    buckets: tuple[BucketRows, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the object of check.json."""
        return dataclasses.asdict(self) | {"buckets": list(map(dataclasses.asdict, self.buckets))}

    def save(self, folder: Path) -> Path:
        """Writes the whole report, with the histograms, to check.json and returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "check.json", self.to_json())
        return folder / "check.json"


def check(
    meta: str,
    config: DataConfig,
    processor: Processor,
    *,
    row_quantum: int = 1,
    costs: SlotCosts = SlotCosts(),
    decode: bool = False,
) -> CheckReport:
    """Examines the datasets of a meta file.

    Args:
        meta: path of the meta file.
        config: settings of the pipeline; bad samples never end the check.
        processor: how the model reads samples.
        row_quantum: the rows of every step are a multiple of it.
        costs: work of the model's slots.
        decode: whether every image is opened and decoded too, so that damaged ones are counted.

    Returns:
        The report. Padding is that of one epoch, for rows of buckets and for packed rows alike.

    Raises:
        ConfigError: the meta file or a setting cannot be used.
    """
    faults = dataclasses.replace(config.faults, on_bad="skip", max_share=1.0)
    config = dataclasses.replace(config, faults=faults)

    def load(batch_mode: Any) -> Loader:
        settings = dataclasses.replace(config, batch_mode=batch_mode)
        return Loader(
            meta,
            settings,
            processor,
            row_quantum=row_quantum,
            seed=0,
            epochs=1,
            costs=costs,
            progress=True,
        )

    packed = config.batch_mode == "pack"
    modes = {"bucket": load("tokens" if packed else config.batch_mode), "pack": load("pack")}
    loader = modes["pack" if packed else "bucket"]
    if decode:
        _decode_all(loader)
    return CheckReport(
        datasets={
            entry.name: _check_dataset(loader, number, processor.tokens_per_tile)
            for number, entry in enumerate(loader.entries)
        },
        padding={mode: _padding(each) for mode, each in modes.items()},
        buckets=tuple(
            BucketRows(bucket.tiles, bucket.length, bucket.short_length, rows)
            for bucket, rows in zip(loader.plan.buckets, loader.plan.rows, strict=True)
        ),
    )


def _check_dataset(loader: Loader, number: int, tokens_per_tile: int) -> DatasetCheck:
    index, table = loader.indexes[number], loader.table
    here = table.dataset == number
    tiles, length, off = table.tiles[here], table.length[here], int(table.off_tiles[here].sum())
    changes = np.bincount(index.change, minlength=len(CHANGES)).tolist()
    made_to_fit = {change: n for change, n in zip(CHANGES, changes, strict=True) if change and n}
    bad = {
        reason: count
        for faults in (loader.index_faults, loader.faults)
        for (name, reason), count in sorted(faults.reasons.items())
        if name == loader.entries[number].name
    }
    saved = off - int(tiles.sum())
    tokens_saved = saved * tokens_per_tile
    return DatasetCheck(
        records=len(index),
        samples=int(here.sum()),
        images=int(table.images[here].sum()),
        tiles=_histogram(tiles),
        lengths=_histogram(length // LENGTH_BIN * LENGTH_BIN),
        tokens=TokenLengths(
            float(length.mean()) if len(length) else 0.0, int(length.max(initial=0))
        ),
        supervised_tokens=int(table.supervised[here].sum()),
        made_to_fit=made_to_fit,
        off=Savings(
            saved,
            saved / max(1, off),
            tokens_saved,
            tokens_saved / max(1, int(length.sum()) + tokens_saved),
        ),
        bad=bad,
        bad_samples=tuple(
            BadSample(fault.line, fault.reason, str(fault.error))
            for faults in (loader.index_faults, loader.faults)
            for fault in faults.bad[loader.entries[number].name]
        ),
        unknown_fields=_unknown_fields(loader, number),
    )


def _unknown_fields(loader: Loader, number: int) -> dict[str, int]:
    """Counts the fields of records that nothing reads, most frequent first."""
    source, found = loader.sources[number], Counter[str]()
    for position in range(len(loader.indexes[number])):
        try:
            record = source.record(position)
            fields = decode_json(record) if isinstance(record, bytes) else record
        except ValueError:  # a bad sample (SampleError is one), listed as such
            continue
        if isinstance(fields, Mapping):
            found.update(shorten(str(name)) for name in fields.keys() - KNOWN_FIELDS)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _histogram(values: np.ndarray) -> dict[str, int]:
    found, counts = np.unique(values, return_counts=True)
    return {str(value): int(count) for value, count in zip(found, counts, strict=True)}


def _padding(loader: Loader) -> Padding:
    """Returns the padding of one epoch; rows that it leaves over count without masked ones."""
    plan, table = loader.plan, loader.table
    slots = tile_slots = 0
    for stream, bucket in zip(plan.streams, plan.buckets, strict=True):
        slots += stream.before(1) * bucket.length
        tile_slots += stream.before(1) * bucket.tiles
    entries = np.concatenate([stream.rows(0).sample for stream in plan.streams])
    return Padding(
        padded_tokens=1 - int(table.length[entries].sum()) / max(1, slots),
        padded_tiles=1 - int(table.tiles[entries].sum()) / max(1, tile_slots),
        executables=len(plan.buckets),
        steps=plan.total or 0,
    )


def _decode_all(loader: Loader) -> None:
    """Reads every usable sample in the way of training, so that its faults are counted."""
    whole = whole_row(loader.config)

    def read(sample: int) -> tuple[Counter[str], list[Fault]]:
        counts: Counter[str] = Counter()
        faults: list[Fault] = []
        loader.read_sample(Sample(sample, 0), whole, counts, faults)
        return counts, faults

    samples = range(len(loader.table.length))
    with ThreadPoolExecutor() as pool:
        found = pool.map(read, samples)
        for counts, faults in tqdm(found, total=len(samples), desc="decoding", unit=" samples"):
            loader.faults.add(counts, faults)


def whole_row(config: DataConfig) -> Capacity:
    """Returns the capacity of a row that holds one sample, whatever its tiles are."""
    return Capacity(config.max_length, config.max_length)


def format_check(report: CheckReport) -> str:
    """Returns the table that `internvlx data check` prints."""
    lines = []
    for name, found in report.datasets.items():
        off, tokens = found.off, found.tokens
        lines += [
            name,
            f"  samples           {found.samples:,} of {found.records:,} records, "
            f"{found.images:,} images",
            f"  tiles per sample  {_listed(found.tiles)}",
            f"  token length      mean {tokens.mean:.0f}, largest {tokens.largest}; "
            f"from each {LENGTH_BIN}: {_listed(found.lengths)}",
            f"  supervised        {found.supervised_tokens:,} tokens",
            f"  against rule off  {off.tiles_saved:,} tiles ({off.tile_share_saved:.1%}) and "
            f"{off.tokens_saved:,} tokens ({off.token_share_saved:.1%}) saved",
            f"  made to fit       {_listed(found.made_to_fit) or 'none'}",
            f"  bad samples       {_listed(found.bad) or 'none'}",
            *(_told(each) for each in found.bad_samples[:SHOWN]),
        ]
        if len(found.bad_samples) > SHOWN:
            lines.append(f"    and {len(found.bad_samples) - SHOWN:,} more, see check.json")
        if found.unknown_fields:
            lines.append(f"  unknown fields    {_listed(found.unknown_fields)}, which are not read")
    shapes = (f"{bucket.tiles}x{bucket.length}x{bucket.rows}" for bucket in report.buckets)
    lines.append("buckets (tiles x tokens x rows)  " + "  ".join(shapes))
    for mode, padding in report.padding.items():
        lines.append(
            f"{mode:<7} padded tokens {padding.padded_tokens:6.1%}  padded tiles "
            f"{padding.padded_tiles:6.1%}  executables {padding.executables}  steps per epoch "
            f"{padding.steps:,}"
        )
    return "\n".join(lines)


def _told(sample: BadSample) -> str:
    return "    " + sample.error.replace("\n", " ")


def _listed(counts: Mapping[str, int]) -> str:
    return "  ".join(f"{name}:{count}" for name, count in counts.items())
