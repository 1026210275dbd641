"""Static shapes of batches, and which shape a sample goes to (design: data.md 11). NumPy only."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from internvlx_jax.core.errors import ConfigError

LENGTH_STEP = 128
# A bucket is as long as its longest sample, up to a multiple of this: what tensor cores like.
ALIGNMENT = 16
# One image of at most 12 tiles has 1, 3, 4, ..., 13 of them with its thumbnail.
TILE_BUCKETS = (0, 1, *range(3, 14), 16, 24)
_COUNTED = 2**22  # values up to here are counted, larger ones are sorted


@dataclasses.dataclass(frozen=True)
class SlotCosts:
    """Says how much work the slots of a row are, in token slots.

    Attributes:
        tile: one tile slot. The default is that of the 2B model: 827 GFLOP of tower and projector
            against 3.4 GFLOP per token.
        short: one slot of the short layout of LVTC; a token slot is then one of the long layout.
    """

    tile: float = 243.2
    short: float = 0.0

    @classmethod
    def of(cls, token: float, short: float, tile: float) -> SlotCosts:
        """Returns the costs from the FLOPs of one slot of each kind.

        A tenth of a token slot is near enough, and is written to checkpoints and read again as it
        is.
        """
        return cls(round(tile / token, 1), round(short / token, 3))


# Earlier versions planned with these, and with buckets of whole steps, whatever the model.
EARLIER_COSTS = SlotCosts(tile=256)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Describes the upper bounds of what one sample may take.

    `Bucket` holds the same three numbers, but it is the shape of an array: all of them are known,
    buckets are sorted by them, and their text is part of the plan hash. A capacity only bounds a
    sample, and may leave tiles or short slots unbounded.

    Attributes:
        length: token slots.
        tiles: tile slots; None for any number.
        short_length: slots of the short layout of LVTC; None for any number.
    """

    length: int
    tiles: int | None = None
    short_length: int | None = None

    def fits(self, length: int, tiles: int, short_length: int = 0) -> bool:
        """Returns whether a sample of this many tokens, tiles and short slots fits."""
        return (
            length <= self.length
            and (self.tiles is None or tiles <= self.tiles)
            and (self.short_length is None or short_length <= self.short_length)
        )


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Describes the static shape of a row.

    Attributes:
        tiles: tile slots per row.
        length: token slots per row.
        short_length: slots of the short layout per row with LVTC, else 0.
    """

    tiles: int
    length: int
    short_length: int = 0

    def work(self, costs: SlotCosts) -> float:
        """Returns the work of a row in token slots."""
        return self.length + costs.short * self.short_length + costs.tile * self.tiles

    @property
    def capacity(self) -> Capacity:
        """Returns what a sample that has a row to itself may take."""
        return Capacity(self.length, self.tiles, self.short_length or None)

    def union(self, other: Bucket) -> Bucket:
        """Returns the smallest bucket that holds the rows of both."""
        return Bucket(
            max(self.tiles, other.tiles),
            max(self.length, other.length),
            max(self.short_length, other.short_length),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRule:
    """Decides how many rows a step of a bucket has.

    Attributes:
        row_quantum: data-parallel size * accumulation; the rows are a multiple of it.
        samples: fixed number of rows; None: as many as the other two say.
        tokens: token slots per step to stay near.
        tiles: largest number of tile slots per step; None: no bound.
    """

    row_quantum: int
    samples: int | None = None
    tokens: int | None = None
    tiles: int | None = None

    def rows(self, bucket: Bucket) -> int:
        """Returns the rows of a step of this bucket.

        Raises:
            ConfigError: `samples` is not a multiple of `row_quantum`.
        """
        if self.samples is not None:
            if self.samples % self.row_quantum:
                raise ConfigError(
                    f"data.samples_per_step {self.samples} is not a multiple of "
                    f"{self.row_quantum} (data-parallel devices * compute.accumulation)"
                )
            return self.samples
        if self.tokens is None:
            raise ValueError("a BatchRule needs `samples` or `tokens`")
        groups = max(1, self.tokens // (bucket.length * self.row_quantum))
        if self.tiles is not None and bucket.tiles:
            groups = max(1, min(groups, self.tiles // (bucket.tiles * self.row_quantum)))
        return groups * self.row_quantum


def smallest_bucket(
    tiles: int, length: int, length_step: int = LENGTH_STEP, saved_per_tile: int = 0
) -> Bucket:
    """Returns the bucket of one sample on its own.

    Args:
        tiles: tiles of the sample.
        length: its tokens.
        length_step: the length of a bucket is a multiple of it.
        saved_per_tile: slots by which LVTC makes a tile shorter in the short layout. The short
            length is that of the fewest tiles that take these tile slots, so that it follows from
            the other two numbers.
    """
    if tiles <= TILE_BUCKETS[-1]:
        slots = next(slots for slots in TILE_BUCKETS if tiles <= slots)
        fewest = TILE_BUCKETS[TILE_BUCKETS.index(slots) - 1] + 1 if slots else 0
    else:
        slots = round_up(tiles, 8)
        fewest = slots - 7
    bucket = Bucket(slots, round_up(length, length_step))
    if not saved_per_tile:
        return bucket
    short = round_up(bucket.length - fewest * saved_per_tile, length_step)
    return dataclasses.replace(bucket, short_length=short)


def round_up(n: int, step: int) -> int:
    """Returns the smallest multiple of `step` that is at least `n`."""
    return -(-n // step) * step


def assign_buckets(
    tiles: np.ndarray,
    lengths: np.ndarray,
    max_executables: int,
    length_step: int = LENGTH_STEP,
    saved_per_tile: int = 0,
    costs: SlotCosts = EARLIER_COSTS,
) -> tuple[list[Bucket], np.ndarray]:
    """Chooses the buckets of a dataset, and one of them for every sample.

    The rarest bucket merges into the cheapest union until `max_executables` remain.

    Args:
        tiles: int[n], tiles of each sample.
        lengths: int[n], tokens of each sample.
        max_executables: largest number of buckets; every one is a compiled step.
        length_step: see `smallest_bucket`.
        saved_per_tile: see `smallest_bucket`.
        costs: what makes one union cheaper than another.

    Returns:
        The buckets in order, and int32[n]: the position among them of every sample's bucket.
    """
    # One number per pair of tiles and steps of length; few pairs occur, however many the samples.
    steps = -(-np.asarray(lengths) // length_step)
    base = int(steps.max(initial=0)) + 1
    pair = np.asarray(tiles).astype(np.int64) * base + steps
    pairs, inverse, frequency = _distinct(pair)
    smallest = [
        smallest_bucket(number // base, number % base * length_step, length_step, saved_per_tile)
        for number in pairs.tolist()
    ]
    counts: Counter[Bucket] = Counter()
    for bucket, count in zip(smallest, frequency.tolist(), strict=True):
        counts[bucket] += count
    merged = _merge_rarest(counts, max_executables, costs)
    buckets = sorted(set(merged.values()))
    code = {bucket: buckets.index(union) for bucket, union in merged.items()}
    return buckets, np.array([code[bucket] for bucket in smallest], np.int32)[inverse]


def _distinct(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the distinct values in order, for each number its value's position, and counts."""
    span = int(numbers.max(initial=0)) + 1
    if span > _COUNTED:
        return np.unique(numbers, return_inverse=True, return_counts=True)
    frequency = np.bincount(numbers, minlength=span)  # sorts nothing
    values = np.flatnonzero(frequency)
    position = np.zeros(span, np.int32)
    position[values] = np.arange(len(values))
    return values, position[numbers], frequency[values]


