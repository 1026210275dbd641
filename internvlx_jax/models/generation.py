"""Generation with static key/value caches, greedy or sampled (design: model.md 11, lvtc.md 4, evaluation.md 3).

`start` runs the prompts and chooses the first token of every row, `advance` goes on from there, any number of steps a
call. So a caller can stream, look at the text in between, and end early. What a row gets depends on its prompt and its
key alone, not on its neighbours or its padding.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.models.decoder import KeyValues, KVCacheView, TokenLayout
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.layers import gather, separate_layers


class LayerRangeCache(NamedTuple):
    """Keys and values of the layers that share a frame.

    Attributes:
        kv: [L, B, Z, K, H], Z = slots of the frame + new tokens.
        segments: int32[B, Z], 1 where a slot holds a real token; so prompts may be padded on either side.
        slot: int32 scalar, where the next token of every row is written.
    """

    kv: KeyValues
    segments: jax.Array
    slot: jax.Array


class Cache(NamedTuple):
    """State between decoding steps.

    Attributes:
        frames: the one cache of all layers; with LVTC those of the shallow and of the deep layers (lvtc.md 4).
        position: int32[B], rotary position of the next token at every depth = number of real tokens before it.
    """

    ranges: tuple[LayerRangeCache, ...]
    position: jax.Array


def for_decoding(model: InternVLX) -> InternVLX:
    """The same model in the layout that decodes fastest here: on a CPU with separate decoder layers, which are copies."""
    if jax.default_backend() != "cpu":
        return model
    other = nnx.merge(*nnx.split(model))
    other.decoder.layers = separate_layers(model.decoder.layers, model.config.decoder.layers)
    return other


def prefill(model: InternVLX, inputs: Inputs, max_new_tokens: int) -> tuple[Cache, jax.Array]:
    """Run the prompts and leave `room` free slots -> (cache, float32[B, W] logits of each row's last real token)."""
    hidden, kvs = model.run(inputs, keep_kv=True)
    segments = (inputs.segment_ids > 0).astype(jnp.int32)
    length = segments.shape[1]
    last = length - 1 - jnp.argmax(segments[:, ::-1], axis=1)
    logits = model.decoder.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def cache(kv: KeyValues, segments: jax.Array) -> LayerRangeCache:
        kv = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0))), kv
        )
        return LayerRangeCache(
            kv, jnp.pad(segments, ((0, 0), (0, max_new_tokens))), jnp.int32(segments.shape[1])
        )

    all_segments = (
        [segments]
        if inputs.short is None
        else [gather(segments, inputs.short.short_to_long), segments]
    )
    return Cache(tuple(map(cache, kvs, all_segments)), segments.sum(axis=1)), logits


def decode_step(model: InternVLX, cache: Cache, tokens: jax.Array) -> tuple[Cache, jax.Array]:
    """Append one token a row: int32[B] -> (cache, float32[B, W] logits of the token after it)."""
    ones = jnp.ones_like(tokens)[:, None]
    frame = TokenLayout(positions=cache.position[:, None], segments=ones)
    x = model.decoder.embed(tokens[:, None], model.dtype)
    key_length = cache.ranges[-1].segments.shape[1]
    frames, start = [], 0
    for kv, segments, slot in cache.ranges:
        segments = jax.lax.dynamic_update_slice_in_dim(segments, ones, slot, axis=1)
        stop = start + kv.keys.shape[0]
        x, new = model.decoder.run_layers(
            x,
            frame,
            start=start,
            stop=stop,
            cached=KVCacheView(kv, segments, slot),
            key_length=key_length,
            keep_kv=True,
        )
        kv = jax.tree.map(
            lambda old, fresh: jax.lax.dynamic_update_slice_in_dim(old, fresh, slot, axis=2),
            kv,
            new,
        )
        frames.append(LayerRangeCache(kv, segments, slot + 1))
        start = stop
    return Cache(tuple(frames), cache.position + 1), model.decoder.logits(x[:, 0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids with a meaning while decoding: which ones end a row, what fills it then, what counts as its start."""

    stop_ids: tuple[int, ...]
    pad_id: int
    bos_id: int


class Decoding(NamedTuple):
    """Rows in the middle of their answers.

    Attributes:
        tokens: int32[B, R], what is written so far, then pad; R is the room.
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
    """Run the prompts, choose each row's first token.

    keys: key[B], used with a temperature. min_new_tokens: as many tokens come before a stop id may. room: most new
    tokens (static).
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
    """Go on until `until` tokens are written (at most the room) or every row has stopped."""

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
    """Write one more token a row, chosen from float32[B, W]."""
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
    """float32[B, W] -> int32[B], one id a row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ascending = jnp.sort(logits, axis=-1)
        dropped = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - sampling.top_p
        # The best one always stays.
        least = jnp.minimum(jnp.sum(dropped, axis=-1), logits.shape[-1] - 1)
        logits = jnp.where(
            logits < jnp.take_along_axis(ascending, least[:, None], axis=-1), -jnp.inf, logits
        )
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits)


def row_keys(seed: int, rows: jax.Array) -> jax.Array:
    """key[B]: one for each row number int32[B], so that a sample keeps its randomness in any batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.asarray(rows, jnp.uint32)
    )


def greedy(
    model: InternVLX, inputs: Inputs, *, max_new_tokens: int, stop_ids: tuple[int, ...], pad_id: int
) -> tuple[jax.Array, jax.Array]:
    """Most likely continuation of each prompt in one call.

    -> new tokens int32[B, max_new_tokens] and the number of steps run (int32). A row ends with its stop id; the slots
    behind it hold pad_id. Decoding ends when every row has stopped.
    """
    options = dict(
        sampling=Sampling(), vocabulary=Vocabulary(stop_ids=stop_ids, pad_id=pad_id, bos_id=pad_id)
    )
    state = start(
        model,
        inputs,
        row_keys(0, jnp.arange(len(inputs.tokens))),
        0,
        max_new_tokens=max_new_tokens,
        **options,
    )
    state = advance(model, state, max_new_tokens, 0, **options)
    return state.tokens, state.step
