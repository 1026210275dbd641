"""Meta file -> bucketed batches in a seeded, resumable order (spec: data.md 11, 14, 17).

The order is a plan over global steps, so the position in the data is the step number: a restart asks for the steps
from there on. Every process computes the same plan and decodes only its own rows.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import grain
from absl import flags

from internvlx_jax.data.batch import Batch, collate
from internvlx_jax.data.chat import read_chat_file
from internvlx_jax.data.config import DataConfig
from internvlx_jax.data.meta import read_meta
from internvlx_jax.data.plan import MASKED, BatchRule, PlannedStep, assign_buckets, epoch_steps, plan_hash
from internvlx_jax.data.processor import IndexedSample, Processor, index_sample, load_row
from internvlx_jax.errors import ConfigError

PREFETCHED_STEPS = 4


class StepCounts(NamedTuple):
    """Real, not padded, quantities of one global step."""

    samples: int
    tokens: int
    tiles: int
    images: int


class LoadedStep(NamedTuple):
    """This process's rows of one global step; `sample_ids` and `counts` are of all rows."""

    batch: Batch
    sample_ids: tuple[str, ...]
    counts: StepCounts


class Loader:
    """The steps of a run over one meta file.

    Raises SampleError naming file, line and remedy for the first bad sample; nothing is skipped, and what is read but
    damaged is a warning.
    """

    def __init__(self, meta: str, config: DataConfig, processor: Processor, *, row_quantum: int, seed: int,
                 process_index: int = 0, process_count: int = 1):
        if row_quantum % process_count:
            raise ConfigError(f"{process_count} processes cannot share steps of a multiple of {row_quantum} rows evenly; "
                              "raise mesh.data or mesh.fsdp so that each process has rows of its own")
        entries = read_meta(meta)
        self.num_workers = config.num_workers
        self.process_index, self.process_count = process_index, process_count
        self.processors = {entry.name: processor.for_dataset(entry) for entry in entries}
        self.samples: list[IndexedSample] = [
            index_sample(self.processors[entry.name], sample, config.max_length)
            for entry in entries for sample in read_chat_file(entry)]
        if not self.samples:
            raise ConfigError(f"{meta}: the meta file names no samples")
        tokens = config.batch_mode == "tokens"
        self.rule = BatchRule(row_quantum=row_quantum, tokens=config.tokens_per_step if tokens else None,
                              samples=None if tokens else config.samples_per_step, tiles=config.tiles_per_step)
        tile_counts = [sum(sample.tiles_per_image) for sample in self.samples]
        self.assigned = assign_buckets(tile_counts, [sample.length for sample in self.samples],
                                       config.max_executables, config.length_step, processor.saved_per_tile)
        self.buckets = sorted(set(self.assigned))
        self.seed = seed
        content = hashlib.sha256(processor.tokenizer.fingerprint().encode())
        for sample in self.samples:
            content.update(repr((sample.name, sample.sample.turns, sample.sample.system)).encode())
        self.plan_hash = plan_hash(self.assigned, self.rule, seed, content.hexdigest())
        # Buckets are fixed, so every epoch has the same number of steps.
        self.steps_per_epoch = len(self.epoch(0))

    @functools.lru_cache(maxsize=2)
    def epoch(self, epoch: int) -> list[PlannedStep]:
        return epoch_steps(self.assigned, self.rule, self.seed, epoch)

    def planned(self, step: int) -> PlannedStep:
        return self.epoch(step // self.steps_per_epoch)[step % self.steps_per_epoch]

    def load(self, planned: PlannedStep) -> LoadedStep:
        """Decode this process's rows of a step."""
        rows_here = len(planned.entries) // self.process_count
        first = self.process_index * rows_here
        rows = [None if entry == MASKED else load_row(self.processors, self.samples[entry])
                for entry in planned.entries[first : first + rows_here]]
        processor = next(iter(self.processors.values()))
        batch = collate(rows, planned.bucket, tile_size=processor.tiles.tile_size,
                        tokens_per_tile=processor.tokens_per_tile, pad_id=processor.tokenizer.pad_id,
                        lvtc=processor.lvtc)
        real = [self.samples[entry] for entry in planned.entries if entry != MASKED]
        counts = StepCounts(len(real), sum(sample.length for sample in real),
                            sum(sum(sample.tiles_per_image) for sample in real),
                            sum(len(sample.sample.images) for sample in real))
        return LoadedStep(batch, tuple(sample.name for sample in real), counts)

    def steps(self, start: int, stop: int) -> Iterator[LoadedStep]:
        """Steps start..stop-1 of the run, decoded ahead in threads, or in `num_workers` processes, which end with
        the iterator."""
        if start >= stop:
            return
        dataset = grain.MapDataset.source(_PlannedSteps(self, start, stop)).map(self.load)
        threads = 1 if self.num_workers else min(PREFETCHED_STEPS, os.cpu_count() or 1)
        steps = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCHED_STEPS))
        if self.num_workers:
            if not flags.FLAGS.is_parsed():  # grain's worker processes read absl flags
                flags.FLAGS.mark_as_parsed()
            steps = steps.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.num_workers))
        iterator = iter(steps)
        try:
            yield from iterator
        finally:
            iterator.close()


class _PlannedSteps:
    """Random access to the plan, as grain wants its sources."""

    def __init__(self, loader: Loader, start: int, stop: int):
        self.loader, self.start, self.stop = loader, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> PlannedStep:
        return self.loader.planned(self.start + index)
