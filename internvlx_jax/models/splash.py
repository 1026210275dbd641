"""Attention of whole sequences by the splash kernel of JAX for TPUs (design: platform.md 2).

JAX's module is imported where it is used: it takes a sixth of the time in which a command starts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from einops import rearrange

LANES = 128  # the kernel's blocks are multiples of it
BLOCK = 512  # largest block of queries, and of keys in one product: 1 MiB of float32 scores in VMEM
DQ_PARTS = 8  # partial query gradients that the backward kernel writes before a sum, at most
PADDING = -1  # segment of the slots that fill the last block


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    *,
    causal: bool,
    residuals: str,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attends a sequence to itself.

    The kernel has no scale: q takes it, and is rounded once more where 1 / sqrt(H) is no power of
    two.

    Args:
        q: [B, S, N, H].
        k, v: [B, S, K, H].
        segments: int32[B, S], 0 = padding; None is one segment.
        causal: Whether a query sees the slots before it and its own only.
        residuals: Checkpoint name of what the backward pass needs besides q, k and v: output and
            log-sum-exp.
        window: Slots that a causal query sees, its own included. None is all before it.
        interpret: Whether to emulate the kernel, on any platform, slowly.

    Returns:
        [B, S, N, H].
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, cut = q.shape[1], blocks(q.shape[1])
    padding = cut.padded - length
    if padding:
        segments = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments
        segments = jnp.pad(segments, ((0, 0), (0, padding)), constant_values=PADDING)
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    q, k, v = (rearrange(x, "b s n h -> b n s h") for x in (q * q.shape[-1] ** -0.5, k, v))
    kernel = _kernel(q.shape[1], cut, causal, window, residuals, interpret)
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    out = cast(jax.Array, jax.vmap(kernel)(q, k, v, ids))  # residuals are not returned
    return rearrange(out, "b n s h -> b s n h")[:, :length]


class Blocks(NamedTuple):
    """Says how a sequence is cut.

    Attributes:
        padded: Length that the blocks divide.
        block: Queries per block, and keys per product.
        keys: Keys per block in the causal backward kernel, a multiple of `block`.
    """

    padded: int
    block: int
    keys: int


def blocks(length: int) -> Blocks:
    """Chooses how a sequence is cut.

    What fits into one block is one block. Longer sequences get the least padding with blocks that
    are not small, since those are slow, and at most DQ_PARTS blocks of keys: the fused backward
    kernel writes the query gradient in as many parts, each as large as q.
    """
    if length <= BLOCK:
        padded = _round_up(length, LANES)
        return Blocks(padded, padded, padded)
    scale = -(-length // (DQ_PARTS * BLOCK))
    sizes = [block for block in (BLOCK, 384, 256) if -(-length // (block * scale)) <= DQ_PARTS]
    block = min(sizes, key=lambda size: _round_up(length, size * scale))  # the larger one of equals
    return Blocks(_round_up(length, block * scale), block, block * scale)


def _round_up(length: int, quantum: int) -> int:
    return -(-length // quantum) * quantum


@functools.cache
def _kernel(
    heads: int, cut: Blocks, causal: bool, window: int | None, residuals: str, interpret: bool
):
    """Makes one kernel per shape; what it precomputes about the mask is constants.

    Without a causal mask no block is skipped, and all keys of a sequence are one block in the
    backward kernel.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = (splash.CausalMask if causal else splash.FullMask)((cut.padded, cut.padded))
    if window is not None:
        mask = splash.LocalMask((cut.padded, cut.padded), window_size=(window - 1, 0), offset=0)
    sizes = splash.BlockSizes(
        block_q=cut.block,
        block_kv=cut.block,
        block_kv_compute=cut.block,
        block_q_dkv=cut.block,
        block_kv_dkv=cut.keys if causal else cut.padded,
        block_kv_dkv_compute=cut.block,
        use_fused_bwd_kernel=True,
    )
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            residual_checkpoint_name=residuals,
            interpret=interpret,
        )
