"""Runs more of a prompt on the cache of what came before it (design: model.md 11, lvtc.md 4).

A conversation asks again and again about what it has already read. `extend` runs the new part of a
prompt only: new tiles go through the tower, and new slots attend to the kept keys and to each
other. Keys keep their positions for good, so that the result is that of a whole prompt.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import RopeConfig
from internvlx_jax.models.decoder import KeyValues, KVCacheView
from internvlx_jax.models.generation import Cache, LayerRangeCache, Vocabulary, last_logits
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.layers import gather
from internvlx_jax.models.serving_slots import RowSampling, Slots, begin


def keeps_rotation(rope: RopeConfig, capacity: int) -> bool:
    """Returns whether keys are rotated alike in every cache of up to `capacity` slots.

    Scalings that depend on the length of a prompt rotate the keys of a longer one differently.
    """
    bound = {"dynamic": rope.max_positions, "su": rope.original_max_positions}
    bound["yarn"] = bound["su"]
    return capacity <= bound.get(rope.scaling, capacity)


def extend(
    model: InternVLX,
    slots: Slots,
    inputs: Inputs,
    kept: jax.Array,
    limit: jax.Array,
    sampling: RowSampling,
    *,
    vocabulary: Vocabulary,
) -> tuple[Slots, jax.Array]:
    """Runs the new part of a prompt in a single slot and chooses the first token of its answer.

    Args:
        model: The model.
        slots: One row, whose cache has room behind `kept` for the slots of `inputs`.
        inputs: The new part, padded on the right, with positions that go on from the kept ones.
        kept: int32[ranges], slots of each layer range that are kept; what is behind them is lost.
        limit: int32 scalar, tokens that the answer may have, at least 1.
        sampling: How the row chooses.
        vocabulary: Ids with a meaning.

    Returns:
        The row, and the first token, an int32 scalar.
    """
    held = slots.cache.ranges
    views = [KVCacheView(r.kv, r.segments, kept[i]) for i, r in enumerate(held)]
    hidden, kvs = model.run(inputs, keep_kv=True, earlier=views)
    segments = (inputs.segment_ids > 0).astype(jnp.int32)
    layouts = [segments]
    if inputs.short is not None:
        layouts = [gather(segments, inputs.short.short_to_long), segments]
    ranges = tuple(
        _joined(old, new, layout, kept[i])
        for i, (old, new, layout) in enumerate(zip(held, kvs, layouts, strict=True))
    )
    position = kept[-1:] + segments.sum(axis=1)
    return begin(
        slots,
        Cache(ranges, position),
        last_logits(model, hidden, segments),
        jnp.int32(0),
        limit,
        sampling,
        vocabulary,
    )


def _joined(old: LayerRangeCache, new: Any, segments: jax.Array, kept: jax.Array) -> Any:
    """Returns the cache of a layer range with new slots behind the kept ones."""

    def write(held: jax.Array, fresh: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(held, fresh.astype(held.dtype), kept, axis=axis)

    new = new if isinstance(old.kv, KeyValues) else tuple(new)
    kv = jax.tree.map(lambda held, fresh: write(held, fresh, held.ndim - 3), old.kv, new)
    slot = (kept + segments.sum(axis=1)).astype(jnp.int32)
    return LayerRangeCache(kv, write(old.segments, segments, 1), slot)


def enlarged(slots: Slots, capacity: int) -> Slots:
    """Returns the same rows with room for `capacity` tokens each."""

    def longer(x: jax.Array, axis: int) -> jax.Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, capacity - x.shape[axis])
        return jnp.pad(x, pad)

    ranges = tuple(
        LayerRangeCache(
            jax.tree.map(lambda x: longer(x, x.ndim - 3), held.kv),
            longer(held.segments, 1),
            held.slot,
        )
        for held in slots.cache.ranges
    )
    return slots._replace(cache=slots.cache._replace(ranges=ranges))
