"""Which samples form which global step (design: data.md 11, 12, 14).

A plan is a pure function of its arguments, in NumPy only. Every global step has exactly one bucket,
so all hosts run the same executable; the number of hosts does not enter.

Each bucket has an endless stream of rows, epoch after epoch, and every B of them are a step: what
an epoch leaves over is the beginning of the next one. The step where an epoch ends follows from
counts, so a restart computes one epoch or two, however far the run is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.packing import best_fit, fill_rows

_DIGESTED = 2**20  # elements of an array that are copied together to be digested
# First words of the seeds, so that no two kinds of draws share a generator.
_CYCLE, _EPOCH, _STEPS = 0, 1, 2

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


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """Describes one global step.

    Attributes:
        number: of the step in the run, from 0.
        bucket: shape of its rows.
        rows: samples of each row; a masked row has none.
    """

    number: int
    bucket: Bucket
    rows: tuple[tuple[Sample, ...], ...]

    @property
    def samples(self) -> list[int]:
        """Returns the numbers of the samples of all rows."""
        return [sample.sample for row in self.rows for sample in row]


class _EpochSteps(NamedTuple):
    """Rows of each bucket; of every step in order, its bucket and the first of its rows."""

    rows: list[Rows]
    places: list[tuple[int, int]]


class Plan:
    """Holds all steps of a run.

    Args:
        buckets: the shapes.
        rows: for each bucket, the rows of a step.
        streams: for each bucket, where the rows come from.
        seed: seed of the run.
        epochs: number of epochs after which the remainders follow, as steps with masked rows, and
            the plan ends; None: it never ends.
        near: epoch from which steps are searched for, that of a resumed run.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        rows: Sequence[int],
        streams: Sequence[RowStream],
        *,
        seed: int,
        epochs: int | None = None,
        near: int = 0,
    ):
        self.buckets, self.rows, self.streams = list(buckets), list(rows), list(streams)
        self.seed, self.epochs = seed, epochs
        self._near = near
        self._steps: dict[int, _EpochSteps] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_steps": {}}

    @property
    def total(self) -> int | None:
        """Returns the number of steps, None without end."""
        if self.epochs is None:
            return None
        return self.first_step(self.epochs) + len(self._remainders(self.epochs))

    def first_step(self, epoch: int) -> int:
        """Returns the number of steps of all earlier epochs."""
        return sum(stream.before(epoch) // size for stream, size in self._sized_streams())

    def epoch_of(self, step: int) -> int:
        """Returns the epoch that completes a step; `epochs` for the remainders at the end."""
        epoch = self._near if self.first_step(self._near) <= step else 0
        while (self.epochs is None or epoch < self.epochs) and self.first_step(epoch + 1) <= step:
            epoch += 1
        self._near = epoch
        return epoch

    def step(self, number: int) -> PlannedStep:
        """Returns one step of the plan."""
        with LOCK:
            epoch = self.epoch_of(number)
            if epoch not in self._steps:
                kept = dict(list(self._steps.items())[-1:])
                self._steps = kept | {epoch: self._epoch_steps(epoch)}
            steps = self._steps[epoch]
        code, first = steps.places[number - self.first_step(epoch)]
        rows, size = steps.rows[code], self.rows[code]
        found = [rows.row(row) for row in range(first, min(first + size, len(rows.start) - 1))]
        masked = [()] * (size - len(found))
        return PlannedStep(number, self.buckets[code], (*found, *masked))

    def _sized_streams(self) -> list[tuple[RowStream, int]]:
        return list(zip(self.streams, self.rows, strict=True))

    def _epoch_steps(self, epoch: int) -> _EpochSteps:
        if epoch == self.epochs:
            return self._remainder_steps(epoch)
        rows, places = [], []
        for code, (stream, size) in enumerate(self._sized_streams()):
            low, high = stream.before(epoch) // size * size, stream.before(epoch + 1) // size * size
            rows.append(_span(stream, low, high, epoch))
            places += [(code, first) for first in range(0, high - low, size)]
        order = generator(self.seed, _STEPS, epoch).permutation(len(places))
        return _EpochSteps(rows, [places[place] for place in order])

    def _remainders(self, epochs: int) -> list[int]:
        """Returns the buckets with rows left over after so many epochs."""
        streams = enumerate(self._sized_streams())
        return [code for code, (stream, size) in streams if stream.before(epochs) % size]

    def _remainder_steps(self, epochs: int) -> _EpochSteps:
        rows = []
        for stream, size in self._sized_streams():
            count = stream.before(epochs)
            rows.append(_span(stream, count // size * size, count, epochs - 1))
        return _EpochSteps(rows, [(code, 0) for code in self._remainders(epochs)])


def _span(stream: RowStream, low: int, high: int, epoch: int) -> Rows:
    """Returns the rows low .. high - 1 of a stream; `epoch` holds the last of them."""
    parts: list[Rows] = []
    while low < high:
        first = stream.before(epoch)
        if first < high:
            parts.insert(0, stream.rows(epoch).slice(max(0, low - first), high - first))
            high = max(low, first)
        epoch -= 1
    return Rows.join(parts)


def digest(*parts: object) -> str:
    """Returns 16 hexadecimal digits that identify the parts.

    Arrays count with their content, integers as int64, in whatever type they are held.
    """
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            for first in range(0, len(part), _DIGESTED):
                sha.update(part[first : first + _DIGESTED].astype(np.int64).tobytes())
        else:
            sha.update(repr(part).encode())
    return sha.hexdigest()[:16]
