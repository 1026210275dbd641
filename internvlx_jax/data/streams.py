"""Streams of rows: the samples of a bucket, epoch after epoch without end (design: data.md 12).

How many rows all earlier epochs have follows from counts, so a restart does not go through them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.packing import best_fit, fill_rows

# First words of the seeds, so that no two kinds of draws share a generator; plan.py has the next.
_CYCLE, _EPOCH = 0, 1

LOCK = threading.RLock()  # loader threads share a plan and its streams


class Sample(NamedTuple):
    """A place in a stream.

    Attributes:
        sample: number of the sample in the table of all samples.
        cycle: how many times it has come before.
    """

    sample: int
    cycle: int


class Rows(NamedTuple):
    """Ragged rows of samples: row r holds the entries start[r] .. start[r + 1] - 1.

    Attributes:
        sample: int64[m], number of each entry's sample.
        cycle: int64[m], how many times it has come before.
        start: int64[rows + 1].
    """

    sample: np.ndarray
    cycle: np.ndarray
    start: np.ndarray

    def slice(self, low: int, high: int) -> Rows:
        """Returns the rows low .. high - 1."""
        start = self.start[low : high + 1]
        inside = slice(start[0], start[-1])
        return Rows(self.sample[inside], self.cycle[inside], start - start[0])

    def row(self, index: int) -> tuple[Sample, ...]:
        """Returns the samples of one row."""
        entries = slice(self.start[index], self.start[index + 1])
        return tuple(map(Sample, self.sample[entries].tolist(), self.cycle[entries].tolist()))

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """Returns the rows of all parts, one part after the other; no parts give no rows."""
        offsets = np.cumsum([0, *(part.start[-1] for part in parts)])
        start = [part.start[:-1] + offset for part, offset in zip(parts, offsets, strict=False)]
        nothing = np.zeros(0, np.int64)
        return Rows(
            np.concatenate([nothing, *(part.sample for part in parts)]),
            np.concatenate([nothing, *(part.cycle for part in parts)]),
            np.concatenate([*start, offsets[-1:]]),
        )


class RowStream(Protocol):
    """The rows of one bucket, epoch after epoch without end."""

    def before(self, epoch: int) -> int:
        """Returns the number of rows of all earlier epochs."""
        ...

    def rows(self, epoch: int) -> Rows:
        """Returns the rows of one epoch."""
        ...


class EntryStream:
    """The samples of one bucket, one per row.

    Every dataset gives `rate` times its samples per epoch, each of its samples equally often: the
    stream goes through them in a new order every time (a cycle), and an epoch ends wherever it
    ends.

    Args:
        seed: seed of the run.
        code: number of the bucket, which makes its order its own.
        members: for each dataset, int64[n]: its samples in this bucket.
        rates: for each dataset, how often each of its samples comes per epoch.
    """

    def __init__(
        self, seed: int, code: int, members: dict[int, np.ndarray], rates: Sequence[Fraction]
    ):
        self.seed, self.code, self.members, self.rates = seed, code, members, rates

    def before(self, epoch: int) -> int:
        """Returns the number of rows of all earlier epochs."""
        return sum(self._taken(dataset, epoch) for dataset in self.members)

    def _taken(self, dataset: int, epoch: int) -> int:
        return math.floor(epoch * self.rates[dataset] * len(self.members[dataset]))

    def rows(self, epoch: int) -> Rows:
        """Returns the rows of one epoch, datasets mixed."""
        parts = [
            self._span(dataset, self._taken(dataset, epoch), self._taken(dataset, epoch + 1))
            for dataset in self.members
        ]
        sample, cycle = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = generator(self.seed, _EPOCH, epoch, self.code).permutation(len(sample))
        return Rows(sample[order], cycle[order], np.arange(len(sample) + 1))

    def _span(self, dataset: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns samples and cycles of the positions low .. high - 1 of a dataset's order."""
        members = self.members[dataset]
        count = len(members)
        samples, cycles = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for cycle in range(low // count, -(-high // count)):
            order = generator(self.seed, _CYCLE, cycle, self.code, dataset).permutation(count)
            first = cycle * count
            samples.append(members[order[max(0, low - first) : high - first]])
            cycles.append(np.full(len(samples[-1]), cycle))
        return np.concatenate(samples), np.concatenate(cycles)


class PackedStream:
    """The samples of an `EntryStream`, several per row.

    How many rows an epoch has is known once it is packed.

    Args:
        entries: the samples in the order in which they are packed.
        tiles: int64[samples], tiles of every sample of the table.
        lengths: int64[samples], tokens of every sample of the table.
        bucket: shape of the rows.
        open_rows: samples among which a row chooses; with `earlier`, rows among which a sample
            does.
        earlier: pack by best fit, as runs do that began with an earlier version.
        saved_per_tile: see `smallest_bucket`; rows then also fit the short layout.
        known: an epoch and the rows before it, from which a resumed run counts on.
    """

    def __init__(
        self,
        entries: EntryStream,
        tiles: np.ndarray,
        lengths: np.ndarray,
        *,
        bucket: Bucket,
        open_rows: int,
        earlier: bool = False,
        saved_per_tile: int = 0,
        known: tuple[int, int] = (0, 0),
    ):
        self.entries, self.bucket = entries, bucket
        self.open_rows, self.earlier = open_rows, earlier
        self.tiles, self.lengths, self.saved_per_tile = tiles, lengths, saved_per_tile
        self._before = {0: 0} | dict([known])
        self._packed: dict[int, Rows] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": {}}  # a worker packs the epochs that it needs

    def before(self, epoch: int) -> int:
        """Returns the number of rows of all earlier epochs."""
        while epoch not in self._before:
            if epoch + 1 in self._before:
                self._before[epoch] = self._before[epoch + 1] - self._count(epoch)
            else:
                nearest = max(known for known in self._before if known < epoch)
                self._before[nearest + 1] = self._before[nearest] + self._count(nearest)
        return self._before[epoch]

    def _count(self, epoch: int) -> int:
        return len(self.rows(epoch).start) - 1

    def rows(self, epoch: int) -> Rows:
        """Returns the packed rows of one epoch; the last two epochs are kept."""
        with LOCK:
            if epoch not in self._packed:
                self._packed = dict(list(self._packed.items())[-1:]) | {epoch: self._pack(epoch)}
            return self._packed[epoch]

    def _pack(self, epoch: int) -> Rows:
        entries = self.entries.rows(epoch)
        tiles, lengths = self.tiles[entries.sample], self.lengths[entries.sample]
        row = self._row_of_each(tiles, lengths)
        order = np.argsort(row, kind="stable")
        start = np.concatenate([[0], np.cumsum(np.bincount(row))])
        return Rows(entries.sample[order], entries.cycle[order], start)

    def _row_of_each(self, tiles: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if not self.earlier:
            return fill_rows(
                lengths,
                tiles,
                self.bucket,
                waiting=self.open_rows,
                saved_per_tile=self.saved_per_tile,
            )
        also = [(tiles, self.bucket.tiles)]
        if self.saved_per_tile:
            also.append((lengths - tiles * self.saved_per_tile, self.bucket.short_length))
        return best_fit(lengths, self.bucket.length, also=also, open_rows=self.open_rows)


def generator(*seed: int) -> np.random.Generator:
    """Returns the generator of one draw of the plan."""
    return np.random.default_rng(seed)


def generator_probe() -> int:
    """Returns a number that differs when this NumPy would draw other orders from the same seeds."""
    drawn = generator(0).permutation(1024)
    return int(drawn[0]) * 1024 + int(drawn[-1])
