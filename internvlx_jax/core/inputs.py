"""What one forward pass reads, on the host and on the device."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

# np.ndarray on the host, jax.Array on the device: this room does not import jax.
Array: TypeAlias = Any

# Label of a token that the model does not learn to write.
IGNORED = -100


class ShortLayout(NamedTuple):
    """Describes the sequence of LVTC's shallow layers (design: lvtc.md 3).

    Text slots are as in the long layout and a tile has few slots. models/lvtc.py shows the two
    layouts side by side.

    Attributes:
        short_to_long: int32[B, R], the long slot that a short slot represents, or S (out of range)
            on padding.
        long_to_short: int32[B, S], the short slot of a text slot, the parent of a visual one, or R
            on padding.
        tile_start: int32[B, T], first short slot of each tile, or R for an unused tile slot.
        feature_index: int32[B, R], the row's low token in each short slot, or T * g_l^2 (out of
            range) on text.
    """

    short_to_long: Array
    long_to_short: Array
    tile_start: Array
    feature_index: Array


class Inputs(NamedTuple):
    """Holds the inputs of one batch, whose shapes are those of its bucket (design: data.md 13).

    Attributes:
        tokens: int32[B, S], padded with the pad id.
        positions: int32[B, S], restarting at 0 in each segment.
        segment_ids: int32[B, S], from 1; 0 is padding. Masks come from here, never from token
            values, since a pad id can occur as a real token.
        tiles: uint8[B, T, Y, X, 3], which the device normalizes, or float32 normalized already.
        feature_index: int32[B, S], see data/batch.py.
        short: The short layout of LVTC, else None; all other fields are of the long layout.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    tiles: Array
    feature_index: Array
    short: ShortLayout | None = None
