"""Generation with static key/value caches (design: model.md 11, lvtc.md 4, evaluation.md 3).

`start` runs the prompts and chooses the first token of every row; `advance` goes on from there, any
number of steps per call. So a caller can stream, look at the text in between, and end early. The
tokens of a row depend on its prompt and its key alone, not on its neighbors or its padding.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.models.decoder import KeyValues, KVCacheView, TokenLayout
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.layers import gather, move_bits, separate_layers


class LayerRangeCache(NamedTuple):
    """Holds keys and values of the decoder layers that share a token layout.

    Attributes:
        kv: [L, B, Z, K, H], Z = slots of the layout + new tokens; or, where the decoder's layers
            are separate, an entry [B, Z, K, H] for each.
        segments: int32[B, Z], 1 where a slot holds a real token; so prompts may be padded on
            either side.
        slot: int32 scalar, where the next token of every row is written; or int32[B], where that
            of each row is (models/serving_slots.py).
    """

    kv: KeyValues | tuple[KeyValues, ...]
    segments: jax.Array
    slot: jax.Array


class Cache(NamedTuple):
    """Holds the state between decoding steps.

    Attributes:
        ranges: One cache for all layers; with LVTC one for the shallow and one for the deep
            layers, whose prompts have different lengths (lvtc.md 4).
        position: int32[B], rotary position of the next token at every depth, which is the number
            of real tokens before it in the long layout.
    """

    ranges: tuple[LayerRangeCache, ...]
    position: jax.Array


def for_decoding(model: InternVLX) -> InternVLX:
    """Returns the same model in the arrangement that decodes fastest here.

    On a CPU and a GPU the decoder's layers become separate arrays, which are copies; see
    layers.separate_layers. On a CPU 16-bit kernels are turned as well; see layers.Linear. Elsewhere
    the result is `model` itself.
    """
    if jax.default_backend() not in ("cpu", "gpu"):
        return model
    other = nnx.merge(*nnx.split(model))
    other.decoder.layers = separate_layers(model.decoder.layers, model.config.decoder.layers)
    if other.decoder.on_cpu and model.dtype.itemsize == 2:
        other.decoder.turn()
    return other


def prefill(model: InternVLX, inputs: Inputs, max_new_tokens: int) -> tuple[Cache, jax.Array]:
    """Runs the prompts and leaves `max_new_tokens` free slots.

    Returns:
        The cache, and float32[B, W], the logits of each row's last real token.
    """
    hidden, kvs = model.run(inputs, keep_kv=True)
    segments = (inputs.segment_ids > 0).astype(jnp.int32)
    logits = last_logits(model, hidden, segments)

    def extended(prompt: KeyValues, segments: jax.Array) -> LayerRangeCache:
        free = (0, max_new_tokens)
        padded: KeyValues = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, 0), free, (0, 0), (0, 0))), prompt
        )
        if isinstance(model.decoder.layers, nnx.List):
            by_layer = tuple(KeyValues(*pair) for pair in zip(*padded, strict=True))
            return LayerRangeCache(
                by_layer, jnp.pad(segments, ((0, 0), free)), jnp.int32(segments.shape[1])
            )
        return LayerRangeCache(
            padded, jnp.pad(segments, ((0, 0), free)), jnp.int32(segments.shape[1])
        )

    layouts = [segments]
    if inputs.short is not None:
        layouts = [gather(segments, inputs.short.short_to_long), segments]
    kept = cast(list[KeyValues], kvs)
    ranges = tuple(extended(*pair) for pair in zip(kept, layouts, strict=True))
    return Cache(ranges, segments.sum(axis=1)), logits


def last_logits(model: InternVLX, hidden: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns float32[B, W], the logits of each row's last slot that is not padding."""
    last = segments.shape[1] - 1 - jnp.argmax(segments[:, ::-1], axis=1)
    return model.decoder.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def decode_step(model: InternVLX, cache: Cache, tokens: jax.Array) -> tuple[Cache, jax.Array]:
    """Appends one token per row, int32[B].

    Returns:
        The cache, and float32[B, W], the logits of the token after it.
    """
    ones = jnp.ones_like(tokens)[:, None]
    layout = TokenLayout(positions=cache.position[:, None], segments=ones)
    x = model.decoder.embed(tokens[:, None], model.dtype)
    # The deep layers have the longest cache; it fixes the rope base of the shallow ones as well.
    key_length = cache.ranges[-1].segments.shape[1]
    ranges, start = [], 0
    for kv, segments, slot in cache.ranges:
        segments = _write(segments, ones, slot, axis=1)
        stop = start + (len(kv.keys) if isinstance(kv, KeyValues) else len(kv))
        x, new = model.decoder.run_layers(
            x,
            layout,
            start=start,
            stop=stop,
            cache=KVCacheView(kv, segments, slot),
            key_length=key_length,
            keep_kv=True,
        )

        def write(old: jax.Array, fresh: jax.Array, slot: jax.Array = slot) -> jax.Array:
            update = functools.partial(_write, slot=slot, axis=old.ndim - 3)
            fresh = fresh.astype(old.dtype)
            return move_bits(update, old, fresh) if model.decoder.turned else update(old, fresh)

        new = new if isinstance(kv, KeyValues) or new is None else tuple(new)
        ranges.append(LayerRangeCache(jax.tree.map(write, kv, new), segments, slot + 1))
        start = stop
    return Cache(tuple(ranges), cache.position + 1), model.decoder.logits(x[:, 0])


