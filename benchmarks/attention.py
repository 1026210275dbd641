"""Compares attention backends with the plain formula on the attached device.

    python benchmarks/attention.py                          # every backend of this platform
    python benchmarks/attention.py --backend cudnn --check  # fails when errors are too large

Prints errors, and time and temporary memory as ratios to the plain formula. `--check` fails when an
error is larger than bfloat16 explains. The shapes include the 2B's decoder and the tower.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internvlx_jax.models.attention import Backend, SelfAttention, attend

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "tpu": ("splash", "xla"),
    "gpu": ("cudnn", "xla"),
    "cpu": ("xla",),
}
BOUND = 0.03  # of the largest entry: bfloat16 has eight bits


class Shape(NamedTuple):
    """Describes one attention problem: B, S, N, K, H, and whether it is causal."""

    rows: int
    slots: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        return f"[{self.rows}, {self.slots}, {self.heads}/{self.kv_heads}, {self.head_dim}]"


SHAPES = (
    Shape(2, 576, 4, 2, 64, True),
    Shape(1, 4096, 16, 8, 128, True),  # the 2B's decoder
    Shape(7, 1025, 16, 16, 64, False),  # the tower on seven tiles
)


class Measured(NamedTuple):
    """Holds output and gradients, seconds of a forward and backward pass, and temporary bytes."""

    arrays: tuple[jax.Array, ...]
    seconds: float
    temporaries: int


def measure(compute: Callable[..., jax.Array], *arrays: jax.Array) -> Measured:
    """Runs attention and its gradients.

    Args:
        compute: Called with q, k and v.
        arrays: q [B, S, N, H], k and v [B, S, K, H], and the gradient of the output.
    """

    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        out, back = jax.vjp(compute, q, k, v)
        return out, *back(do)

    compiled = jax.jit(run).lower(*arrays).compile()
    results = jax.block_until_ready(compiled(*arrays))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - started)
    memory = compiled.memory_analysis()
    assert memory is not None  # every platform of BACKENDS tells
    return Measured(results, float(np.median(times)), memory.temp_size_in_bytes)


def relative_error(ours: jax.Array, expected: jax.Array) -> float:
    """Returns the largest error relative to the largest entry."""
    ours, expected = ours.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.max(jnp.abs(ours - expected)) / jnp.max(jnp.abs(expected)))


def compare(shape: Shape, backends: tuple[Backend, ...]) -> float:
    """Prints one line per backend and returns the largest error of all."""
    dtype = jnp.float32 if jax.devices()[0].platform == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    arrays = [
        jax.random.normal(key, (shape.rows, shape.slots, count, shape.head_dim), dtype)
        for key, count in zip(keys, counts, strict=True)
    ]
    segments = None
    if shape.causal:  # two segments, then padding
        borders = np.searchsorted([0.5 * shape.slots, 0.9 * shape.slots], np.arange(shape.slots))
        segments = jnp.tile(jnp.array([1, 2, 0])[borders], (shape.rows, 1))
    plain = functools.partial(
        attend,
        q_segments=segments,
        kv_segments=segments,
        q_start=0 if shape.causal else None,
    )
    expected, worst = measure(plain, *arrays), 0.0
    for backend in backends:
        compute = functools.partial(SelfAttention(backend), segments=segments, causal=shape.causal)
        ours = measure(compute, *arrays)
        errors = list(map(relative_error, ours.arrays, expected.arrays))
        worst = max(worst, *errors)
        print(
            f"{backend:7} {shape} {dtype.__name__}: errors of out, dq, dk, dv "
            f"{' '.join(f'{error:.1e}' for error in errors)}; "
            f"time {ours.seconds / expected.seconds:.2f} and temporary memory "
            f"{ours.temporaries / expected.temporaries:.2f} of the plain formula "
            f"({1e3 * expected.seconds:.1f} ms, {expected.temporaries / 2**20:.0f} MiB)",
            flush=True,
        )
    return worst


def main() -> int:
    """Runs the command.

    Returns:
        Exit status, 1 if `--check` was given and an error exceeds its bound.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", help="one only (default: all of this platform)")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 when an error exceeds its bound"
    )
    args = parser.parse_args()
    backends = (args.backend,) if args.backend else BACKENDS[jax.devices()[0].platform]
    worst = max(compare(shape, backends) for shape in SHAPES)
    return int(args.check and worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
