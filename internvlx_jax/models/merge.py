"""Rows gathered by host-made indices: visual tokens into their slots (spec: model.md 7, lvtc.md 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """x: [B, Z, ...], index: int[B, Y] -> [B, Y, ...]; 0 where the index is out of range."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def place(visual: jax.Array | None, feature_index: jax.Array, x: jax.Array) -> jax.Array:
    """Visual tokens in their slots, x in the others.

    visual: [B, T * Q, D]; feature_index: int32[B, S], out of range where x stays; x: [B, S, D] -> [B, S, D]
    visual None: a batch without tiles.
    """
    if visual is None:
        return x
    with jax.named_scope("merge"):
        return jnp.where(feature_index[..., None] < visual.shape[1], gather(visual, feature_index), x)
