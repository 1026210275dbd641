"""Rows that begin and end apart from each other, in caches of one static shape.

`models/generation.py` runs a batch from its prompts to its last answer. Here a batch has a fixed
number of rows, called slots: `admit` runs one prompt and puts it into a free slot, `decode` writes
tokens in all slots that are busy, whatever each of them is doing. So a batch never ends, and a new
prompt waits for the next step only (continuous batching, design: serving.md 2).

Dims: N slots, Z tokens that a slot holds, W ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.inputs import Array, Inputs
from internvlx_jax.models.decoder import KeyValues
from internvlx_jax.models.generation import (
    Cache,
    LayerRangeCache,
    Vocabulary,
    decode_step,
    prefill,
    row_keys,
)
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.sharding import param_spec, replicated


class RowSampling(NamedTuple):
    """Says how each row chooses its tokens; the fields are those of `Sampling`, one entry a row.

    Attributes:
        temperature: float32[N].
        top_k: int32[N].
        top_p: float32[N].
        repetition_penalty: float32[N].
        keys: key[N], randomness of the whole answer.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    repetition_penalty: Array
    keys: Array


class Slots(NamedTuple):
    """Holds all rows between two steps.

    Attributes:
        cache: Keys and values, with a length of its own for each row.
        last: int32[N], newest token of each row.
        step: int32[N], tokens written.
        limit: int32[N], tokens that an answer may have.
        active: bool[N], rows that are in the middle of an answer.
        written: bool[N, W], ids that occur in the answer, for the repetition penalty.
        sampling: How each row chooses.
    """

    cache: Cache
    last: jax.Array
    step: jax.Array
    limit: jax.Array
    active: jax.Array
    written: jax.Array
    sampling: RowSampling


def one_row(sampling: Sampling, seed: int, number: int) -> RowSampling:
    """Returns how one row chooses, from the options of its request.

    Args:
        sampling: How it chooses.
        seed: Randomness of the request.
        number: Number of the request, which gives it randomness of its own.
    """
    return RowSampling(
        temperature=np.array([sampling.temperature], np.float32),
        top_k=np.array([sampling.top_k], np.int32),
        top_p=np.array([sampling.top_p], np.float32),
        repetition_penalty=np.array([sampling.repetition_penalty], np.float32),
        keys=_keys(np.uint32(seed), np.array([number], np.uint32)),
    )


_keys = jax.jit(row_keys)


def empty_slots(model: InternVLX, slots: int, capacity: int) -> Slots:
    """Returns free slots, each with room for `capacity` tokens of prompt and answer."""
    config = model.config.decoder
    parts = (config.layers,)
    if model.config.lvtc is not None:
        shallow = model.config.lvtc.expand_layer
        parts = (shallow, config.layers - shallow)
    shape = (slots, capacity, config.kv_heads, config.head_dim)

    def layers(count: int) -> KeyValues | tuple[KeyValues, ...]:
        if not isinstance(model.decoder.layers, nnx.List):
            return _zeros((count, *shape), model.dtype)
        return tuple(_zeros(shape, model.dtype) for _ in range(count))

    def per_row(dtype: Any) -> jax.Array:
        return jnp.zeros((slots,), dtype)

    ranges = tuple(
        LayerRangeCache(layers(count), jnp.zeros((slots, capacity), jnp.int32), per_row(jnp.int32))
        for count in parts
    )
    return Slots(
        Cache(ranges, per_row(jnp.int32)),
        last=per_row(jnp.int32),
        step=per_row(jnp.int32),
        limit=per_row(jnp.int32),
        active=per_row(bool),
        written=jnp.zeros((slots, config.vocab_size), bool),
        sampling=RowSampling(
            temperature=per_row(jnp.float32),
            top_k=per_row(jnp.int32),
            top_p=jnp.ones((slots,), jnp.float32),
            repetition_penalty=jnp.ones((slots,), jnp.float32),
            keys=jax.random.split(jax.random.key(0), slots),
        ),
    )


