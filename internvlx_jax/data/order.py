"""The order of a run: buckets and plan of its samples (design: data.md 11, 12, 14)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.data.buckets import (
    EARLIER_COSTS,
    BatchRule,
    Bucket,
    SlotCosts,
    assign_buckets,
    round_up,
    trim_buckets,
)
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.plan import (
    EntryStream,
    PackedStream,
    Plan,
    RowStream,
    digest,
    generator_probe,
)
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.sources import Source
from internvlx_jax.data.table import SampleTable, mixture_rates

POSITION_VERSION = 2
PLANNER = 2  # another one for another way to make buckets or rows
# Tile slots (and short slots) of a packed row against the average need: tokens should fill the row.
PACK_SPARE = 1.02
EARLIER_SPARE = 1.05  # of runs that began with an earlier version


@dataclasses.dataclass(frozen=True)
class Position:
    """Describes where a run is in its data, as a checkpoint stores it.

    Attributes:
        plan_hash: identity of the whole plan.
        parts: identity of each kind of setting that decides it, for the message when it changed.
        epoch: epoch that completes the step.
        step: the next step.
        row_quantum: rows of every step are a multiple of it.
        rows_before: rows before the epoch when packed, else None.
        costs: what the plan was made with; None: as earlier versions made it. A run goes on with
            the plan that it began with.
    """

    plan_hash: str
    parts: Mapping[str, str]
    epoch: int
    step: int
    row_quantum: int
    rows_before: int | None = None
    costs: SlotCosts | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object of a checkpoint; what is None is left out."""
        fields = {"version": POSITION_VERSION, **dataclasses.asdict(self)}
        return {name: value for name, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Order:
    """Holds the order of a run.

    Attributes:
        plan: the steps.
        code: int32[samples], number of each sample's bucket.
        parts: digest of each kind of setting that decides the plan.
        costs: see `Position`.
    """

    plan: Plan
    code: np.ndarray
    parts: Mapping[str, str]
    costs: SlotCosts | None


def make_order(
    config: DataConfig,
    entries: Sequence[DatasetEntry],
    sources: Sequence[Source],
    processors: Sequence[Processor],
    table: SampleTable,
    *,
    row_quantum: int,
    seed: int,
    epochs: int | None,
    costs: SlotCosts,
    state: Mapping[str, Any],
) -> Order:
    """Returns the order of the samples of a table.

    Args:
        config: settings of the pipeline.
        entries: settings of each dataset.
        sources: records of each dataset.
        processors: how the model reads each dataset.
        table: the usable samples.
        row_quantum: the rows of every step are a multiple of it.
        seed: seed of the run.
        epochs: number of epochs after which the plan ends; None: it never ends.
        costs: work of the slots, for a new run.
        state: the JSON object of the `Position` that a run resumes from, empty for a new run.

    Raises:
        ConfigError: the batching or the mixture does not fit the data.
    """
    saved_per_tile = processors[0].saved_per_tile
    known_costs = _known_costs(state) if state else costs
    buckets, code = _make_buckets(config, table, saved_per_tile, known_costs)
    counts = np.bincount(table.dataset, minlength=len(entries))
    rates = mixture_rates(config.mixture, entries, counts)
    epoch = state.get("epoch", 0)
    known = epoch, state.get("rows_before", 0)
    streams = _make_streams(
        config,
        table,
        buckets,
        code,
        rates,
        seed,
        saved_per_tile,
        known,
        earlier=known_costs is None,
    )
    rule = _batch_rule(config, row_quantum)
    rows = [rule.rows(bucket) for bucket in buckets]
    plan = Plan(buckets, rows, streams, seed=seed, epochs=epochs, near=epoch)
    parts = _identity(
        config, entries, sources, processors, table, plan, rates, earlier=known_costs is None
    )
    return Order(plan, code, parts, known_costs)


def _known_costs(state: Mapping[str, Any]) -> SlotCosts | None:
    """Returns the costs of a stored position; None where an earlier version stored it."""
    stored = state.get("costs")
    return None if stored is None else SlotCosts(**stored)


def _make_buckets(
    config: DataConfig, table: SampleTable, saved_per_tile: int, costs: SlotCosts | None
) -> tuple[list[Bucket], np.ndarray]:
    """Returns the buckets, and int32[samples]: the number of each sample's bucket."""
    if config.batch_mode == "pack":
        spare = EARLIER_SPARE if costs is None else PACK_SPARE
        bucket = _packed_bucket(config, table, saved_per_tile, spare)
        return [bucket], np.zeros(len(table.length), np.int32)
    buckets, code = assign_buckets(
        table.tiles,
        table.length,
        config.max_executables,
        config.length_step,
        saved_per_tile,
        EARLIER_COSTS if costs is None else costs,
    )
    if costs is not None:
        buckets = trim_buckets(buckets, code, table.tiles, table.length, saved_per_tile)
    return buckets, code


def _packed_bucket(
    config: DataConfig, table: SampleTable, saved_per_tile: int, spare: float
) -> Bucket:
    """Returns the shape of a packed row.

    What the settings leave open is a little more than a row full of tokens needs on average.
    """

    def enough(need: np.ndarray) -> int:
        average = need.sum() / table.length.sum() * config.max_length
        return max(math.ceil(spare * average), int(need.max()))

    tiles = config.pack.tiles or enough(table.tiles)
    if not saved_per_tile:
        return Bucket(tiles, config.max_length)
    short = round_up(enough(table.length - table.tiles * saved_per_tile), config.length_step)
    return Bucket(tiles, config.max_length, min(short, config.max_length))


def _batch_rule(config: DataConfig, row_quantum: int) -> BatchRule:
    by_samples = config.batch_mode == "samples"
    return BatchRule(
        row_quantum=row_quantum,
        samples=config.samples_per_step if by_samples else None,
        tokens=None if by_samples else config.tokens_per_step,
        tiles=config.tiles_per_step,
    )


def _make_streams(
    config: DataConfig,
    table: SampleTable,
    buckets: Sequence[Bucket],
    code: np.ndarray,
    rates: Sequence[Fraction],
    seed: int,
    saved_per_tile: int,
    known: tuple[int, int],
    *,
    earlier: bool,
) -> Sequence[RowStream]:
    entries = [
        EntryStream(seed, number, _members(table.dataset, code == number), rates)
        for number in range(len(buckets))
    ]
    if config.batch_mode != "pack":
        return entries
    packed = PackedStream(
        entries[0],
        table.tiles,
        table.length,
        bucket=buckets[0],
        open_rows=config.pack.open_rows,
        earlier=earlier,
        saved_per_tile=saved_per_tile,
        known=known,
    )
    return [packed]


def _members(dataset: np.ndarray, inside: np.ndarray) -> dict[int, np.ndarray]:
    """Returns for each dataset its samples where `inside` is true."""
    samples = np.flatnonzero(inside)
    numbers = dataset[samples]
    return {int(number): samples[numbers == number] for number in np.unique(numbers)}


def _identity(
    config: DataConfig,
    entries: Sequence[DatasetEntry],
    sources: Sequence[Source],
    processors: Sequence[Processor],
    table: SampleTable,
    plan: Plan,
    rates: Sequence[Fraction],
    *,
    earlier: bool,
) -> dict[str, str]:
    """Returns a digest of each kind of setting that decides the plan.

    Checkpoints hold these digests. They are taken of the repr of the records, so another name of a
    class or of a field would refuse to resume every earlier run.
    """
    text = [
        (
            p.tokenizer.fingerprint(),
            p.template,
            p.system_message,
            p.tiles,
            p.tokens_per_tile,
            p.special_text,
            p.saved_per_tile,
        )
        for p in processors
    ]
    names = [entry.name for entry in entries]
    keys = [source.content_key for source in sources]
    pack = config.pack if config.batch_mode == "pack" else None
    # Earlier versions would fill the same packed rows with other samples.
    made_by = () if earlier else (PLANNER,)
    return {
        "samples": digest(names, keys, *table),
        "tokenizer, template or tiling": digest(text, config.video),
        "batching": digest(plan.buckets, plan.rows, config.batch_mode, pack, *made_by),
        "seed or mixture": digest(plan.seed, rates, generator_probe()),
    }
