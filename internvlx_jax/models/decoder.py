"""The language model: one decoder for all families (design: model.md 8, 9).

InternLM2, Llama, Qwen2, Qwen3 and Phi-3 differ in biases, norms of queries and keys, tied
embeddings and rope, all of which are fields of DecoderConfig, and in the tensor names of their
checkpoints, which are the business of the name table.

A call of `Decoder.run_range` takes the positions and segments of its slots as a `TokenLayout` and
runs any range of layers. That is the seam of LVTC (paper, section on layer-wise visual token
compression): two ranges of one stack, each on a layout of its own; see models/lvtc.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.core.model_config import DecoderConfig, LoraConfig, RopeConfig
from internvlx_jax.models.attention import DEFAULT_ATTENTION, SelfAttention, attend_cached
from internvlx_jax.models.layer_ranges import run_range
from internvlx_jax.models.layers import (
    Linear,
    RMSNorm,
    constant,
    normal,
    param,
    product,
    rematerialize,
    split_key,
    stack_layers,
)
from internvlx_jax.models.lora import WHOLE, make_linear


class TokenLayout(NamedTuple):
    """Describes the slots of a batch of sequences.

    Attributes:
        positions: int32[B, S], rotary position of each slot.
        segments: int32[B, S], 0 = padding; a slot attends within its own segment.
    """

    positions: jax.Array
    segments: jax.Array


class KeyValues(NamedTuple):
    """Holds keys and values of one layer, or of a stack of layers with a leading L.

    Attributes:
        keys: [B, S, K, H], rotated already: a cached key keeps its position for good.
        values: [B, S, K, H].
    """

    keys: jax.Array
    values: jax.Array


class KVCacheView(NamedTuple):
    """Describes the cached keys that a call attends to besides its own slots.

    Attributes:
        kv: Keys and values of all layers of the call, [L, B, Z, K, H]; or one entry
            [B, Z, K, H] for each, where the layers are separate.
        segments: int32[B, Z].
        start: int32 scalar, cache slot of the first query; slots from there on are not read.
            int32[B] where each row has its own.
    """

    kv: KeyValues | tuple[KeyValues, ...]
    segments: jax.Array
    start: jax.Array


# --- rotary positions, half rotation --------------------------------------------------------------
#
# Angles, cosines and the rotation itself are in float32: bfloat16 cannot tell positions beyond 256
# apart.


class RopeTables(NamedTuple):
    """Holds the rotation of each slot of one token layout.

    Attributes:
        cos, sin: float32[B, S, H/2].
    """

    cos: jax.Array
    sin: jax.Array


def rope_tables(
    config: RopeConfig, positions: jax.Array, head_dim: int, key_length: int
) -> RopeTables:
    """Computes the rotation of each slot.

    Args:
        config: Base and scaling.
        positions: int32[B, S].
        head_dim: H.
        key_length: Number of key slots of the call. Scaling beyond `max_positions` depends on
            length; a static number fixes one base for all keys, cached ones included.

    Raises:
        ValueError: `key_length` exceeds `config.max_positions` and `config.allow_longer` is off.
    """
    if key_length > config.max_positions and not config.allow_longer:
        raise ValueError(
            f"{key_length} key slots exceed the decoder's {config.max_positions} positions; "
            "shorten the input, or set decoder.rope.allow_longer=True to extrapolate"
        )
    theta, stretch = config.theta, 1.0
    if config.scaling == "linear":
        stretch = config.factor
    elif config.scaling == "dynamic" and key_length > config.max_positions:
        growth = config.factor * key_length / config.max_positions - (config.factor - 1)
        theta = theta * growth ** (head_dim / (head_dim - 2))
    inverse = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    scale = 1.0
    if config.scaling in ("su", "yarn"):
        is_long = jnp.max(positions) + 1 > config.original_max_positions
        stretch = jnp.where(
            is_long,
            *(jnp.asarray(f, jnp.float32) for f in (config.long_factor, config.short_factor)),
        )
        scale = _attention_scale(config)
    angles = positions.astype(jnp.float32)[..., None] * inverse / stretch
    return RopeTables(scale * jnp.cos(angles), scale * jnp.sin(angles))


def _attention_scale(config: RopeConfig) -> float:
    """Returns what `su` and `yarn` multiply cos and sin by (model.md 9)."""
    growth = config.max_positions / config.original_max_positions
    if growth <= 1:
        return 1.0
    if config.scaling == "yarn":
        return 0.1 * math.log(growth) + 1.0
    return math.sqrt(1 + math.log(growth) / math.log(config.original_max_positions))


def rotate(x: jax.Array, tables: RopeTables) -> jax.Array:
    """Rotates [B, S, ..., H] in float32 and casts back."""
    heads = (1,) * (x.ndim - 3)
    cos, sin = (t.reshape(*t.shape[:2], *heads, t.shape[-1]) for t in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


# --- layers ---------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Grouped-query attention.

    The packed kernel holds, per key/value head, its J queries, the key and the value. Its axis of
    key/value heads is the one that tensor parallelism divides, so a device has whole groups and
    attention needs no communication.
    """

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, **kwargs):
        d, k, j, h = config.width, config.kv_heads, config.group, config.head_dim
        init = normal(config.initializer_range)
        norm = kwargs.copy()
        kwargs |= dict(init=init, bias_init=constant(0.0), lora=lora)
        apart = config.family in ("llama", "qwen2", "qwen3")
        self.qkv = make_linear(
            "bsd,dkjh->bskjh",
            (d, k, j + 2, h),
            ("embed", "kv_heads", None, None),
            bias=config.qkv_bias,
            pieces=(("_q", j), ("_k", 1), ("_v", 1)) if apart else WHOLE,
            **kwargs,
        )
        self.out = make_linear(
            "bsnh,nhd->bsd", (k * j, h, d), ("heads", None, "embed"), bias=config.out_bias, **kwargs
        )
        # One weight for all heads, unlike the tower's norm over the whole width (model.md 9).
        self.q_norm = RMSNorm(h, eps=config.eps, **norm) if config.qk_norm else None
        self.k_norm = RMSNorm(h, eps=config.eps, **norm) if config.qk_norm else None
        self.window = config.sliding_window

    def __call__(
        self,
        x: jax.Array,
        layout: TokenLayout,
        tables: RopeTables,
        cache: KVCacheView | None,
        attention: SelfAttention,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, KeyValues]:
        """Attends to these slots, or to those of one layer's cache with these slots added.

        Returns:
            [B, S, D], and keys and values of these slots.
        """
        key1, key2 = split_key(dropout_key, 2)
        qkv = self.qkv(x, key1)
        q, k = qkv[..., :-2, :], qkv[..., -2, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, tables), rotate(k, tables)
        q, new = rearrange(q, "b s k j h -> b s (k j) h"), KeyValues(k, qkv[..., -1, :])
        if cache is None:
            y = attention(q, *new, layout.segments, causal=True, window=self.window)
            return self.out(y, key2), new
        assert isinstance(cache.kv, KeyValues)  # of this layer
        y = attend_cached(
            q,
            cache.kv,
            new,
            q_segments=layout.segments,
            kv_segments=cache.segments,
            start=cache.start,
            window=self.window,
        )
        return self.out(y, key2), new


