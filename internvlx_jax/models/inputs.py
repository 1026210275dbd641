"""What one forward pass reads. Arrays are NumPy on the host and jax.Array on the device; no import of jax."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORED = -100  # label of a token that the model does not learn to write


class Inputs(NamedTuple):
    """Static-shape model inputs (spec: data.md 13).

    Attributes:
        tokens: int32[B, S], padded with the pad id.
        positions: int32[B, S], restarting at 0 in each segment.
        segment_ids: int32[B, S], from 1; 0 is padding. Masks come from here, never from token values.
        tiles: uint8[B, T, Y, X, 3] (normalised on the device), or float32 already normalised.
        feature_index: int32[B, S], see models/frames.py.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    tiles: np.ndarray
    feature_index: np.ndarray
