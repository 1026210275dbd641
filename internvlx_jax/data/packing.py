"""Samples into rows of fixed budgets (design: data.md 12). NumPy and plain Python.

`fill_rows` is what new runs pack with; `best_fit` packs runs that began with earlier versions.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from internvlx_jax.data.buckets import Bucket

# Share of a row that is filled by the best choice of samples; what is before comes as it comes.
_CHOSEN = 1 / 4
_UNITS = 2048  # parts of a row that lengths are rounded up to while choosing


def best_fit(
    lengths: np.ndarray,
    max_length: int,
    *,
    also: Sequence[tuple[np.ndarray, int]] = (),
    open_rows: int,
) -> np.ndarray:
    """Puts samples into rows, best fit first.

    A sample goes to the open row that it leaves with the fewest free tokens, the oldest of equals.
    When it fits none, a row is opened, and the fullest is closed if `open_rows` are open already.

    Args:
        lengths: int[n], tokens of each sample.
        max_length: tokens per row.
        also: further needs of the samples, int[n], each with the budget of a row: tiles, slots of
            the short layout.
        open_rows: number of rows among which a sample chooses.

    Returns:
        int64[n], the row of each sample; rows are numbered in the order in which they are opened.
    """
    rows = np.empty(len(lengths), np.int64)
    by_space: list[tuple[int, int]] = []  # (free tokens, row) of the open rows, sorted
    free: list[list[int]] = []  # what is left of the other budgets of every row
    budgets = [budget for _, budget in also]
    needs = zip(*(need.tolist() for need, _ in also), strict=True) if also else [()] * len(lengths)
    for entry, (length, need) in enumerate(zip(lengths.tolist(), needs, strict=True)):
        at = bisect_left(by_space, (length, -1))
        while at < len(by_space) and any(map(int.__gt__, need, free[by_space[at][1]])):
            at += 1
        if at < len(by_space):
            space, row = by_space.pop(at)
        else:
            if len(by_space) == open_rows:
                del by_space[0]
            space, row = max_length, len(free)
            free.append(budgets)
        free[row] = list(map(int.__sub__, free[row], need))
        insort(by_space, (space - length, row))
        rows[entry] = row
    return rows


def fill_rows(
    lengths: np.ndarray,
    tiles: np.ndarray,
    bucket: Bucket,
    *,
    waiting: int,
    saved_per_tile: int = 0,
) -> np.ndarray:
    """Puts samples into rows, one row after the other, so that few slots stay empty.

    A row takes the samples that have waited longest until a quarter of it is left. For the rest it
    takes those of the waiting ones that together leave the fewest free tokens, which is a
    subset-sum over tokens and tiles. The oldest sample is always taken, so that none waits for
    long.

    Args:
        lengths: int[n], tokens of each sample.
        tiles: int[n], tiles of each sample.
        bucket: shape of a row; every sample fits it alone.
        waiting: number of samples that a row chooses from.
        saved_per_tile: slots by which LVTC makes a tile shorter in the short layout.

    Returns:
        int64[n], the row of each sample; rows are numbered in the order in which they are filled.
    """
    needs = list(zip(lengths.tolist(), tiles.tolist(), strict=True))
    room = _Room(bucket, saved_per_tile)
    rows = np.empty(len(needs), np.int64)
    queue: list[int] = []
    coming, row = iter(range(len(needs))), 0
    while True:
        queue += itertools.islice(coming, waiting - len(queue))
        if not queue:
            return rows
        taken, queue = room.fill(queue, needs)
        rows[taken] = row
        row += 1


class _Room:
    """A row of fixed budgets, and which of the waiting samples fill it."""

    def __init__(self, bucket: Bucket, saved_per_tile: int):
        self.length, self.tiles = bucket.length, bucket.tiles
        self.short = bucket.short_length if saved_per_tile else bucket.length
        self.saved = saved_per_tile
        self.unit = max(1, bucket.length // _UNITS)

    def fill(
        self, queue: Sequence[int], needs: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[int]]:
        """Returns (samples of the next row, samples that go on waiting), in their order."""
        length, tiles, short = self.length, self.tiles, self.short
        first = 0
        for sample in queue:
            tokens, count = needs[sample]
            left = length - tokens, tiles - count, short - tokens + self.saved * count
            if min(left) < 0 or (first and left[0] < self.length * _CHOSEN):
                break
            (length, tiles, short), first = left, first + 1
        rest = queue[first:]
        chosen = self._choose([needs[sample] for sample in rest], length, tiles, short)
        taken = [*queue[:first], *(rest[place] for place in chosen)]
        kept = set(chosen)
        return taken, [sample for place, sample in enumerate(rest) if place not in kept]

    def _choose(
        self, needs: Sequence[tuple[int, int]], length: int, tiles: int, short: int
    ) -> list[int]:
        """Returns the places of the samples that fill what is left of a row best.

        Bit t * width + k of `sums` says whether some of the samples seen so far have t tiles and k
        units of tokens together.
        """
        units = length // self.unit
        tiles = min(tiles, sum(count for _, count in needs))
        width = 2 * units + 1  # a sum beyond the row falls between two numbers of tiles
        inside = (1 << (units + 1)) - 1
        mask = sum(inside << (count * width) for count in range(tiles + 1))
        full = 0 if self.saved else sum(1 << (t * width + units) for t in range(tiles + 1))
        steps: list[tuple[int, int, int]] = []  # (place, bits that the sample adds, sums before)
        sums = 1
        for place, (tokens, count) in enumerate(needs):
            size = -(-tokens // self.unit)
            if size > units or count > tiles:
                continue
            added = count * width + size
            steps.append((place, added, sums))
            sums |= (sums << added) & mask
            if sums & full:
                break
        best = max(
            (found.bit_length() - 1, count)
            for count in range(tiles + 1)
            if (found := sums >> (count * width) & self._allowed(inside, count, short))
        )
        at, chosen = best[1] * width + best[0], []
        for place, added, before in reversed(steps):
            if not before >> at & 1:
                at -= added
                chosen.append(place)
        return chosen[::-1]

    def _allowed(self, inside: int, count: int, short: int) -> int:
        """Returns the bits of a number of tiles that fit the short layout, too."""
        if not self.saved:
            return inside
        return inside & ((1 << ((short + self.saved * count) // self.unit + 1)) - 1)