def _write(old: jax.Array, fresh: jax.Array, slot: jax.Array, *, axis: int) -> jax.Array:
    """Writes one token per row along `axis`, all rows at one slot or each at its own.

    Args:
        old: [..., B, Z, ...], Z at `axis` and the rows before it.
        fresh: The same with 1 in place of Z.
        slot: int32 scalar, or int32[B].
        axis: Of the slots.
    """
    if slot.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(old, fresh, slot, axis=axis)
    where = (*[slice(None)] * (axis - 1), jnp.arange(len(slot)), slot)
    return old.at[where].set(fresh.squeeze(axis), mode="drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids that have a meaning while decoding.

    Attributes:
        stop_ids: Ids that end a row.
        pad_id: Fills a row that has ended.
        bos_id: Counts as written from the start for the repetition penalty.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    bos_id: int


class Decoding(NamedTuple):
    """Holds rows in the middle of their answers; R is the largest number of new tokens.

    Attributes:
        cache: Keys and values of everything before `last`.
        tokens: int32[B, R], the tokens written so far, then pad.
        done: bool[B], rows that have stopped; rows without a prompt are done from the start.
        last: int32[B], newest token of each row.
        step: int32 scalar, tokens written.
        written: bool[B, W], ids that occur in the answer; without a repetition penalty bool[B, 0].
        keys: key[B], randomness of each row.
    """

    cache: Cache
    tokens: jax.Array
    done: jax.Array
    last: jax.Array
    step: jax.Array
    written: jax.Array
    keys: jax.Array


def start(
    model: InternVLX,
    inputs: Inputs,
    keys: jax.Array,
    min_new_tokens: jax.Array | int,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    vocabulary: Vocabulary,
) -> Decoding:
    """Runs the prompts and chooses each row's first token.

    Args:
        model: The model.
        inputs: Prompts, padded on either side; rows without a prompt are allowed.
        keys: key[B], used with a temperature; see `row_keys`.
        min_new_tokens: Tokens that come before a stop id may.
        max_new_tokens: Slots for new tokens, static: another value is another executable.
        sampling: How tokens are chosen.
        vocabulary: Ids with a meaning.
    """
    cache, logits = prefill(model, inputs, max_new_tokens)
    rows, words = logits.shape
    written = jnp.zeros((rows, words if sampling.repetition_penalty != 1 else 0), bool)
    if sampling.repetition_penalty != 1:
        written = written.at[:, vocabulary.bos_id].set(True)
    tokens = jnp.full((rows, max_new_tokens), vocabulary.pad_id, jnp.int32)
    empty = ~jnp.any(inputs.segment_ids > 0, axis=1)
    state = Decoding(
        cache, tokens, empty, jnp.zeros((rows,), jnp.int32), jnp.int32(0), written, keys
    )
    return _append(state, logits, min_new_tokens, sampling, vocabulary)


def advance(
    model: InternVLX,
    state: Decoding,
    until: jax.Array | int,
    min_new_tokens: jax.Array | int,
    *,
    sampling: Sampling,
    vocabulary: Vocabulary,
) -> Decoding:
    """Goes on until `until` tokens are written or every row has stopped.

    Args:
        model: The model.
        state: Of `start` or `advance`.
        until: At most the `max_new_tokens` that `start` left room for.
        min_new_tokens, sampling, vocabulary: Those given to `start`.
    """

    def unfinished(state: Decoding):
        return (state.step < jnp.minimum(until, state.tokens.shape[1])) & ~jnp.all(state.done)

    def body(state: Decoding):
        cache, logits = decode_step(model, state.cache, state.last)
        return _append(state._replace(cache=cache), logits, min_new_tokens, sampling, vocabulary)

    return jax.lax.while_loop(unfinished, body, state)


def _append(
    state: Decoding,
    logits: jax.Array,
    min_new_tokens: jax.Array | int,
    sampling: Sampling,
    vocabulary: Vocabulary,
) -> Decoding:
    """Writes one more token per row, chosen from logits float32[B, W]."""
    stops = jnp.asarray(vocabulary.stop_ids, jnp.int32)
    with jax.named_scope("choose_token"):
        if sampling.repetition_penalty != 1:
            r = sampling.repetition_penalty
            logits = jnp.where(state.written, jnp.where(logits > 0, logits / r, logits * r), logits)
        early = jnp.where(state.step < min_new_tokens, -jnp.inf, logits[:, stops])
        token = choose(logits.at[:, stops].set(early), state.keys, state.step, sampling)
        token = jnp.where(state.done, vocabulary.pad_id, token).astype(jnp.int32)
    written = state.written
    if sampling.repetition_penalty != 1:
        written = written.at[jnp.arange(len(token)), token].set(True)
    return state._replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(
            state.tokens, token[:, None], state.step, axis=1
        ),
        done=state.done | jnp.isin(token, stops),
        last=token,
        step=state.step + 1,
        written=written,
    )


