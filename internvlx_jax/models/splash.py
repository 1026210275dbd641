"""Attention of whole sequences by the splash kernel of JAX for TPUs (spec: platform.md 2)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128          # the kernel's blocks are multiples of it
BLOCK = 512          # largest block of queries, and of keys in one product: 1 MiB of float32 scores in VMEM
DQ_PARTS = 8         # most partial query gradients that the backward kernel writes before they are summed
PADDING = -1         # segment of the slots that fill the last block


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, causal: bool,
                     residuals: str, interpret: bool = False) -> jax.Array:
    """q: [B, S, N, H], k, v: [B, S, K, H], segments: int32[B, S] or None -> [B, S, N, H].

    residuals: checkpoint name of what the backward pass needs besides q, k and v: output and log-sum-exp.
    interpret: emulate the kernel, on any platform, slowly.
    """
    length = q.shape[1]
    padding = padded_length(length) - length
    if padding:
        segments = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments
        segments = jnp.pad(segments, ((0, 0), (0, padding)), constant_values=PADDING)
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    q, k, v = (rearrange(x, "b s n h -> b n s h") for x in (q * q.shape[-1] ** -0.5, k, v))
    kernel = _kernel(q.shape[1], q.shape[2], causal, residuals, interpret)
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    return rearrange(jax.vmap(kernel)(q, k, v, ids), "b n s h -> b s n h")[:, :length]


def padded_length(length: int) -> int:
    """The next multiple of 128 that is one block, or is cut in blocks of at least 256: small blocks are slow."""
    padded = -(-length // LANES) * LANES
    while padded > BLOCK and _divisor(padded, BLOCK) == LANES:
        padded += LANES
    return padded


def block_sizes(length: int, *, causal: bool) -> splash.BlockSizes:
    """Blocks for a padded length. The fused backward kernel computes dq in as many parts, each as large as q, as there
    are blocks of keys: so those grow with the length, and a tile, where no block is masked, is one."""
    block = _divisor(length, BLOCK)
    keys = _divisor(length, max(BLOCK, length // DQ_PARTS)) if causal else length
    return splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block,
                             block_q_dkv=block, block_kv_dkv=keys, block_kv_dkv_compute=_divisor(keys, BLOCK),
                             use_fused_bwd_kernel=True)


def _divisor(length: int, most: int) -> int:
    """The largest multiple of 128, at most `most`, that divides `length`."""
    return next(size for size in range(min(most, length) // LANES * LANES, 0, -LANES) if length % size == 0)


@functools.cache
def _kernel(heads: int, length: int, causal: bool, residuals: str, interpret: bool):
    """One kernel a shape; what it precomputes about the mask is constants."""
    mask = splash.CausalMask((length, length)) if causal else splash.FullMask((length, length))
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(splash.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1,
                                      block_sizes=block_sizes(length, causal=causal),
                                      residual_checkpoint_name=residuals, interpret=interpret)