def slot_shardings(slots: Any, mesh: Mesh) -> Any:
    """Returns where each array of `Slots` lives: heads as in the model, the rest everywhere."""

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if leaf.ndim < 4:
            return replicated(mesh)
        axes = (*[None] * (leaf.ndim - 2), "kv_heads", None)
        return NamedSharding(mesh, param_spec(leaf.shape, axes, mesh))

    return jax.tree.map(sharding, slots)


def _zeros(shape: tuple[int, ...], dtype: Any) -> KeyValues:
    return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def admit(
    model: InternVLX,
    slots: Slots,
    inputs: Inputs,
    slot: jax.Array,
    limit: jax.Array,
    sampling: RowSampling,
    *,
    vocabulary: Vocabulary,
) -> tuple[Slots, jax.Array]:
    """Runs one prompt, puts it into a slot and chooses its first token.

    Args:
        model: The model.
        slots: All rows.
        inputs: One prompt, padded on the right.
        slot: int32 scalar, the row to take; what it held is lost.
        limit: int32 scalar, tokens that the answer may have, at least 1.
        sampling: How this row chooses, one entry each.
        vocabulary: Ids with a meaning.

    Returns:
        All rows, and the first token, an int32 scalar.
    """
    prompt, logits = prefill(model, inputs, 0)

    def put(whole: jax.Array, row: jax.Array) -> jax.Array:
        """Writes [..., 1, n, ...] into the first n places of the slot, [..., N, Z, ...]."""
        first: list[Any] = [0] * whole.ndim
        first[-4] = slot
        return jax.lax.dynamic_update_slice(whole, row.astype(whole.dtype), first)

    ranges = []
    for held, new in zip(slots.cache.ranges, prompt.ranges, strict=True):
        length = new.segments.sum()
        taken = (jnp.arange(held.segments.shape[1]) < length).astype(jnp.int32)
        kv = jax.tree.map(put, held.kv, new.kv)
        ranges.append(
            LayerRangeCache(kv, held.segments.at[slot].set(taken), held.slot.at[slot].set(length))
        )
    position = slots.cache.position.at[slot].set(prompt.position[0])
    cache = Cache(tuple(ranges), position)
    return begin(slots, cache, logits, slot, limit, sampling, vocabulary)


def begin(
    slots: Slots,
    cache: Cache,
    logits: jax.Array,
    slot: jax.Array,
    limit: jax.Array,
    sampling: RowSampling,
    vocabulary: Vocabulary,
) -> tuple[Slots, jax.Array]:
    """Chooses the first token of the prompt that a slot holds.

    Args:
        slots: All rows, as they were.
        cache: All rows, with the prompt in its slot.
        logits: float32[1, W], of the prompt's last token.
        slot, limit, sampling, vocabulary: See `admit`.

    Returns:
        All rows, and the token, an int32 scalar.
    """

    def at(whole: jax.Array, value: Any) -> jax.Array:
        return whole.at[slot].set(value)

    written = jnp.zeros_like(slots.written[:1]).at[:, vocabulary.bos_id].set(True)
    token = choose_for_rows(logits, written, jnp.zeros((1,), jnp.int32), sampling)[0]
    stopped = jnp.isin(token, jnp.asarray(vocabulary.stop_ids, jnp.int32))
    slots = Slots(
        cache,
        last=at(slots.last, token),
        step=at(slots.step, 1),
        limit=at(slots.limit, limit),
        active=at(slots.active, ~stopped & (limit > 1)),
        written=at(slots.written, written[0].at[token].set(True)),
        sampling=jax.tree.map(lambda whole, row: at(whole, row[0]), slots.sampling, sampling),
    )
    return slots, token