def choose(logits: jax.Array, keys: jax.Array, step: jax.Array, sampling: Sampling) -> jax.Array:
    """Chooses one id per row.

    Args:
        logits: float32[B, W].
        keys: key[B], randomness of each row's whole answer.
        step: int32 scalar, position in the answer.
        sampling: How tokens are chosen.

    Returns:
        int32[B].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ascending = jnp.sort(logits, axis=-1)
        dropped = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - sampling.top_p
        # The best id always stays, even where rounding puts the whole sum at 1 - p or below.
        least = jnp.minimum(jnp.sum(dropped, axis=-1), logits.shape[-1] - 1)
        threshold = jnp.take_along_axis(ascending, least[:, None], axis=-1)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits)


def row_keys(seed: int, rows: jax.Array) -> jax.Array:
    """Returns key[B] for row numbers int32[B]: a sample keeps its randomness in any batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.asarray(rows, jnp.uint32)
    )


def greedy(
    model: InternVLX, inputs: Inputs, *, max_new_tokens: int, stop_ids: tuple[int, ...], pad_id: int
) -> tuple[jax.Array, jax.Array]:
    """Decodes the most likely continuation of each prompt in one call.

    Returns:
        New tokens int32[B, max_new_tokens] and the number of steps run, an int32 scalar. A row
        ends with its stop id, and the slots behind it hold `pad_id`. Decoding ends when every row
        has stopped.
    """
    options: dict[str, Any] = dict(
        sampling=Sampling(), vocabulary=Vocabulary(stop_ids=stop_ids, pad_id=pad_id, bos_id=pad_id)
    )
    keys = row_keys(0, jnp.arange(len(inputs.tokens)))
    state = start(model, inputs, keys, 0, max_new_tokens=max_new_tokens, **options)
    state = advance(model, state, max_new_tokens, 0, **options)
    return state.tokens, state.step
