"""Host-side index plans: which visual token stands in which slot (spec: model.md 7). NumPy only."""

from __future__ import annotations

import numpy as np


def feature_index(tile_start: np.ndarray, length: int, tokens_per_tile: int) -> np.ndarray:
    """For each slot, the row's visual token that replaces its text embedding.

    tile_start: int32[B, T], first slot of each tile's tokens, or `length` for an unused tile slot
    -> int32[B, S]: tile * tokens_per_tile + token, or T * tokens_per_tile (out of range) on text slots
    """
    rows, tiles = tile_start.shape
    index = np.full((rows, length), tiles * tokens_per_tile, np.int32)
    for row, tile in np.argwhere(tile_start < length):
        first = tile_start[row, tile]
        if first + tokens_per_tile > length:
            raise ValueError(f"row {row}: tile {tile} starts at slot {first} and its {tokens_per_tile} tokens "
                             f"do not fit into {length} slots")
        index[row, first : first + tokens_per_tile] = tile * tokens_per_tile + np.arange(tokens_per_tile)
    return index
