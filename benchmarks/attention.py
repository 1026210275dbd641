"""Attention backends against the plain formula on the device that is here: errors, and time and memory as ratios.

python benchmarks/attention.py                         # every backend of this platform, shapes of the 2B and the tower
python benchmarks/attention.py --backend cudnn --check # fails when an error is larger than bfloat16 explains
"""

from __future__ import annotations

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from internvlx_jax.models.attention import SelfAttention, attend

BACKENDS = {"tpu": ("splash", "xla"), "gpu": ("cudnn", "xla"), "cpu": ("xla",)}
# rows, slots, heads, key heads, head dim, causal; the second is the 2B's decoder, the last the tower's on seven tiles
SHAPES = ((2, 576, 4, 2, 64, True), (1, 4096, 16, 8, 128, True), (7, 1025, 16, 16, 64, False))
BOUND = 0.03  # of the largest entry: bfloat16 has eight bits


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", help="one only; default: all of this platform")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 when an error exceeds its bound"
    )
    args = parser.parse_args()
    platform = jax.devices()[0].platform
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    worst = 0.0
    for rows, slots, heads, kv_heads, head_dim, causal in SHAPES:
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, do = (
            jax.random.normal(key, (rows, slots, n, head_dim), dtype)
            for key, n in zip(keys, (heads, kv_heads, kv_heads, heads))
        )
        borders = np.searchsorted(
            [0.5 * slots, 0.9 * slots], np.arange(slots)
        )  # two segments, then padding
        segments = jnp.tile(jnp.array([1, 2, 0])[borders], (rows, 1)) if causal else None

        def plain(q, k, v):
            return attend(
                q, k, v, q_segments=segments, kv_segments=segments, q_start=0 if causal else None
            )

        expected, plain_time, plain_memory = measure(plain, q, k, v, do)
        for backend in [args.backend] if args.backend else BACKENDS[platform]:
            ours, seconds, memory = measure(
                lambda q, k, v: SelfAttention(backend)(q, k, v, segments, causal=causal),
                q,
                k,
                v,
                do,
            )
            errors = [
                float(
                    jnp.max(jnp.abs(a.astype(jnp.float32) - b))
                    / jnp.max(jnp.abs(b.astype(jnp.float32)))
                )
                for a, b in zip(ours, expected)
            ]
            worst = max(worst, *errors)
            print(
                f"{backend:7} [{rows}, {slots}, {heads}/{kv_heads}, {head_dim}] {dtype.__name__}: errors of out, dq, dk, dv "
                f"{' '.join(f'{error:.1e}' for error in errors)}; time {seconds / plain_time:.2f} and temporary memory "
                f"{memory / plain_memory:.2f} of the plain formula ({1e3 * plain_time:.1f} ms, {plain_memory / 2**20:.0f} MiB)",
                flush=True,
            )
    return int(args.check and worst > BOUND)


def measure(compute, q, k, v, do):
    """(output and gradients, seconds of a forward and backward pass, bytes of temporary memory)."""

    def run(q, k, v, do):
        out, back = jax.vjp(compute, q, k, v)
        return out, *back(do)

    compiled = jax.jit(run).lower(q, k, v, do).compile()
    results = jax.block_until_ready(compiled(q, k, v, do))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(compiled(q, k, v, do))
        times.append(time.perf_counter() - started)
    return results, float(np.median(times)), compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    sys.exit(main())