def decode(
    model: InternVLX,
    slots: Slots,
    released: jax.Array,
    steps: jax.Array,
    *,
    most: int,
    vocabulary: Vocabulary,
) -> tuple[Slots, jax.Array]:
    """Writes up to `steps` tokens in every busy slot.

    Args:
        model: The model.
        slots: All rows.
        released: bool[N], rows that nobody waits for any more; they are free from now on.
        steps: int32 scalar, at most `most`.
        most: Static: columns of the result.
        vocabulary: Ids with a meaning.

    Returns:
        All rows, and int32[N, most]: the new tokens of each row, then -1.
    """
    slots = slots._replace(active=slots.active & ~released)
    tokens = jnp.full((len(released), most), -1, jnp.int32)

    def unfinished(carry: tuple[jax.Array, Slots, jax.Array]) -> jax.Array:
        i, slots, _ = carry
        return (i < steps) & jnp.any(slots.active)

    def body(carry: tuple[jax.Array, Slots, jax.Array]) -> Any:
        i, slots, tokens = carry
        slots, token = _step(model, slots, vocabulary)
        column = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
        return i + 1, slots, column

    _, slots, tokens = jax.lax.while_loop(unfinished, body, (jnp.int32(0), slots, tokens))
    return slots, tokens


def _step(model: InternVLX, slots: Slots, vocabulary: Vocabulary) -> tuple[Slots, jax.Array]:
    """Writes one token in every busy slot; int32[N], -1 where none was written."""
    busy = slots.active
    cache, logits = decode_step(model, slots.cache, slots.last)
    # A row that is not busy wrote into the place that its next token will take.
    ranges = tuple(
        new._replace(slot=jnp.where(busy, new.slot, old.slot))
        for new, old in zip(cache.ranges, slots.cache.ranges, strict=True)
    )
    position = jnp.where(busy, cache.position, slots.cache.position)
    token = choose_for_rows(logits, slots.written, slots.step, slots.sampling)
    token = jnp.where(busy, token, slots.last)
    step = slots.step + busy
    stopped = jnp.isin(token, jnp.asarray(vocabulary.stop_ids, jnp.int32))
    rows = jnp.arange(len(token))
    slots = slots._replace(
        cache=Cache(ranges, position),
        last=token,
        step=step,
        active=busy & ~stopped & (step < slots.limit),
        written=slots.written.at[rows, token].max(busy),
    )
    return slots, jnp.where(busy, token, -1)


def choose_for_rows(
    logits: jax.Array, written: jax.Array, steps: jax.Array, sampling: RowSampling
) -> jax.Array:
    """Chooses one id per row as `generation.choose` does, each row in its own way.

    Args:
        logits: float32[N, W].
        written: bool[N, W], ids that the repetition penalty concerns.
        steps: int32[N], position of the token in the answer.
        sampling: How each row chooses.

    Returns:
        int32[N].
    """
    with jax.named_scope("choose_token"):
        r = sampling.repetition_penalty[:, None]
        logits = jnp.where(written, jnp.where(logits > 0, logits / r, logits * r), logits)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        drawn = sampling.temperature > 0

        def draw() -> jax.Array:
            divisor = jnp.where(drawn, sampling.temperature, 1)[:, None]
            kept = _keep_top(logits / divisor, sampling)
            keys = jax.vmap(jax.random.fold_in)(sampling.keys, steps)
            return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

        # Two sorts over all ids are left out while every row takes its best one.
        return jnp.where(drawn, jax.lax.cond(jnp.any(drawn), draw, lambda: best), best)


def _keep_top(logits: jax.Array, sampling: RowSampling) -> jax.Array:
    """Leaves the ids that top_k and top_p keep, and -inf elsewhere."""
    width = logits.shape[-1]
    k = sampling.top_k[:, None]
    ascending = jnp.sort(logits, axis=-1)
    kth = jnp.take_along_axis(ascending, jnp.clip(width - k, 0, width - 1), axis=-1)
    logits = jnp.where((k > 0) & (logits < kth), -jnp.inf, logits)
    ascending = jnp.where((k > 0) & (ascending < kth), -jnp.inf, ascending)
    p = sampling.top_p[:, None]
    dropped = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    least = jnp.minimum(jnp.sum(dropped, axis=-1, keepdims=True), width - 1)
    threshold = jnp.take_along_axis(ascending, least, axis=-1)
    return jnp.where((p < 1) & (logits < threshold), -jnp.inf, logits)
