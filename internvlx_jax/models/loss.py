"""Cross entropy on shifted labels, evaluated in sequence chunks (spec: model.md 10, training.md 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from internvlx_jax.models.decoder import Decoder
from internvlx_jax.models.inputs import IGNORED

CHUNK = 512


def shift_left(x: jax.Array, fill: int | float) -> jax.Array:
    """[B, S] -> value of the next slot; the last slot gets `fill`."""
    return jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], fill)], axis=1)


def token_losses(decoder: Decoder, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per-slot loss and hit of the next label; logits exist for one chunk at a time, also in the backward pass.

    hidden: [B, S, D], labels: int32[B, S] unshifted, -100 ignored
    -> cross entropy float32[B, S] (0 where ignored), hit bool[B, S] (arg max is the label)
    """
    targets = shift_left(labels, IGNORED)
    length = targets.shape[1]
    chunks = -(-length // CHUNK)
    padding = ((0, 0), (0, chunks * CHUNK - length)) if chunks > 1 else ((0, 0), (0, 0))
    hidden = jnp.pad(hidden, (*padding, (0, 0)))
    targets = jnp.pad(targets, padding, constant_values=IGNORED)

    @jax.checkpoint
    def chunk_losses(_, chunk):
        x, target = chunk
        logits = decoder.logits(x)
        label = jnp.maximum(target, 0)[..., None]
        ce = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, label, axis=-1)[..., 0]
        hit = jnp.argmax(logits, axis=-1) == target
        return None, (jnp.where(target == IGNORED, 0.0, ce), hit)

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    _, (ce, hit) = jax.lax.scan(chunk_losses, None, (split(hidden), split(targets)))
    ce, hit = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length] for x in (ce, hit))
    return ce, hit


def weighted_loss(ce: jax.Array, loss_weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numerator and denominator of sum(w * ce) / sum(w); loss_weight[b, s] belongs to the label in slot s."""
    weight = shift_left(loss_weight, 0.0)
    return jnp.sum(weight * ce), jnp.sum(weight)
