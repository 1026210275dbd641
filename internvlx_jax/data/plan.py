"""Bucket mode: which samples form which step (spec: data.md 11). A pure function of its arguments, NumPy only.

Every global step has exactly one bucket, so all hosts run the same executable; the number of hosts does not enter.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter

import numpy as np

from internvlx_jax.errors import ConfigError

LENGTH_STEP = 128
TILE_COST = 256  # token slots that cost what a tile slot costs: 724 GFLOP of tower against 3.4 a token at 2B
TILE_BUCKETS = (0, 1, 3, 4, 5, 6, 7, 8, 12, 16, 24)  # one image of at most 6 tiles has 1, 3, ..., 7 with thumbnail
MASKED = -1


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
        return Bucket(max(self.tiles, other.tiles), max(self.length, other.length),
                      max(self.short_length, other.short_length))


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
                raise ConfigError(f"data.samples_per_step {self.samples} is not a multiple of {self.row_quantum} "
                                  "(data-parallel devices * compute.accumulation)")
            return self.samples
        groups = max(1, self.tokens // (bucket.length * self.row_quantum))
        if self.tiles is not None and bucket.tiles:
            groups = max(1, min(groups, self.tiles // (bucket.tiles * self.row_quantum)))
        return groups * self.row_quantum


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """One global step: its bucket and, for each row, an entry of the epoch or MASKED."""

    bucket: Bucket
    entries: tuple[int, ...]


def smallest_bucket(tiles: int, length: int, length_step: int = LENGTH_STEP, saved_per_tile: int = 0) -> Bucket:
    """The bucket of one sample on its own; lengths are multiples of `length_step`.

    saved_per_tile: slots by which LVTC makes a tile shorter in the short frame. The short length is that of the fewest
    tiles which have these tile slots, so that it follows from the other two.
    """
    if tiles <= TILE_BUCKETS[-1]:
        slots = next(slots for slots in TILE_BUCKETS if tiles <= slots)
        fewest = TILE_BUCKETS[TILE_BUCKETS.index(slots) - 1] + 1 if slots else 0
    else:
        slots = -(-tiles // 8) * 8
        fewest = slots - 7
    bucket = Bucket(slots, _round_up(length, length_step))
    if not saved_per_tile:
        return bucket
    return dataclasses.replace(bucket, short_length=_round_up(bucket.length - fewest * saved_per_tile, length_step))


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def assign_buckets(tiles: np.ndarray, lengths: np.ndarray, max_executables: int,
                   length_step: int = LENGTH_STEP, saved_per_tile: int = 0) -> list[Bucket]:
    """The bucket of every sample, from its tile count and token length.

    tiles, lengths: int[n]; saved_per_tile: see `smallest_bucket`. The rarest bucket merges into the cheapest union until `max_executables` remain.
    """
    smallest = [smallest_bucket(int(t), int(n), length_step, saved_per_tile) for t, n in zip(tiles, lengths)]
    counts = Counter(smallest)
    members = {bucket: [bucket] for bucket in counts}  # the smallest buckets behind each one that remains
    while len(counts) > max_executables:
        rarest = min(counts, key=lambda bucket: (counts[bucket], bucket))
        rows = counts.pop(rarest)

        def padding(other: Bucket) -> tuple[int, Bucket]:
            union = rarest.union(other)
            return rows * (union.cost - rarest.cost) + counts[other] * (union.cost - other.cost), other

        partner = min(counts, key=padding)
        union = rarest.union(partner)  # a new bucket or one of the two: merging with a third would have been cheaper
        counts[union] = rows + counts.pop(partner)
        members[union] = members.pop(rarest) + members.pop(partner)
    final = {old: bucket for bucket, olds in members.items() for old in olds}
    return [final[bucket] for bucket in smallest]


def epoch_steps(buckets: list[Bucket], rule: BatchRule, seed: int, epoch: int) -> list[PlannedStep]:
    """All steps of one epoch; each entry stands in exactly one of them, the last rows of a bucket may be masked."""
    generator = np.random.default_rng(np.random.SeedSequence((seed, epoch)))
    queues: dict[Bucket, list[int]] = {}
    steps = []
    for entry in generator.permutation(len(buckets)).tolist():
        bucket = buckets[entry]
        queue = queues.setdefault(bucket, [])
        queue.append(entry)
        if len(queue) == rule.rows(bucket):
            steps.append(PlannedStep(bucket, tuple(queues.pop(bucket))))
    for bucket in sorted(queues):
        missing = rule.rows(bucket) - len(queues[bucket])
        steps.append(PlannedStep(bucket, (*queues[bucket], *[MASKED] * missing)))
    return [steps[i] for i in generator.permutation(len(steps))]


def plan_hash(buckets: list[Bucket], rule: BatchRule, seed: int, fingerprint: str) -> str:
    """Identifies the order of all steps of all epochs; `fingerprint` names the samples behind the entries."""
    rows = [(*dataclasses.astuple(bucket), rule.rows(bucket)) for bucket in buckets]
    text = repr((rows, seed, fingerprint))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