class Mlp(nnx.Module):
    """The gated MLP (silu(x Wgate) * (x Wup)) Wdown; [B, S, D] -> [B, S, D]."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, **kwargs):
        d, f = config.width, config.mlp_width
        kwargs |= dict(init=normal(config.initializer_range), lora=lora)
        self.gate = make_linear("bsd,df->bsf", (d, f), ("embed", "mlp"), **kwargs)
        self.up = make_linear("bsd,df->bsf", (d, f), ("embed", "mlp"), **kwargs)
        self.down = make_linear("bsf,fd->bsd", (f, d), ("mlp", "embed"), **kwargs)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        key1, key2, key3 = split_key(dropout_key, 3)
        return self.down(jax.nn.silu(self.gate(x, key1)) * self.up(x, key2), key3)


class Block(nnx.Module):
    """A pre-norm decoder layer; arguments and results are those of `Attention`."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, **kwargs):
        self.attn_norm = RMSNorm(config.width, eps=config.eps, **kwargs)
        self.attn = Attention(config, lora, **kwargs)
        self.mlp_norm = RMSNorm(config.width, eps=config.eps, **kwargs)
        self.mlp = Mlp(config, lora, **kwargs)

    def __call__(
        self,
        x: jax.Array,
        layout: TokenLayout,
        tables: RopeTables,
        cache: KVCacheView | None,
        attention: SelfAttention,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, KeyValues]:
        key1, key2 = split_key(dropout_key, 2)
        y, new = self.attn(self.attn_norm(x), layout, tables, cache, attention, key1)
        x = x + y
        return x + self.mlp(self.mlp_norm(x), key2), new


