"""Causal, segment-masked grouped-query attention of the decoder (spec: model.md 8)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, q_segments: jax.Array, kv_segments: jax.Array,
           q_start: jax.Array | int = 0) -> jax.Array:
    """Softmax in float32, causal by slot, within equal segments.

    q: [B, S, K, J, H], k, v: [B, Z, K, H]  ->  [B, S, K, J, H]
    q_segments: int32[B, S], kv_segments: int32[B, Z]; 0 marks padding, which sees padding only and so stays finite.
    q_start: slot of the first query among the keys (a traced scalar while decoding).
    """
    slots, key_slots = q_start + jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    visible = (key_slots <= slots[:, None]) & (q_segments[:, :, None] == kv_segments[:, None, :])  # [B, S, Z]
    scores = jnp.einsum("bskjh,bzkh->bkjsz", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkjsz,bzkh->bskjh", weights, v)
