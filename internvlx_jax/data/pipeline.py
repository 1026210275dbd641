"""Meta file -> batches in a seeded, resumable order (design: data.md 11 to 17).

The order is a plan over global steps, so the position in the data is the step number: a restart asks for the steps
from there on. Every process computes the same plan and decodes only its own rows.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.data.batch import Batch, Row, collate, join_rows
from internvlx_jax.data.faults import Fault, FaultCounts, read_quarantine, replacements
from internvlx_jax.data.fit import Room
from internvlx_jax.data.index import frame_tokens, load_index
from internvlx_jax.data.meta import DatasetEntry, read_meta
from internvlx_jax.data.plan import (
    BatchRule,
    Bucket,
    EntryStream,
    PackedStream,
    Plan,
    PlannedStep,
    Sample,
    assign_buckets,
    digest,
    generator_probe,
    round_up,
)
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.reader import ReadSample, SampleReader
from internvlx_jax.data.sources import Source, open_source

PREFETCHED_STEPS = 4
STATE_VERSION = 2
PACK_SPARE = 1.05  # tile slots (and short layout) of a packed row against the average need: tokens should fill it

# First words of the seeds, beside those of plan.py.
_FRAMES, _REPLACE = 3, 4


class StepCounts(NamedTuple):
    """Real, not padded, quantities of one global step as planned; `slots` and `tile_slots` count padding too."""

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
        bucket: the shape of the step.
        sample_ids: "dataset:line" of the samples in the rows, replacements included.
        counts, shapes: of all rows of all processes; int64[n, 2]: tokens and tiles of each sample as planned.
        read, faults: samples read of each dataset by this process, and what was wrong with some of them.
    """

    bucket: Bucket
    batch: Batch
    sample_ids: tuple[str, ...]
    counts: StepCounts
    shapes: np.ndarray
    read: dict[str, int]
    faults: tuple[Fault, ...]


class SampleTable(NamedTuple):
    """The usable samples of all datasets, one after the other: int64[n] each.

    Attributes:
        dataset, position: where a sample is.
        tiles, length, supervised, images, off_tiles: its shape, that of a video with the frames it has been given.
    """

    dataset: np.ndarray
    position: np.ndarray
    tiles: np.ndarray
    length: np.ndarray
    supervised: np.ndarray
    images: np.ndarray
    off_tiles: np.ndarray


