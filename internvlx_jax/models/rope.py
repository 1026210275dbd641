"""Rotary position embedding, half rotation (design: model.md 8, 9).

Angles, cosines and the rotation itself are in float32: bfloat16 cannot tell
positions beyond 256 apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from internvlx_jax.core.model_config import RopeConfig


class RopeTables(NamedTuple):
    """Holds the rotation of each slot of one token layout.

    Attributes:
        cos, sin: float32[B, S, H/2].
    """

    cos: jax.Array
    sin: jax.Array


def rope_tables(
    config: RopeConfig, positions: jax.Array, head_dim: int, key_length: int
) -> RopeTables:
    """Computes the rotation of each slot.

    Args:
        config: Base and scaling.
        positions: int32[B, S].
        head_dim: H.
        key_length: Number of key slots of the call. Scaling beyond `max_positions` depends on
            length; a static number fixes one base for all keys, cached ones included.

    Raises:
        ValueError: `key_length` exceeds `config.max_positions` and `config.allow_longer` is off.
    """
    if key_length > config.max_positions and not config.allow_longer:
        raise ValueError(
            f"{key_length} key slots exceed the decoder's {config.max_positions} positions; "
            "shorten the input, or set decoder.rope.allow_longer=True to extrapolate"
        )
    theta, stretch = config.theta, 1.0
    if config.scaling == "linear":
        stretch = config.factor
    elif config.scaling == "dynamic" and key_length > config.max_positions:
        growth = config.factor * key_length / config.max_positions - (config.factor - 1)
        theta = theta * growth ** (head_dim / (head_dim - 2))
    inverse = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    scale = 1.0
    if config.scaling in ("su", "yarn"):
        is_long = jnp.max(positions) + 1 > config.original_max_positions
        stretch = jnp.where(
            is_long,
            *(jnp.asarray(f, jnp.float32) for f in (config.long_factor, config.short_factor)),
        )
        scale = _attention_scale(config)
    angles = positions.astype(jnp.float32)[..., None] * inverse / stretch
    return RopeTables(scale * jnp.cos(angles), scale * jnp.sin(angles))


def _attention_scale(config: RopeConfig) -> float:
    """Returns what `su` and `yarn` multiply cos and sin by (model.md 9)."""
    growth = config.max_positions / config.original_max_positions
    if growth <= 1:
        return 1.0
    if config.scaling == "yarn":
        return 0.1 * math.log(growth) + 1.0
    return math.sqrt(1 + math.log(growth) / math.log(config.original_max_positions))


def rotate(x: jax.Array, tables: RopeTables) -> jax.Array:
    """Rotates [B, S, ..., H] in float32 and casts back."""
    heads = (1,) * (x.ndim - 3)
    cos, sin = (t.reshape(*t.shape[:2], *heads, t.shape[-1]) for t in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
