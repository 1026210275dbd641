"""Meta file -> batches in a seeded, resumable order (design: data.md 11 to 17).

The order is a plan over global steps, so the position in the data is the step number: a restart
asks for the steps from there on. Every process computes the same plan and decodes only its own
rows.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.data.batch import Batch, Row, collate, join_rows
from internvlx_jax.data.buckets import Bucket, Capacity, SlotCosts
from internvlx_jax.data.faults import Fault, FaultCounts, replacements
from internvlx_jax.data.image_fetcher import NOTHING, Ahead, Fetched, open_cache
from internvlx_jax.data.index import load_index
from internvlx_jax.data.meta import read_meta
from internvlx_jax.data.opening_sources import open_sources, sample_capacity
from internvlx_jax.data.order import Position, make_order
from internvlx_jax.data.plan import PlannedStep, Sample, digest
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.read_ahead import read_ahead
from internvlx_jax.data.reader import ReadSample, SampleReader
from internvlx_jax.data.sources import origin_of
from internvlx_jax.data.table import make_table

_REPLACE = 4  # first word of the seeds, beside those of plan.py and table.py


class StepCounts(NamedTuple):
    """What one global step holds as planned.

    Attributes:
        samples, tokens, supervised, tiles, images: real quantities, padding excluded.
        masked_rows: rows without a sample.
        slots, tile_slots: token and tile slots, padding included.
    """

    samples: int
    tokens: int
    supervised: int
    tiles: int
    images: int
    masked_rows: int
    slots: int
    tile_slots: int


class LoadedStep(NamedTuple):
    """This process's rows of one global step.

    Attributes:
        bucket: shape of the step.
        batch: the rows.
        sample_ids: "dataset:line" of the samples in the rows, replacements included.
        counts: quantities of all rows of all processes.
        shapes: int64[n, 2], tokens and tiles of each sample of all processes, as planned.
        read: samples of each dataset that this process has read.
        faults: what was wrong with some of them.
        fetched: what this process has read of images behind URLs since the step before.
    """

    bucket: Bucket
    batch: Batch
    sample_ids: tuple[str, ...]
    counts: StepCounts
    shapes: np.ndarray
    read: dict[str, int]
    faults: tuple[Fault, ...]
    fetched: Fetched = Fetched()


class Loader:
    """The steps of a run over one meta file.

    Args:
        meta: path of the meta file.
        config: settings of the pipeline.
        processor: how the model reads samples.
        row_quantum: the rows of every step are a multiple of it.
        seed: seed of the run.
        process_index: which share of the rows of a step is read here.
        process_count: number of shares.
        epochs: number of epochs after which the plan ends; None: it never ends.
        costs: work of the model's slots, which decides the buckets of a new run.
        state: what `state` returned before, for a resumed run.
        progress: whether to show the making of a size index.
        refresh: whether images that a size index knows are looked at again; None: unless the run is
            resumed (`state`), which keeps the index that it began with.

    Attributes:
        entries, sources, processors, indexes: one per dataset.
        table: the usable samples.
        code: int32[samples], number of each sample's bucket.
        plan: the order of the samples.
        parts, plan_hash: identity of the plan.
        index_faults: bad samples found by the indexes.
        faults: bad samples found while reading.
        fetched: what has been read of images behind URLs.

    Raises:
        ConfigError: the settings do not fit the data, or no sample can be used.
        SampleError: the first bad sample, when data.faults.on_bad is `fail`.
    """

    def __init__(
        self,
        meta: str,
        config: DataConfig,
        processor: Processor,
        *,
        row_quantum: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        epochs: int | None = None,
        costs: SlotCosts = SlotCosts(),
        state: Mapping[str, Any] | None = None,
        progress: bool = False,
        refresh: bool | None = None,
    ):
        if row_quantum % process_count:
            raise ConfigError(
                f"{process_count} processes cannot share steps of a multiple of {row_quantum} rows "
                "evenly; raise mesh.data or mesh.fsdp so that each process has rows of its own"
            )
        self.config, self.seed, self.row_quantum = config, seed, row_quantum
        self.process_index, self.process_count = process_index, process_count
        self.entries = read_meta(meta)
        cache = open_cache(config.cache)
        self.sources = open_sources(self.entries, cache)
        self.processors = [processor.for_dataset(entry) for entry in self.entries]
        capacity = sample_capacity(config)
        self.indexes = [
            load_index(
                source,
                entry,
                processor,
                config,
                capacity,
                progress=progress,
                refresh=not state if refresh is None else refresh,
            )
            for source, entry, processor in zip(
                self.sources, self.entries, self.processors, strict=True
            )
        ]
        self.faults = self._fault_counts()
        self.index_faults = self._index_faults()
        self.table = make_table(
            self.entries, self.sources, self.indexes, self.processors, config, seed
        )
        if not len(self.table.length):
            found = self.index_faults.summary()
            found = f" that can be used ({found}){self.index_faults.examples()}" if found else ""
            raise ConfigError(f"{meta}: the meta file names no samples{found}")
        self.reader = SampleReader(
            self.sources, self.entries, self.processors, config, capacity, seed, cache
        )
        self.fetched = Fetched()
        order = make_order(
            config,
            self.entries,
            self.sources,
            self.processors,
            self.table,
            row_quantum=row_quantum,
            seed=seed,
            epochs=epochs,
            costs=costs,
            state=state or {},
        )
        self.plan, self.code, self.parts = order.plan, order.code, order.parts
        self.costs = order.costs
        self.plan_hash = digest(self.parts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "indexes": ()}  # a worker needs only the table

    @property
    def _packed(self) -> bool:
        return self.config.batch_mode == "pack"

    @property
    def _names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    @property
    def _saved_per_tile(self) -> int:
        return self.processors[0].saved_per_tile

    def _fault_counts(self) -> FaultCounts:
        origins = {
            entry.name: origin_of(source, entry)
            for source, entry in zip(self.sources, self.entries, strict=True)
        }
        return FaultCounts(self._names, self.config.faults, origins)

    def _index_faults(self) -> FaultCounts:
        """Counts the bad samples of the indexes.

        Raises:
            ConfigError: too large a share of a dataset is bad.
        """
        counts = self._fault_counts()
        for source, name, index in zip(self.sources, self._names, self.indexes, strict=True):
            faults = [
                Fault(name, int(source.lines[position]), error.reason, error)
                for position, error in index.bad
            ]
            counts.add({name: len(index)}, faults)
        counts.judge(counts.totals())
        return counts

    # --- reading ----------------------------------------------------------------------------------

    def load(self, planned: PlannedStep) -> LoadedStep:
        """Decodes this process's rows of a step."""
        here = len(planned.rows) // self.process_count
        first = self.process_index * here
        rows: list[Row | None] = []
        names: list[str] = []
        read: Counter[str] = Counter()
        faults: list[Fault] = []
        ahead = self._fetch_ahead(planned.rows[first : first + here])
        for number in range(first, first + here):
            found = [
                self._read(planned, number, place, read, faults, ahead)
                for place in range(len(planned.rows[number]))
            ]
            samples = [sample for sample in found if sample is not None]
            if len(samples) > 1:
                rows.append(join_rows([sample.row for sample in samples]))
            else:
                rows.append(samples[0].row if samples else None)
            names += [sample.name for sample in samples]
        processor, numbers = self.processors[0], planned.samples
        batch = collate(
            rows,
            planned.bucket,
            tile_size=processor.tiles.tile_size,
            tokens_per_tile=processor.tokens_per_tile,
            pad_id=processor.tokenizer.pad_id,
            lvtc=processor.lvtc,
        )
        shapes = np.stack([self.table.length[numbers], self.table.tiles[numbers]], axis=1)
        return LoadedStep(
            planned.bucket,
            batch,
            tuple(names),
            self.counts(planned),
            shapes,
            dict(read),
            tuple(faults),
            self.reader.images.take_counts(),
        )

    def _fetch_ahead(self, rows: Sequence[Sequence[Sample]]) -> Ahead:
        """Asks for what the samples of these rows need of remote files, all of it at once."""
        numbers = [sample.sample for row in rows for sample in row]
        return self.reader.fetch_ahead(
            [(int(self.table.dataset[n]), int(self.table.position[n])) for n in numbers]
        )

    def _read(
        self,
        planned: PlannedStep,
        row: int,
        place: int,
        read: Counter[str],
        faults: list[Fault],
        ahead: Ahead,
    ) -> ReadSample | None:
        """Returns the sample of one place of the plan or its replacement; None leaves it empty."""
        wanted = planned.rows[row][place]
        capacity = self._capacity(wanted, planned.bucket)
        found = self.read_sample(wanted, capacity, read, faults, ahead)
        if found is None and self.config.faults.on_bad == "replace":
            generator = np.random.default_rng((self.seed, _REPLACE, planned.number, row, place))
            for sample in self._replacements(wanted.sample, generator):
                found = self.read_sample(Sample(sample, wanted.cycle), capacity, read, faults)
                if found is not None:
                    break
        return found

    def read_sample(
        self,
        wanted: Sample,
        capacity: Capacity,
        read: Counter[str],
        faults: list[Fault],
        ahead: Ahead = NOTHING,
    ) -> ReadSample | None:
        """Reads one sample.

        Args:
            wanted: the sample of the table.
            capacity: what the row has free for it.
            read: counts it under the name of its dataset.
            faults: what is wrong with it is appended.
            ahead: what has been asked for.

        Returns:
            The sample; None when it is bad.
        """
        number = wanted.sample
        dataset, position = int(self.table.dataset[number]), int(self.table.position[number])
        name, line = self.entries[dataset].name, int(self.sources[dataset].lines[position])
        read[name] += 1
        try:
            found = self.reader.read(
                dataset,
                position,
                cycle=wanted.cycle,
                tiles=int(self.table.tiles[number]),
                capacity=capacity,
                ahead=ahead,
            )
        except SampleError as error:
            faults.append(Fault(name, line, error.reason, error))
            return None
        faults += [Fault(name, line, reason, None) for reason in found.counted]
        return found

    def _capacity(self, wanted: Sample, bucket: Bucket) -> Capacity:
        """Returns a row of the bucket, or in a packed row what the plan counts for the sample."""
        if not self._packed:
            return bucket.capacity
        length, tiles = int(self.table.length[wanted.sample]), int(self.table.tiles[wanted.sample])
        return Capacity(length, tiles, length - tiles * self._saved_per_tile)

    def _replacements(self, sample: int, generator: np.random.Generator) -> list[int]:
        """Returns samples that fit in place of `sample`.

        They are of its bucket; in a packed row, of about its shape.
        """
        fits = self.code == self.code[sample]
        if self._packed:
            tiles, length = self.table.tiles, self.table.length
            short = length - tiles * self._saved_per_tile
            fits = (tiles <= tiles[sample]) & (length <= length[sample]) & (short <= short[sample])
            near = length > length[sample] - self.config.length_step
            near &= fits & (tiles == tiles[sample])
            fits = near if near.sum() > 1 else fits
        fits[sample] = False
        same = fits & (self.table.dataset == self.table.dataset[sample])
        return replacements(generator, np.flatnonzero(same), np.flatnonzero(fits))

    def counts(self, planned: PlannedStep) -> StepCounts:
        """Returns what a step holds if none of its samples is bad."""
        samples, table, rows = planned.samples, self.table, len(planned.rows)
        return StepCounts(
            samples=len(samples),
            tokens=int(table.length[samples].sum()),
            supervised=int(table.supervised[samples].sum()),
            tiles=int(table.tiles[samples].sum()),
            images=int(table.images[samples].sum()),
            masked_rows=sum(not row for row in planned.rows),
            slots=rows * planned.bucket.length,
            tile_slots=rows * planned.bucket.tiles,
        )

    def planned_ids(self, step: int) -> list[list[str]]:
        """Returns "dataset:line" of the planned samples in each row of a step, of all processes."""

        def name(sample: int) -> str:
            dataset, position = int(self.table.dataset[sample]), int(self.table.position[sample])
            return f"{self.entries[dataset].name}:{self.sources[dataset].lines[position]}"

        return [[name(sample.sample) for sample in row] for row in self.plan.step(step).rows]

    def list_bad_samples(self, quarantine: Path) -> None:
        """Starts logging bad samples to a file; the first process logs those of the indexes."""
        if self.process_index == 0:
            self.index_faults.list_in(quarantine)
        self.faults.list_in(quarantine)

    # --- iteration --------------------------------------------------------------------------------

    def position(self, step: int) -> Position:
        """Returns where the run is before `step`: less than a kilobyte, however large the data."""
        epoch = self.plan.epoch_of(step)
        return Position(
            self.plan_hash,
            self.parts,
            epoch,
            step,
            self.row_quantum,
            self.plan.streams[0].before(epoch) if self._packed else None,
            self.costs,
        )

    def state(self, step: int) -> dict[str, Any]:
        """Returns the position before `step` as the JSON object that checkpoints hold."""
        return self.position(step).to_json()

    def steps(self, start: int, stop: int) -> Generator[LoadedStep, None, None]:
        """Yields the steps start .. stop - 1 of the run, loaded ahead of their use.

        Threads load them, or `data.num_workers` processes, which end with the iterator. Faults are
        counted when their step is taken.

        Raises:
            SampleError: a sample is bad, and data.faults.on_bad is `fail`.
        """
        if start >= stop:
            return
        self.plan.epoch_of(start)  # workers need not search for it
        steps = read_ahead(self.plan, self.load, start, stop, self.config.num_workers)
        with contextlib.closing(steps):
            for loaded in steps:
                self.faults.add(loaded.read, loaded.faults)
                self.fetched += loaded.fetched
                yield loaded