class Loader:
    """The steps of a run over one meta file.

    Attributes:
        entries, indexes: the datasets and their size indexes.
        table, plan, plan_hash: the samples, their order, and its identity.
        index_faults, faults: bad samples found by the indexes, and while reading.

    row_quantum: rows of every step are a multiple of it; process_index, process_count: which share of them is read
    here. epochs: the plan ends after so many; None: it never ends. state: what `state` returned, for a resumed run.
    progress: show the making of an index.
    Raises ConfigError and, when data.faults.on_bad is `fail`, the first SampleError.
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
        state: Mapping[str, Any] | None = None,
        progress: bool = False,
    ):
        if row_quantum % process_count:
            raise ConfigError(
                f"{process_count} processes cannot share steps of a multiple of {row_quantum} rows evenly; "
                "raise mesh.data or mesh.fsdp so that each process has rows of its own"
            )
        self.config, self.seed, self.row_quantum = config, seed, row_quantum
        self.process_index, self.process_count = process_index, process_count
        self.entries = read_meta(meta)
        names = [entry.name for entry in self.entries]
        self.sources = [_open(entry, config) for entry in self.entries]
        self.processors = [processor.for_dataset(entry) for entry in self.entries]
        packed = config.batch_mode == "pack"
        room = Room(config.max_length, config.pack.tiles if packed else None)
        self.indexes = [
            load_index(source, entry, processor, config, room, progress=progress)
            for source, entry, processor in zip(self.sources, self.entries, self.processors)
        ]
        self.index_faults = FaultCounts(names, config.faults)
        self.faults = FaultCounts(names, config.faults)
        for source, name, index in zip(self.sources, names, self.indexes):
            self.index_faults.add(
                {name: len(index)},
                [
                    Fault(name, int(source.lines[position]), error.reason, error)
                    for position, error in index.bad
                ],
            )
        self.index_faults.judge(self.index_faults.totals())
        self.table = self._table()
        if not len(self.table.length):
            raise ConfigError(
                f"{meta}: the meta file names no samples"
                + (
                    f" that can be used ({self.index_faults.summary()})"
                    if self.index_faults.reasons
                    else ""
                )
            )
        self.reader = SampleReader(self.sources, self.entries, self.processors, config, room, seed)

        tokens = None if config.batch_mode == "samples" else config.tokens_per_step
        rule = BatchRule(
            row_quantum=row_quantum,
            tokens=tokens,
            tiles=config.tiles_per_step,
            samples=config.samples_per_step if config.batch_mode == "samples" else None,
        )
        if packed:
            buckets = [_packed_bucket(config, self.table, processor.saved_per_tile)]
            self.code = np.zeros(len(self.table.length), np.int64)
        else:
            buckets, self.code = assign_buckets(
                self.table.tiles,
                self.table.length,
                config.max_executables,
                config.length_step,
                processor.saved_per_tile,
            )
        rates = mixture_rates(
            config.mixture, self.entries, np.bincount(self.table.dataset, minlength=len(names))
        )
        streams = [
            EntryStream(seed, code, _members(self.table.dataset, self.code == code), rates)
            for code in range(len(buckets))
        ]
        state = state or {}
        if packed:
            streams = [
                PackedStream(
                    streams[0],
                    self.table.tiles,
                    self.table.length,
                    bucket=buckets[0],
                    open_rows=config.pack.open_rows,
                    saved_per_tile=processor.saved_per_tile,
                    known=(state.get("epoch", 0), state.get("rows_before", 0)),
                )
            ]
        rows = [rule.rows(bucket) for bucket in buckets]
        self.plan = Plan(
            buckets, rows, streams, seed=seed, epochs=epochs, near=state.get("epoch", 0)
        )
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
            for p in self.processors
        ]
        self.parts = {
            "samples": digest(names, [source.content_key for source in self.sources], *self.table),
            "tokenizer, template or tiling": digest(text, config.video),
            "batching": digest(buckets, rows, config.batch_mode, config.pack if packed else None),
            "seed or mixture": digest(seed, rates, generator_probe()),
        }
        self.plan_hash = digest(self.parts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "indexes": ()}  # a worker reads the table alone

    def _table(self) -> SampleTable:
        excluded = read_quarantine(self.config.faults.exclude)
        tables = []
        for number, (entry, source, index) in enumerate(
            zip(self.entries, self.sources, self.indexes)
        ):
            left_out = [line for name, line in excluded if name == entry.name]
            position = np.flatnonzero(
                (index.status == 0) & ~np.isin(source.lines[: len(index)], left_out)
            )
            columns = {
                name: getattr(index, name)[position].astype(np.int64)
                for name in ("tiles", "length", "supervised", "images", "off_tiles")
            }
            available = index.frames[position].astype(np.int64)
            video = self.config.video
            if available.any():
                generator = np.random.default_rng((self.seed, _FRAMES, number))
                drawn = generator.integers(video.min_frames, video.max_frames + 1, len(index))[
                    position
                ]
                frames = np.where(available > 0, np.minimum(drawn, available), 1)
                tokens = frame_tokens(self.processors[number], video.template, video.max_frames)
                columns["length"] += tokens[frames - 1]
                for name in ("tiles", "images", "off_tiles"):
                    columns[name] += frames - 1
            tables.append(SampleTable(np.full(len(position), number), position, **columns))
        return SampleTable(*(np.concatenate(column) for column in zip(*tables)))

    # --- reading --------------------------------------------------------------------------------------------------

    def load(self, planned: PlannedStep) -> LoadedStep:
        """Decode this process's rows of a step."""
        here = len(planned.rows) // self.process_count
        first = self.process_index * here
        rows: list[Row | None] = []
        names: list[str] = []
        read, faults = Counter(), []
        for number in range(first, first + here):
            found = [
                self._read(planned, number, place, read, faults)
                for place in range(len(planned.rows[number]))
            ]
            samples = [sample for sample in found if sample is not None]
            rows.append(join_rows([sample.row for sample in samples]) if samples else None)
            names += [sample.name for sample in samples]
        processor = self.processors[0]
        batch = collate(
            rows,
            planned.bucket,
            tile_size=processor.tiles.tile_size,
            tokens_per_tile=processor.tokens_per_tile,
            pad_id=processor.tokenizer.pad_id,
            lvtc=processor.lvtc,
        )
        samples = [sample.sample for row in planned.rows for sample in row]
        shapes = np.stack([self.table.length[samples], self.table.tiles[samples]], axis=1)
        return LoadedStep(
            planned.bucket,
            batch,
            tuple(names),
            self.counts(planned),
            shapes,
            dict(read),
            tuple(faults),
        )

    def _read(
        self, planned: PlannedStep, row: int, place: int, read: Counter, faults: list[Fault]
    ) -> ReadSample | None:
        """The sample of one slot of the plan, or what takes its place; None leaves it empty."""
        wanted = planned.rows[row][place]
        slot = self._room(wanted, planned.bucket)
        found = self.read_slot(wanted, slot, read, faults)
        if found is None and self.config.faults.on_bad == "replace":
            generator = np.random.default_rng((self.seed, _REPLACE, planned.number, row, place))
            for sample in self._replacements(wanted.sample, generator):
                found = self.read_slot(Sample(sample, wanted.cycle), slot, read, faults)
                if found is not None:
                    break
        return found

    def read_slot(
        self, wanted: Sample, slot: Room, read: Counter, faults: list[Fault]
    ) -> ReadSample | None:
        """One sample, counted in `read`, what is wrong with it in `faults`; None when it is bad."""
        dataset, position = (
            int(self.table.dataset[wanted.sample]),
            int(self.table.position[wanted.sample]),
        )
        name, line = self.entries[dataset].name, int(self.sources[dataset].lines[position])
        read[name] += 1
        try:
            found = self.reader.read(
                dataset,
                position,
                cycle=wanted.cycle,
                tiles=int(self.table.tiles[wanted.sample]),
                slot=slot,
            )
        except SampleError as error:
            faults.append(Fault(name, line, error.reason, error))
            return None
        faults += [Fault(name, line, reason, None) for reason in found.counted]
        return found

    def _room(self, wanted: Sample, bucket: Bucket) -> Room:
        if self.config.batch_mode != "pack":
            return Room(bucket.length, bucket.tiles, bucket.short_length)
        length, tiles = int(self.table.length[wanted.sample]), int(self.table.tiles[wanted.sample])
        return Room(length, tiles, length - tiles * self.processors[0].saved_per_tile)

    def _replacements(self, sample: int, generator: np.random.Generator) -> list[int]:
        """Samples that fit where `sample` was to be: of its bucket, in a packed row of about its shape."""
        fits = self.code == self.code[sample]
        if self.config.batch_mode == "pack":
            tiles, length = self.table.tiles, self.table.length
            short = length - tiles * self.processors[0].saved_per_tile
            fits = (tiles <= tiles[sample]) & (length <= length[sample]) & (short <= short[sample])
            near = (
                fits
                & (tiles == tiles[sample])
                & (length > length[sample] - self.config.length_step)
            )
            fits = near if near.sum() > 1 else fits
        fits[sample] = False
        same = fits & (self.table.dataset == self.table.dataset[sample])
        return replacements(generator, np.flatnonzero(same), np.flatnonzero(fits))

    def counts(self, planned: PlannedStep) -> StepCounts:
        """What a step holds if none of its samples is bad."""
        samples = [sample.sample for row in planned.rows for sample in row]
        rows = len(planned.rows)
        return StepCounts(
            len(samples),
            *(
                int(column[samples].sum())
                for column in (
                    self.table.length,
                    self.table.supervised,
                    self.table.tiles,
                    self.table.images,
                )
            ),
            sum(not row for row in planned.rows),
            rows * planned.bucket.length,
            rows * planned.bucket.tiles,
        )

    def planned_ids(self, step: int) -> list[list[str]]:
        """ "dataset:line" of the samples in each row of a step, of all processes, as planned: a bad one is replaced."""

        def name(sample: int) -> str:
            dataset = int(self.table.dataset[sample])
            return f"{self.entries[dataset].name}:{self.sources[dataset].lines[int(self.table.position[sample])]}"

        return [[name(sample.sample) for sample in row] for row in self.plan.step(step).rows]

    def list_bad_samples(self, quarantine: Path) -> None:
        """Write the bad samples to this file; those of the index belong to the first process."""
        if self.process_index == 0:
            self.index_faults.list_in(quarantine)
        self.faults.list_in(quarantine)

    # --- iteration ------------------------------------------------------------------------------------------------

    def state(self, step: int) -> dict[str, Any]:
        """The position before `step`, a few hundred bytes however large the data are."""
        epoch = self.plan.epoch_of(step)
        state = {
            "version": STATE_VERSION,
            "plan_hash": self.plan_hash,
            "parts": self.parts,
            "epoch": epoch,
            "step": step,
            "row_quantum": self.row_quantum,
        }
        if self.config.batch_mode == "pack":
            state["rows_before"] = self.plan.streams[0].before(epoch)
        return state

    def steps(self, start: int, stop: int) -> Iterator[LoadedStep]:
        """Steps start..stop-1 of the run, decoded ahead in threads, or in `num_workers` processes, which end with
        the iterator. Faults are counted as their steps are taken. Raises SampleError when they are to stop the run."""
        if start >= stop:
            return
        self.plan.epoch_of(start)  # workers need not search for it
        workers = self.config.num_workers
        dataset = grain.MapDataset.source(_PlannedSteps(self.plan, start, stop)).map(self.load)
        threads = 1 if workers else min(PREFETCHED_STEPS, os.cpu_count() or 1)
        steps = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCHED_STEPS)
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # grain's worker processes read absl flags
                flags.FLAGS.mark_as_parsed()
            steps = steps.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_start_worker
            )
        iterator = iter(steps)
        try:
            for loaded in iterator:
                self.faults.add(loaded.read, loaded.faults)
                yield loaded
        finally:
            iterator.close()


