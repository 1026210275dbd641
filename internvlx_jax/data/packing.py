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
