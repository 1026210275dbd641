"""Bicubic interpolation of the tower's position embedding (spec: model.md 3)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

_A = -0.75  # PyTorch's cubic kernel; jax.image.resize uses -0.5, drops outside weights and antialiases


@functools.cache
def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Row o of float64[size_out, size_in] holds the weights of output sample o; the edge sample is repeated."""

    def weight(d):
        d = abs(d)
        if d <= 1:
            return (_A + 2) * d**3 - (_A + 3) * d**2 + 1
        return _A * d**3 - 5 * _A * d**2 + 8 * _A * d - 4 * _A

    matrix = np.zeros((size_out, size_in))
    for o in range(size_out):
        u = (o + 0.5) * size_in / size_out - 0.5
        j = int(np.floor(u))
        for k in range(-1, 3):
            matrix[o, np.clip(j + k, 0, size_in - 1)] += weight(u - (j + k))
    return matrix


def resize_positions(positions: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Fit a square position table to another patch grid; the class position stays.

    positions: [1+P, V], grid: (rows, columns)  ->  [1+rows*columns, V] in the dtype of `positions`
    """
    side = int(round((positions.shape[0] - 1) ** 0.5))
    if grid == (side, side):
        return positions
    patches = positions[1:].astype(jnp.float32).reshape(side, side, -1)
    rows = jnp.asarray(bicubic_matrix(side, grid[0]), jnp.float32)
    columns = jnp.asarray(bicubic_matrix(side, grid[1]), jnp.float32)
    resized = jnp.einsum("ai,bj,ijv->abv", rows, columns, patches).reshape(grid[0] * grid[1], -1)
    return jnp.concatenate([positions[:1], resized.astype(positions.dtype)])