def mixture_rates(
    mixture: str, entries: Sequence[DatasetEntry], counts: Sequence[int]
) -> list[Fraction]:
    """How often each sample of a dataset comes an epoch. Raises ConfigError for a missing weight."""
    if mixture == "repeat":
        return [Fraction(max(1, int(entry.repeat_time))) for entry in entries]
    if mixture == "weight":
        for entry in entries:
            if entry.weight is None:
                raise ConfigError(
                    f'dataset "{entry.name}" has no "weight" in the meta file; data.mixture = weight needs '
                    "one for each"
                )
    weights = [
        (entry.weight if mixture == "weight" else count**0.5) if count else 0
        for entry, count in zip(entries, counts)
    ]
    total = sum(counts)
    return [
        Fraction(float(total * weight / sum(weights) / count)).limit_denominator(10**6)
        if count
        else Fraction(0)
        for weight, count in zip(weights, counts)
    ]


def _packed_bucket(config: DataConfig, table: SampleTable, saved_per_tile: int) -> Bucket:
    """The shape of a packed row. What is not given is a little more than a row full of tokens needs on average."""

    def enough(need: np.ndarray) -> int:
        average = need.sum() / table.length.sum() * config.max_length
        return max(math.ceil(PACK_SPARE * average), int(need.max()))

    tiles = config.pack.tiles or enough(table.tiles)
    if not saved_per_tile:
        return Bucket(tiles, config.max_length)
    short = round_up(enough(table.length - table.tiles * saved_per_tile), config.length_step)
    return Bucket(tiles, config.max_length, min(short, config.max_length))


def _members(dataset: np.ndarray, inside: np.ndarray) -> dict[int, np.ndarray]:
    samples = np.flatnonzero(inside)
    return {
        int(number): samples[dataset[samples] == number] for number in np.unique(dataset[samples])
    }


def _open(entry: DatasetEntry, config: DataConfig) -> Source:
    cache = config.index_dir or os.path.join(os.path.expanduser("~"), ".cache", "internvlx_jax")
    source = open_source(entry, cache)
    if entry.length not in (None, len(source)):
        warnings.warn(
            f'{source.path} has {len(source)} samples, but the meta file gives dataset "{entry.name}" the '
            f'"length" {entry.length}. The real number is used; correct the field.',
            stacklevel=2,
        )
    return source


def _start_worker(index: int, count: int) -> None:
    """Ctrl-C reaches all processes of a terminal: the parent ends its workers. A worker also ends when its parent is
    gone, however that went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class _PlannedSteps:
    """Random access to the plan, as grain wants its sources."""

    def __init__(self, plan: Plan, start: int, stop: int):
        self.plan, self.start, self.stop = plan, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> PlannedStep:
        return self.plan.step(self.start + index)
