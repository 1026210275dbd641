"""Which visual token stands in which slot (design: model.md 7, lvtc.md 3).

Integers of static shape that the host computes with each batch, so that nothing inside a jitted
step depends on data. This is NumPy: loader processes do not import jax. models/lvtc.py shows the
short layout beside the long one, and is the only reader of it.
"""

from __future__ import annotations

import numpy as np

from internvlx_jax.core.inputs import ShortLayout
from internvlx_jax.core.model_config import LvtcConfig


def layouts(
    segment_ids: np.ndarray,
    tile_start: np.ndarray,
    tokens_per_tile: int,
    short_length: int,
    lvtc: LvtcConfig | None,
) -> tuple[np.ndarray, ShortLayout | None]:
    """Returns `feature_index` of the rows, and with LVTC their `short_layout`."""
    index = feature_index(tile_start, segment_ids.shape[1], tokens_per_tile)
    return index, None if lvtc is None else short_layout(
        segment_ids, tile_start, short_length, lvtc
    )


def feature_index(tile_start: np.ndarray, length: int, tokens_per_tile: int) -> np.ndarray:
    """Returns, for each slot, the row's visual token that replaces its text embedding.

    Args:
        tile_start: int32[B, T], first slot of each tile's tokens, or `length` for an unused tile
            slot.
        length: S, slots per row.
        tokens_per_tile: Q.

    Returns:
        int32[B, S]: tile * Q + token, or T * Q (out of range) on text slots.

    Raises:
        ValueError: A tile's tokens go beyond the row.
    """
    rows, tiles = tile_start.shape
    index = np.full((rows, length), tiles * tokens_per_tile, np.int32)
    for row, tile in np.argwhere(tile_start < length):
        first = tile_start[row, tile]
        if first + tokens_per_tile > length:
            raise ValueError(
                f"row {row}: tile {tile} starts at slot {first} and its {tokens_per_tile} tokens "
                f"do not fit into {length} slots"
            )
        index[row, first : first + tokens_per_tile] = tile * tokens_per_tile + np.arange(
            tokens_per_tile
        )
    return index


def short_lengths(segment_ids: np.ndarray, tile_start: np.ndarray, lvtc: LvtcConfig) -> np.ndarray:
    """Returns int[B], the slots that each row needs in the short layout; see `short_layout`."""
    used = tile_start < segment_ids.shape[1]
    return (segment_ids > 0).sum(axis=1) - used.sum(axis=1) * lvtc.saved_per_tile


def short_layout(
    segment_ids: np.ndarray, tile_start: np.ndarray, short_length: int, lvtc: LvtcConfig
) -> ShortLayout:
    """Returns the short layout of rows that are laid out in the long one.

    It has the same order, without gaps. Low token (a, b) of a tile stands for its top-left child,
    the long slot of (a * s, b * s), and so takes its position.

    Args:
        segment_ids: int32[B, S], 0 = padding, on any side.
        tile_start: int32[B, T], first long slot of each tile, or S for an unused tile slot.
        short_length: R, slots per row of the short layout.
        lvtc: Grids.

    Raises:
        ValueError: A row needs more than `short_length` slots.
    """
    rows, length = segment_ids.shape
    tiles = tile_start.shape[1]
    low, high, scale = lvtc.low_grid, lvtc.high_grid, lvtc.scale
    needed = short_lengths(segment_ids, tile_start, lvtc)
    if (needed > short_length).any():
        row = int(needed.argmax())
        raise ValueError(
            f"row {row} needs {needed[row]} slots in the short layout, which has {short_length}"
        )

    visual = feature_index(tile_start, length, high**2)  # [B, S]
    is_visual = visual < tiles * high**2
    tile, token = np.divmod(visual, high**2)
    a, b = np.divmod(token, high)  # row and column on the high grid
    is_corner = is_visual & (a % scale == 0) & (b % scale == 0)
    kept = (segment_ids > 0) & (is_corner | ~is_visual)
    rank = np.cumsum(kept, axis=1) - 1  # short slot of each kept long slot

    short_to_long = np.full((rows, short_length), length, np.int32)
    row, slot = np.nonzero(kept)
    short_to_long[row, rank[row, slot]] = slot

    start = np.full((rows, tiles), short_length, np.int32)
    row, first = np.nonzero(tile_start < length)
    start[row, first] = rank[row, tile_start[row, first]]

    # A visual slot's parent lies in its tile's block of the short layout.
    padded_start = np.concatenate([start, np.full((rows, 1), short_length, np.int32)], axis=1)
    block = np.take_along_axis(padded_start, np.where(is_visual, tile, tiles), axis=1)
    parent = block + (a // scale) * low + b // scale
    long_to_short = np.where(is_visual, parent, np.where(kept, rank, short_length)).astype(np.int32)
    return ShortLayout(
        short_to_long, long_to_short, start, feature_index(start, short_length, low**2)
    )
