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
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.streams import LOCK, Rows, RowStream, Sample, generator

_DIGESTED = 2**20  # elements of an array that are copied together to be digested
_STEPS = 2  # first word of the seeds, beside those of streams.py


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