class Decoder(nnx.Module):
    """Token embedding, stacked blocks, final norm and output head.

    Attributes:
        on_cpu: See layers.Linear.
        turned: Whether the arrays are as `turn` leaves them, the output head [W, D].
    """

    on_cpu = False
    turned = False

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        lora: LoraConfig | None = None,
    ):
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype)
        self.config, self.lora = config, lora
        w, d, init = config.vocab_size, config.width, normal(config.initializer_range)
        self.embedding = param(init, (w, d), ("vocab", "embed"), **kwargs)
        self.layers = stack_layers(
            lambda rngs: Block(config, lora, rngs=rngs, dtype=dtype), config.layers, rngs
        )
        self.norm = RMSNorm(d, eps=config.eps, **kwargs)
        self.head = (
            None if config.tie_embeddings else param(init, (d, w), ("embed", "vocab"), **kwargs)
        )

    def embed(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Looks up int32[B, S] -> dtype[B, S, D]."""
        table = self.embedding[...]
        if self.turned:  # else XLA:CPU makes a float32 table before it begins to decode
            table, tokens = jax.lax.optimization_barrier((table, tokens))
        return jnp.take(table, tokens, axis=0).astype(dtype)

    def run_layers(
        self, x: jax.Array, layout: TokenLayout, **options: Any
    ) -> tuple[jax.Array, KeyValues | list[KeyValues] | None]:
        """Runs the blocks on one layout; options and results are those of `run_range`."""
        return self.run_range(x, layout, **options)[:2]

    def run_range(
        self,
        x: jax.Array,
        layout: TokenLayout,
        *,
        start: int = 0,
        stop: int | None = None,
        layers: nnx.Module | None = None,
        cache: KVCacheView | None = None,
        key_length: int | None = None,
        keep_kv: bool = False,
        remat: str = "none",
        attention: SelfAttention = DEFAULT_ATTENTION,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, nnx.Module]:
        """Runs the blocks start..stop-1 on one layout.

        Args:
            x: [B, S, D].
            layout: Positions and segments of the S slots.
            start, stop: The range; `stop` None is the last layer's end.
            layers: The stack that the range before this one returned; None is that of the module.
            cache: Earlier slots of these layers, while decoding.
            key_length: Slots that fix the rope base; None takes those of this call. LVTC passes
                the long layout's for its shallow layers too, so that all layers rotate alike.
            keep_kv: Whether to return keys and values; then there are no gradients of a range.
            remat: See layers.rematerialize.
            attention: Attention of whole sequences.
            dropout_key: Randomness of the adapters, in training.

        Returns:
            [B, S, D]. KeyValues [L, B, S, K, H] of these slots if `keep_kv`, else None; a cache
            with an entry per layer gives a list with such entries. The stack of all layers, for
            the next range; see models/layer_ranges.py.
        """
        stop = self.config.layers if stop is None else stop
        layers = self.layers if layers is None else layers
        separate_kv = cache is not None and not isinstance(cache.kv, KeyValues)
        if start == stop:  # LVTC without shallow layers
            none = jnp.zeros((0, *x.shape[:2], self.config.kv_heads, self.config.head_dim), x.dtype)
            return x, [] if separate_kv else KeyValues(none, none) if keep_kv else None, layers
        if key_length is None:
            key_length = x.shape[1] if cache is None else cache.segments.shape[1]
        tables = rope_tables(self.config.rope, layout.positions, self.config.head_dim, key_length)

        def body(x, block, inputs, context):
            (kv, dropout_key), (layout, tables) = inputs, context
            of_layer = None if cache is None else cache._replace(kv=kv)
            with jax.named_scope("decoder_block"):
                x, new = block(x, layout, tables, of_layer, attention, dropout_key)
            return x, new if keep_kv else None

        keys = None
        if dropout_key is not None and self.lora is not None:
            keys = jax.random.split(dropout_key, self.config.layers)[start:stop]
        inputs: Any = (None if cache is None else cache.kv, keys)
        if cache is not None and separate_kv:
            inputs = [(kv, None) for kv in cache.kv]
        return run_range(
            rematerialize(body, remat), x, layers, inputs, (layout, tables), start, stop, keep_kv
        )

    def turn(self) -> None:
        """Stores all kernels with their outputs first, see layers.Linear; for inference only."""
        for _, module in nnx.iter_modules(self.layers):
            if isinstance(module, Linear):
                module.turn()
        self.turned = True
        if self.head is not None:
            self.head = nnx.Param(self.head[...].T)

    @property
    def head_kernel(self) -> jax.Array:
        """The output head, [D, W]; the embedding's transpose where they are tied."""
        if self.head is None:
            return self.embedding[...].T
        return self.head[...].T if self.turned else self.head[...]

    def logits(self, x: jax.Array) -> jax.Array:
        """Computes float32[..., W] from hidden states after the last block, [..., D].

        The product accumulates in float32 in any compute dtype: bfloat16 logits tie often, and a
        tie decides which token greedy decoding takes.
        """
        with jax.named_scope("head"):
            x = self.norm(x)
            if self.on_cpu and x.dtype.itemsize == 2:
                head = self.embedding if self.head is None else self.head
                spec = "nd,wd->nw" if self.turned or self.head is None else "nd,dw->nw"
                flat = product(spec, x.reshape(-1, x.shape[-1]), head[...].astype(x.dtype))
                return flat.reshape(*x.shape[:-1], -1)
            head = self.head_kernel.astype(x.dtype)
            return jnp.einsum("...d,dw->...w", x, head, preferred_element_type=jnp.float32)


def on_cache(run_range: Any, earlier: Sequence[KVCacheView], first_deep: int) -> Any:
    """Returns `Decoder.run_range` with earlier slots in front of those of a call.

    Args:
        run_range: The function.
        earlier: The cache of all layers, or with LVTC those of the shallow and the deep ones.
        first_deep: First layer of the last cache.
    """
    # As in decoding, the deepest cache fixes the rope base of all layers.
    length = earlier[-1].segments.shape[1]

    @functools.wraps(run_range)
    def run(x: jax.Array, layout: Any, *, start: int = 0, stop: int | None = None, **options: Any):
        view, first = (earlier[-1], first_deep) if start >= first_deep else (earlier[0], 0)
        end = None if stop is None else stop - first
        part = slice(start - first, end)
        kv = view.kv
        kv = jax.tree.map(lambda x: x[part], kv) if isinstance(kv, KeyValues) else kv[part]
        options["key_length"] = length
        cache = view._replace(kv=kv)
        return run_range(x, layout, start=start, stop=stop, cache=cache, **options)

    return run
