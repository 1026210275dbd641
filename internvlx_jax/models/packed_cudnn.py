"""cuDNN attention of packed rows: each segment by itself, without a mask (design: model.md 8).

A row holds several samples one after the other. With a mask cuDNN computes all pairs of slots of
the row and throws most of them away; told where each sample begins, it computes those inside the
samples only. `jax.nn.dot_product_attention` does not pass this on, but the function below it does,
from JAX 0.11 on (JAX 0.10 miscounts the offsets of grouped keys). It is not public, so its absence
is no error: the mask takes its place.

A program has room for a fixed number of runs of equal segments per row. A batch with more of them
takes the mask, which is decided on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MOST_RUNS = 8  # per row, padding included

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@functools.cache
def packs_sequences() -> bool:
    """Tells whether cuDNN packs sequences here: JAX 0.11 on a Hopper GPU or a newer one."""
    if jax.__version_info__ < (0, 11) or _kernel() is None:
        return False
    if jax.default_backend() != "gpu":
        return False
    return float(getattr(jax.local_devices()[0], "compute_capability", 0)) >= 9


def _kernel() -> tuple[Callable[..., Any], Any] | None:
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        return cudnn.dot_product_attention, cudnn.MaskType.CAUSAL
    except (ImportError, AttributeError):
        return None


def packed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, otherwise: Attend
) -> jax.Array:
    """Attends causally within runs of equal segments.

    Padding is a run of its own, so every slot is written and stays finite.

    Args:
        q: [B, S, N, H].
        k, v: [B, S, K, H].
        segments: int32[B, S]; each is one run of slots.
        otherwise: Computes the same where a row has more than `MOST_RUNS` runs.

    Returns:
        [B, S, N, H].
    """
    begin, lengths, fits = segment_runs(segments, MOST_RUNS)

    @jax.custom_vjp
    def compute(q, k, v, segments, begin, lengths, fits):
        return jax.lax.cond(fits, packed, masked, q, k, v, segments, begin, lengths)

    def packed(q, k, v, segments, begin, lengths):
        return _packed(q, k, v, begin, lengths)

    def masked(q, k, v, segments, begin, lengths):
        return otherwise(q, k, v, segments)

    def forward(*arrays):
        return compute(*arrays), arrays

    def backward(arrays, dy):
        q, k, v, *rest, fits = arrays

        # Each branch runs its forward pass again: what the two keep for the backward pass differs.
        def gradients(branch):
            def run(dy, q, k, v, *rest):
                return jax.vjp(lambda q, k, v: branch(q, k, v, *rest), q, k, v)[1](dy)

            return run

        grads = jax.lax.cond(fits, gradients(packed), gradients(masked), dy, q, k, v, *rest)
        return *grads, None, None, None, None

    compute.defvjp(forward, backward)
    return compute(q, k, v, segments, begin, lengths, fits)


def segment_runs(segments: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the runs of equal segments of each row.

    Args:
        segments: int32[B, S].
        most: M, the runs that there is room for.

    Returns:
        First slot int32[B, M] and number of slots int32[B, M] of each run, both -1 behind the
        last one; and whether all rows have at most M runs, a bool scalar.
    """
    length = segments.shape[1]
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    find = functools.partial(jnp.nonzero, size=most, fill_value=-1)
    begin = jax.vmap(lambda row: find(row)[0])(first).astype(jnp.int32)
    after = jnp.pad(begin[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    lengths = jnp.where(begin < 0, -1, jnp.where(after < 0, length, after) - begin)
    return begin, lengths, jnp.all(jnp.sum(first, axis=1) <= most)


def _packed(
    q: jax.Array, k: jax.Array, v: jax.Array, begin: jax.Array, lengths: jax.Array
) -> jax.Array:
    kernel = _kernel()
    assert kernel is not None
    attend, causal = kernel
    offsets = jnp.pad(begin, ((0, 0), (0, 1)), constant_values=-1)
    return attend(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=causal,
    )
