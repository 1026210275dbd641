"""Best fit of samples into rows of fixed budgets (design: data.md 12). NumPy and plain Python."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def best_fit(
    lengths: np.ndarray,
    max_length: int,
    *,
    also: Sequence[tuple[np.ndarray, int]] = (),
    open_rows: int,
) -> np.ndarray:
    """The row of each sample, rows numbered in the order they are opened.

    lengths: int[n] -> int64[n]. A sample goes to the open row that it leaves with the fewest free tokens (the oldest of
    equals); when it fits none, a row is opened, and the fullest is closed if `open_rows` are open already.
    also: further needs of the samples, int[n], each with the budget of a row: tiles, slots of the short layout.
    """
    rows = np.empty(len(lengths), np.int64)
    by_space: list[tuple[int, int]] = []  # (free tokens, row) of the open rows, sorted
    free: list[list[int]] = []  # what is left of the other budgets of every row
    budgets = [budget for _, budget in also]
    needs = zip(*(need.tolist() for need, _ in also)) if also else [()] * len(lengths)
    for entry, (length, need) in enumerate(zip(lengths.tolist(), needs)):
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
