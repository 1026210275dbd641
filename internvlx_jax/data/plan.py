"""Which samples form which global step (design: data.md 11, 12, 14). A pure function of its arguments, NumPy only.

Every global step has exactly one bucket, so all hosts run the same executable; the number of hosts does not enter.

Each bucket has an endless stream of rows, epoch after epoch, and every B of them are a step: what an epoch leaves over
is the beginning of the next one. Where epoch and step meet follows from counts, so a restart computes one epoch or two,
however far the run is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.packing import best_fit

LENGTH_STEP = 128
TILE_COST = 256  # token slots that cost what a tile slot costs: 724 GFLOP of tower against 3.4 a token at 2B
TILE_BUCKETS = (
    0,
    1,
    *range(3, 14),
    16,
    24,
)  # one image of at most 12 tiles has 1, 3, ..., 13 with thumbnail

# First words of the seeds, so that no two kinds of draws share a generator.
_CYCLE, _EPOCH, _STEPS = 0, 1, 2

_LOCK = threading.RLock()  # loader threads share a plan


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A static shape: `tiles` tile slots and `length` token slots a row; with LVTC, `short_length` slots of the short
    frame (else 0)."""

    tiles: int
    length: int
    short_length: int = 0

    @property
    def cost(self) -> int:
        """Work of a row, in token slots."""
        return self.length + TILE_COST * self.tiles

    def union(self, other: Bucket) -> Bucket:
        return Bucket(
            max(self.tiles, other.tiles),
            max(self.length, other.length),
            max(self.short_length, other.short_length),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRule:
    """How many rows a bucket has: `samples`, or as many as keep a step near `tokens` token slots (and at most
    `tiles` tile slots); always a multiple of `row_quantum` = data-parallel size * accumulation."""

    row_quantum: int
    samples: int | None = None
    tokens: int | None = None
    tiles: int | None = None

    def rows(self, bucket: Bucket) -> int:
        if self.samples is not None:
            if self.samples % self.row_quantum:
                raise ConfigError(
                    f"data.samples_per_step {self.samples} is not a multiple of {self.row_quantum} "
                    "(data-parallel devices * compute.accumulation)"
                )
            return self.samples
        groups = max(1, self.tokens // (bucket.length * self.row_quantum))
        if self.tiles is not None and bucket.tiles:
            groups = max(1, min(groups, self.tiles // (bucket.tiles * self.row_quantum)))
        return groups * self.row_quantum


class Sample(NamedTuple):
    """A place in the stream: a sample, and how many times it has come before."""

    sample: int
    cycle: int


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """One global step: its bucket and the samples of each row, none for a masked row."""

    number: int
    bucket: Bucket
    rows: tuple[tuple[Sample, ...], ...]


# --- buckets ------------------------------------------------------------------------------------------------------


def smallest_bucket(
    tiles: int, length: int, length_step: int = LENGTH_STEP, saved_per_tile: int = 0
) -> Bucket:
    """The bucket of one sample on its own; lengths are multiples of `length_step`.

    saved_per_tile: slots by which LVTC makes a tile shorter in the short layout. The short length is that of the fewest
    tiles which have these tile slots, so that it follows from the other two.
    """
    if tiles <= TILE_BUCKETS[-1]:
        slots = next(slots for slots in TILE_BUCKETS if tiles <= slots)
        fewest = TILE_BUCKETS[TILE_BUCKETS.index(slots) - 1] + 1 if slots else 0
    else:
        slots = -(-tiles // 8) * 8
        fewest = slots - 7
    bucket = Bucket(slots, round_up(length, length_step))
    if not saved_per_tile:
        return bucket
    return dataclasses.replace(
        bucket, short_length=round_up(bucket.length - fewest * saved_per_tile, length_step)
    )


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def assign_buckets(
    tiles: np.ndarray,
    lengths: np.ndarray,
    max_executables: int,
    length_step: int = LENGTH_STEP,
    saved_per_tile: int = 0,
) -> tuple[list[Bucket], np.ndarray]:
    """Buckets in order, and the position in them of every sample's bucket, from its tile count and token length.

    tiles, lengths: int[n] -> int64[n]; saved_per_tile: see `smallest_bucket`. The rarest bucket merges into
    the cheapest union until `max_executables` remain.
    """
    pairs, inverse, frequency = np.unique(
        np.stack([np.asarray(tiles), round_up(np.asarray(lengths), length_step)], axis=1),
        axis=0,
        return_inverse=True,
        return_counts=True,
    )
    smallest = [smallest_bucket(*pair, length_step, saved_per_tile) for pair in pairs.tolist()]
    counts = Counter()
    for bucket, count in zip(smallest, frequency.tolist()):
        counts[bucket] += count
    members = {
        bucket: [bucket] for bucket in counts
    }  # the smallest buckets behind each one that remains
    while len(counts) > max_executables:
        rarest = min(counts, key=lambda bucket: (counts[bucket], bucket))
        rows = counts.pop(rarest)

        def padding(other: Bucket) -> tuple[int, Bucket]:
            union = rarest.union(other)
            return rows * (union.cost - rarest.cost) + counts[other] * (
                union.cost - other.cost
            ), other

        partner = min(counts, key=padding)
        union = rarest.union(
            partner
        )  # a new bucket or one of the two: merging with a third would have been cheaper
        counts[union] = rows + counts.pop(partner)
        members[union] = members.pop(rarest) + members.pop(partner)
    buckets = sorted(counts)
    code = {old: buckets.index(bucket) for bucket, olds in members.items() for old in olds}
    return buckets, np.array([code[bucket] for bucket in smallest], np.int64)[inverse.reshape(-1)]


# --- streams of rows ----------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of samples, ragged: row r holds the entries start[r] .. start[r + 1] - 1.

    sample, cycle: int64[m]; start: int64[rows + 1]
    """

    sample: np.ndarray
    cycle: np.ndarray
    start: np.ndarray

    def slice(self, low: int, high: int) -> Rows:
        start = self.start[low : high + 1]
        return Rows(
            self.sample[start[0] : start[-1]], self.cycle[start[0] : start[-1]], start - start[0]
        )

    def row(self, index: int) -> tuple[Sample, ...]:
        entries = slice(self.start[index], self.start[index + 1])
        return tuple(map(Sample, self.sample[entries].tolist(), self.cycle[entries].tolist()))

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        offsets = np.cumsum([0, *(part.start[-1] for part in parts)])
        start = [part.start[:-1] + offset for part, offset in zip(parts, offsets)]
        return Rows(
            np.concatenate([part.sample for part in parts]),
            np.concatenate([part.cycle for part in parts]),
            np.concatenate([*start, offsets[-1:]]),
        )


class RowStream(Protocol):
    """The rows of one bucket, epoch after epoch without end."""

    def before(self, epoch: int) -> int:
        """Rows of all earlier epochs."""

    def rows(self, epoch: int) -> Rows:
        """The rows of one epoch."""


class EntryStream:
    """Samples of one bucket, one a row. Every dataset gives its `rate` of its samples an epoch, each of its samples
    equally often: it goes through them in a new order every time (a cycle), and an epoch ends wherever it ends.

    members: for each dataset, the samples of this bucket; rates: how often each comes an epoch.
    """

    def __init__(
        self, seed: int, code: int, members: dict[int, np.ndarray], rates: Sequence[Fraction]
    ):
        self.seed, self.code, self.members, self.rates = seed, code, members, rates

    def before(self, epoch: int) -> int:
        return sum(self._taken(dataset, epoch) for dataset in self.members)

    def _taken(self, dataset: int, epoch: int) -> int:
        return math.floor(epoch * self.rates[dataset] * len(self.members[dataset]))

    def rows(self, epoch: int) -> Rows:
        parts = [
            self._span(dataset, self._taken(dataset, epoch), self._taken(dataset, epoch + 1))
            for dataset in self.members
        ]
        sample, cycle = (np.concatenate(column) for column in zip(*parts))
        order = _generator(self.seed, _EPOCH, epoch, self.code).permutation(len(sample))
        return Rows(sample[order], cycle[order], np.arange(len(sample) + 1))

    def _span(self, dataset: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples and cycles of the positions low .. high - 1 of a dataset's endless order."""
        members = self.members[dataset]
        samples, cycles = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for cycle in range(low // len(members), -(-high // len(members))):
            order = _generator(self.seed, _CYCLE, cycle, self.code, dataset).permutation(
                len(members)
            )
            first = cycle * len(members)
            samples.append(members[order[max(0, low - first) : high - first]])
            cycles.append(np.full(len(samples[-1]), cycle))
        return np.concatenate(samples), np.concatenate(cycles)


class PackedStream:
    """The same with several samples a row. How many rows an epoch has is known once it is packed.

    `saved_per_tile`: see `smallest_bucket`; rows then also fit the short layout. `known` is an epoch and the rows before
    it, from which a resumed run counts on.
    """

    def __init__(
        self,
        entries: EntryStream,
        tiles: np.ndarray,
        lengths: np.ndarray,
        *,
        bucket: Bucket,
        open_rows: int,
        saved_per_tile: int = 0,
        known: tuple[int, int] = (0, 0),
    ):
        self.entries, self.tiles, self.lengths, self.saved_per_tile = (
            entries,
            tiles,
            lengths,
            saved_per_tile,
        )
        self.bucket, self.open_rows = bucket, open_rows
        self._before = {0: 0} | dict([known])
        self._packed: dict[int, Rows] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": {}}  # a worker packs the epochs that it needs

    def before(self, epoch: int) -> int:
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
        with _LOCK:
            if epoch not in self._packed:
                self._packed = dict(list(self._packed.items())[-1:]) | {epoch: self._pack(epoch)}
            return self._packed[epoch]

    def _pack(self, epoch: int) -> Rows:
        entries = self.entries.rows(epoch)
        tiles, lengths = self.tiles[entries.sample], self.lengths[entries.sample]
        also = [(tiles, self.bucket.tiles)]
        if self.saved_per_tile:
            also.append((lengths - tiles * self.saved_per_tile, self.bucket.short_length))
        row = best_fit(lengths, self.bucket.length, also=also, open_rows=self.open_rows)
        order = np.argsort(row, kind="stable")
        start = np.concatenate([[0], np.cumsum(np.bincount(row))])
        return Rows(entries.sample[order], entries.cycle[order], start)


def _generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- steps --------------------------------------------------------------------------------------------------------


class Plan:
    """All steps of a run.

    Attributes:
        buckets, rows: the shapes, and the rows of a step of each.
        epochs: after so many the remainders follow as steps with masked rows and the plan ends; None: it never ends.

    `near` is an epoch to look for steps from: that of a resumed run.
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
        """Number of steps, None without end."""
        if self.epochs is None:
            return None
        return self.first_step(self.epochs) + len(self._remainders())

    def first_step(self, epoch: int) -> int:
        """Steps of all earlier epochs."""
        return sum(stream.before(epoch) // rows for stream, rows in zip(self.streams, self.rows))

    def epoch_of(self, step: int) -> int:
        """The epoch that completes a step; `epochs` for the remainders at the end."""
        epoch = self._near if self.first_step(self._near) <= step else 0
        while (self.epochs is None or epoch < self.epochs) and self.first_step(epoch + 1) <= step:
            epoch += 1
        self._near = epoch
        return epoch

    def step(self, number: int) -> PlannedStep:
        with _LOCK:
            epoch = self.epoch_of(number)
            if epoch not in self._steps:
                self._steps = dict(list(self._steps.items())[-1:]) | {
                    epoch: self._epoch_steps(epoch)
                }
            steps = self._steps[epoch]
        code, first = steps.places[number - self.first_step(epoch)]
        rows = steps.rows[code]
        found = [
            rows.row(row) for row in range(first, min(first + self.rows[code], len(rows.start) - 1))
        ]
        return PlannedStep(
            number, self.buckets[code], (*found, *[()] * (self.rows[code] - len(found)))
        )

    def _epoch_steps(self, epoch: int) -> _EpochSteps:
        if epoch == self.epochs:
            return self._remainder_steps()
        rows, places = [], []
        for code, (stream, size) in enumerate(zip(self.streams, self.rows)):
            low, high = stream.before(epoch) // size * size, stream.before(epoch + 1) // size * size
            rows.append(_span(stream, low, high, epoch))
            places += [(code, first) for first in range(0, high - low, size)]
        order = _generator(self.seed, _STEPS, epoch).permutation(len(places))
        return _EpochSteps(rows, [places[place] for place in order])

    def _remainders(self) -> list[int]:
        return [
            code
            for code, (stream, size) in enumerate(zip(self.streams, self.rows))
            if stream.before(self.epochs) % size
        ]

    def _remainder_steps(self) -> _EpochSteps:
        rows = []
        for stream, size in zip(self.streams, self.rows):
            count = stream.before(self.epochs)
            rows.append(_span(stream, count // size * size, count, self.epochs - 1))
        return _EpochSteps(rows, [(code, 0) for code in self._remainders()])


class _EpochSteps(NamedTuple):
    """Rows of each bucket, and of every step in order its bucket and its first row there."""

    rows: list[Rows]
    places: list[tuple[int, int]]


def _span(stream: RowStream, low: int, high: int, epoch: int) -> Rows:
    """Rows low .. high - 1 of a stream; `epoch` is the one that holds the last of them."""
    parts = []
    while low < high:
        first = stream.before(epoch)
        if first < high:
            parts.insert(0, stream.rows(epoch).slice(max(0, low - first), high - first))
            high = max(low, first)
        epoch -= 1
    return (
        Rows.join(parts)
        if parts
        else Rows(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64))
    )


def digest(*parts: object) -> str:
    """16 hexadecimal digits; arrays count with their content."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return sha.hexdigest()[:16]


def generator_probe() -> int:
    """Differs when this NumPy would draw other orders from the same seeds."""
    return int(_generator(0).permutation(1024)[0]) * 1024 + int(_generator(0).permutation(1024)[-1])
