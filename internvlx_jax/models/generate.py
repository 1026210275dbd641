"""Greedy generation with a static key/value cache (spec: model.md 11, lvtc.md 4)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from internvlx_jax.models.decoder import Frame, KeyValues, Past
from internvlx_jax.models.inputs import Inputs
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.merge import gather


class FrameCache(NamedTuple):
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

    frames: tuple[FrameCache, ...]
    position: jax.Array


def prefill(model: InternVLX, inputs: Inputs, room: int) -> tuple[Cache, jax.Array]:
    """Run the prompts and leave `room` free slots -> (cache, float32[B, W] logits of each row's last real token)."""
    hidden, kvs = model.run(inputs, keep_kv=True)
    segments = (inputs.segment_ids > 0).astype(jnp.int32)
    length = segments.shape[1]
    last = length - 1 - jnp.argmax(segments[:, ::-1], axis=1)
    logits = model.decoder.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def cache(kv: KeyValues, segments: jax.Array) -> FrameCache:
        kv = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))), kv)
        return FrameCache(kv, jnp.pad(segments, ((0, 0), (0, room))), jnp.int32(segments.shape[1]))

    all_segments = [segments] if inputs.short is None else [gather(segments, inputs.short.short_to_long), segments]
    return Cache(tuple(map(cache, kvs, all_segments)), segments.sum(axis=1)), logits


def decode_step(model: InternVLX, cache: Cache, tokens: jax.Array) -> tuple[Cache, jax.Array]:
    """Append one token a row: int32[B] -> (cache, float32[B, W] logits of the token after it)."""
    ones = jnp.ones_like(tokens)[:, None]
    frame = Frame(positions=cache.position[:, None], segments=ones)
    x = model.decoder.embed(tokens[:, None], model.dtype)
    key_length = cache.frames[-1].segments.shape[1]
    frames, start = [], 0
    for kv, segments, slot in cache.frames:
        segments = jax.lax.dynamic_update_slice_in_dim(segments, ones, slot, axis=1)
        stop = start + kv.keys.shape[0]
        x, new = model.decoder.run_layers(x, frame, start=start, stop=stop, past=Past(kv, segments, slot),
                                          key_length=key_length, keep_kv=True)
        kv = jax.tree.map(lambda old, fresh: jax.lax.dynamic_update_slice_in_dim(old, fresh, slot, axis=2), kv, new)
        frames.append(FrameCache(kv, segments, slot + 1))
        start = stop
    return Cache(tuple(frames), cache.position + 1), model.decoder.logits(x[:, 0])


def greedy(model: InternVLX, inputs: Inputs, *, max_new_tokens: int, stop_ids: tuple[int, ...],
           pad_id: int) -> tuple[jax.Array, jax.Array]:
    """Most likely continuation of each prompt (ties: lowest id).

    -> new tokens int32[B, max_new_tokens] and the number of steps actually run (int32). A row ends with its stop
    id; the slots behind it hold pad_id. Decoding ends when every row has stopped.
    """
    cache, logits = prefill(model, inputs, max_new_tokens)
    rows = logits.shape[0]
    stops = jnp.asarray(stop_ids, jnp.int32)

    def choose(step, logits, tokens, done):
        token = jnp.where(done, pad_id, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        return tokens.at[:, step].set(token), done | jnp.isin(token, stops), token

    def body(state):
        step, cache, tokens, done, token = state
        cache, logits = decode_step(model, cache, token)
        tokens, done, token = choose(step, logits, tokens, done)
        return step + 1, cache, tokens, done, token

    def unfinished(state):
        step, _, _, done, _ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    tokens = jnp.full((rows, max_new_tokens), pad_id, jnp.int32)
    # Rows without a prompt pad the batch: they are done from the start.
    empty = cache.position == 0
    tokens, done, token = choose(0, logits, tokens, empty)
    steps, _, tokens, _, _ = jax.lax.while_loop(unfinished, body, (jnp.int32(1), cache, tokens, done, token))
    return tokens, steps
