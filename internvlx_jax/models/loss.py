"""Cross entropy on shifted labels (design: model.md 10, training.md 4).

Logits are the largest array of a step: 92,553 float32 per slot. They exist for one chunk of slots
at a time, in the backward pass too, which computes them again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import NamedSharding

from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.models.decoder import Decoder

ALIGNED = 128  # what the columns of a large head are padded to a multiple of
CHUNK = 1024  # slots whose logits exist at a time: 0.4 GB at 92,553 rows of the vocabulary


class LossShardings(NamedTuple):
    """Says how a mesh divides the loss.

    Attributes:
        slots: Sharding of labels [B, S] by rows, and by slots along the axis that divides
            attention heads: the vocabulary's size divides by nothing.
        rows: Takes the place of `slots` where that is uneven.
        head: Sharding of the output head [D, W] by its width.
        whole: Takes the place of `head` where that is uneven.
    """

    slots: NamedSharding
    rows: NamedSharding
    head: NamedSharding
    whole: NamedSharding


def shift_left(x: jax.Array, fill: int | float) -> jax.Array:
    """Moves [B, S] so that each slot has the value of the next one; the last gets `fill`."""
    return jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], fill)], axis=1)


def token_losses(
    decoder: Decoder, hidden: jax.Array, labels: jax.Array, shardings: LossShardings | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes loss and hit of the next label for every slot.

    Args:
        decoder: Its final norm and head are applied here.
        hidden: [B, S, D] after the last block.
        labels: int32[B, S], unshifted; -100 is ignored.
        shardings: On a mesh: every device gathers the head once and does its own slots. Left to
            itself the compiler sums the gradient of the head over all devices after every chunk.

    Returns:
        Cross entropy float32[B, S], 0 where ignored; hit bool[B, S], true where the arg max is the
        label.
    """
    targets = shift_left(labels, IGNORED)
    hidden, head = decoder.norm(hidden), decoder.head_kernel.astype(hidden.dtype)
    if shardings is None:
        return _losses(hidden, head, targets)
    slots = _dividing(targets.shape, shardings.slots, shardings.rows)
    split = _dividing(head.shape, shardings.head, shardings.whole)

    def on_one_device(hidden, head, targets):
        if split is shardings.head:
            head = jax.lax.all_gather(head, split.spec[0], axis=0, tiled=True)
        return _losses(hidden, head, targets)

    return jax.shard_map(
        on_one_device,
        mesh=slots.mesh,
        in_specs=(slots.spec, split.spec, slots.spec),
        out_specs=slots.spec,
        check_vma=False,
    )(hidden, head, targets)


def _dividing(
    shape: tuple[int, ...], sharding: NamedSharding, otherwise: NamedSharding
) -> NamedSharding:
    """Returns `sharding` if it divides an array of this shape evenly."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return otherwise
    return sharding


def _losses(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `token_losses`, of normalized [B, S, D], head [D, W] and shifted labels int32[B, S]."""
    rows, words = len(targets), head.shape[1]
    hidden, targets = rearrange(hidden, "b s d -> (b s) d"), rearrange(targets, "b s -> (b s)")
    count = len(targets)
    chunks = -(-count // CHUNK)
    padding = (0, chunks * CHUNK - count) if chunks > 1 else (0, 0)
    hidden, targets = (
        jnp.pad(hidden, (padding, (0, 0))),
        jnp.pad(targets, padding, constant_values=IGNORED),
    )
    # Products of 92,553 columns are slow: rows of the matrix begin at odd addresses.
    head = jnp.pad(head, ((0, 0), (0, -words % ALIGNED if words > ALIGNED else 0)))
    losses: Any = _chunked_losses(
        words,
        rearrange(hidden, "(c n) d -> c n d", c=chunks),
        head,
        rearrange(targets, "(c n) -> c n", c=chunks),
    )
    ce, hit = (
        rearrange(rearrange(x, "c n -> (c n)")[:count], "(b s) -> b s", b=rows) for x in losses
    )
    return ce, hit


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_losses(words: int, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> Any:
    """As `_losses`, of chunks [C, N, D] and int32[C, N].

    The backward pass is written out because the automatic one would multiply float32 gradients of
    logits with a bfloat16 head, which computes in float32, and would cast the head for each chunk.

    Args:
        words: W; columns of the head behind it are padding.
        hidden, head, targets: See above.
    """
    return _forward(words, hidden, head, targets)[0]


def _logits(words: int, x: jax.Array, head: jax.Array) -> jax.Array:
    """Computes float32[N, W + padding] of [N, D]; padding is the least float."""
    with jax.named_scope("head"):
        logits = jnp.einsum("nd,dw->nw", x, head, preferred_element_type=jnp.float32)
    if words == head.shape[1]:
        return logits
    return jnp.where(jnp.arange(head.shape[1]) < words, logits, jnp.finfo(jnp.float32).min)


def _forward(words: int, hidden: jax.Array, head: jax.Array, targets: jax.Array):
    def chunk_losses(_, chunk):
        x, target = chunk
        logits = _logits(words, x, head)
        label = jnp.maximum(target, 0)[:, None]
        total = jax.nn.logsumexp(logits, axis=-1)
        ce = total - jnp.take_along_axis(logits, label, axis=-1)[:, 0]
        hit = jnp.argmax(logits, axis=-1) == target
        return None, ((jnp.where(target == IGNORED, 0.0, ce), hit), total)

    _, (losses, totals) = jax.lax.scan(chunk_losses, None, (hidden, targets))
    return losses, (hidden, head, targets, totals)


def _backward(words: int, kept, gradients):
    hidden, head, targets, totals = kept

    def chunk_gradients(head_gradient, chunk):
        x, target, total, gradient = chunk
        probability = jnp.exp(_logits(words, x, head) - total[:, None])
        is_label = jnp.arange(head.shape[1]) == target[:, None]
        gradient = jnp.where(target == IGNORED, 0.0, gradient)[:, None]
        of_logits = (gradient * (probability - is_label)).astype(x.dtype)
        # Summed over the chunks in float32.
        head_gradient += jnp.einsum("nd,nw->dw", x, of_logits, preferred_element_type=jnp.float32)
        return head_gradient, jnp.einsum("nw,dw->nd", of_logits, head)

    head_gradient, hidden_gradient = jax.lax.scan(
        chunk_gradients,
        jnp.zeros(head.shape, jnp.float32),
        (hidden, targets, totals, gradients[0]),
    )
    return hidden_gradient, head_gradient.astype(head.dtype), None


_chunked_losses.defvjp(_forward, _backward)


def weighted_loss(ce: jax.Array, loss_weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns numerator and denominator of the mean loss, sum(w * ce) / sum(w).

    Both are sums, so that a batch may be split over devices and micro-batches before dividing.

    Args:
        ce: float32[B, S] of `token_losses`.
        loss_weight: float32[B, S]; the weight in slot s belongs to the label in slot s.
    """
    weight = shift_left(loss_weight, 0.0)
    return jnp.sum(weight * ce), jnp.sum(weight)
