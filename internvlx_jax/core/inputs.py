"""What one forward pass reads. Arrays are NumPy on the host and jax.Array on the device; no import of jax."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORED = -100  # label of a token that the model does not learn to write


class ShortLayout(NamedTuple):
    """The sequence of the shallow layers under LVTC: text slots as they are, few slots a tile (design: lvtc.md 3).

    Attributes:
        short_to_long: int32[B, R], the long slot that a short slot represents, or S (out of range) on padding.
        long_to_short: int32[B, S], the short slot of a text slot, the parent of a visual one, or R on padding.
        tile_start: int32[B, T], first short slot of each tile, or R for an unused tile slot.
        feature_index: int32[B, R], the row's low token in each short slot, or T * g_l^2 (out of range) on text.
    """

    short_to_long: np.ndarray
    long_to_short: np.ndarray
    tile_start: np.ndarray
    feature_index: np.ndarray


class Inputs(NamedTuple):
    """Static-shape model inputs (design: data.md 13).

    Attributes:
        tokens: int32[B, S], padded with the pad id.
        positions: int32[B, S], restarting at 0 in each segment.
        segment_ids: int32[B, S], from 1; 0 is padding. Masks come from here, never from token values.
        tiles: uint8[B, T, Y, X, 3] (normalised on the device), or float32 already normalised.
        feature_index: int32[B, S], see core/token_layout.py.
        short: with LVTC only; all other fields are of the long layout.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    tiles: np.ndarray
    feature_index: np.ndarray
    short: ShortLayout | None = None