def trim_buckets(
    buckets: Sequence[Bucket],
    code: np.ndarray,
    tiles: np.ndarray,
    lengths: np.ndarray,
    saved_per_tile: int = 0,
) -> list[Bucket]:
    """Returns the buckets without the slots that none of their samples needs.

    Args:
        buckets: as `assign_buckets` chooses them.
        code: int[n], number of each sample's bucket.
        tiles, lengths: int[n], what each sample needs.
        saved_per_tile: see `smallest_bucket`.
    """

    def most(need: np.ndarray) -> list[int]:
        found = np.zeros(len(buckets), np.int64)
        np.maximum.at(found, code, need)
        return found.tolist()

    short = lengths - tiles * saved_per_tile
    return [
        Bucket(
            min(bucket.tiles, most_tiles),
            min(bucket.length, round_up(longest, ALIGNMENT)),
            min(bucket.short_length, round_up(longest_short, ALIGNMENT)),
        )
        for bucket, most_tiles, longest, longest_short in zip(
            buckets, most(tiles), most(lengths), most(short), strict=True
        )
    ]


def _merge_rarest(counts: Counter[Bucket], limit: int, costs: SlotCosts) -> dict[Bucket, Bucket]:
    """Returns for every bucket the union that it becomes a part of; `limit` unions remain."""
    rows = dict(counts)
    members = {bucket: [bucket] for bucket in rows}
    while len(rows) > limit:
        rarest = min(rows, key=lambda bucket: (rows[bucket], bucket))
        rare = rows.pop(rarest)

        def padding(other: Bucket) -> tuple[float, Bucket]:
            work = rarest.union(other).work(costs)
            added = work - rarest.work(costs), work - other.work(costs)
            return rare * added[0] + rows[other] * added[1], other

        partner = min(rows, key=padding)
        # The union is new or one of the two: merging with a third would have been cheaper.
        union = rarest.union(partner)
        rows[union] = rare + rows.pop(partner)
        members[union] = members.pop(rarest) + members.pop(partner)
    return {bucket: union for union, inside in members.items() for bucket in inside}
