"""The language model: one decoder for InternLM2, Llama, Qwen2 and Phi-3 (design: model.md 8, 9).

Positions and segments come with the call as a `TokenLayout`, and a call runs any range of layers. That is the seam of
LVTC: two ranges of one stack, each in its own layout.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.core.model_config import DecoderConfig, LoraConfig
from internvlx_jax.models.attention import SelfAttention, attend
from internvlx_jax.models.layers import (
    RMSNorm,
    constant,
    normal,
    param,
    rematerialize,
    scan_layers,
    slice_layers,
    split_key,
    stack_layers,
)
from internvlx_jax.models.lora import WHOLE, make_linear
from internvlx_jax.models.rope import RopeTables, rope_tables, rotate


class TokenLayout(NamedTuple):
    """Where the slots of a sequence stand.

    Attributes:
        positions: int32[B, S], rotary position of each slot.
        segments: int32[B, S], 0 = padding; a slot attends within its own segment.
    """

    positions: jax.Array
    segments: jax.Array


class KeyValues(NamedTuple):
    """keys (rotated), values: [B, S, K, H]; with a leading L where they belong to a stack of layers."""

    keys: jax.Array
    values: jax.Array


class KVCacheView(NamedTuple):
    """What a call with cached keys attends to besides its own slots.

    Attributes:
        cache: KeyValues of all layers, [L, B, Z, K, H].
        segments: int32[B, Z], with the slots of this call already marked.
        start: int32 scalar, cache slot of the first query; slots from there on are overwritten.
    """

    cache: KeyValues
    segments: jax.Array
    start: jax.Array


class Attention(nnx.Module):
    """Grouped-query attention; the packed kernel holds, per kv head, J queries, the key and the value."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, **kwargs):
        d, k, j, h = config.width, config.kv_heads, config.group, config.head_dim
        init = normal(config.initializer_range)
        kwargs |= dict(init=init, bias_init=constant(0.0), lora=lora)
        apart = config.family in ("llama", "qwen2")
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
        self.window = config.sliding_window

    def __call__(
        self,
        x: jax.Array,
        layout: TokenLayout,
        tables: RopeTables,
        cached: KVCacheView | None,
        attention: SelfAttention,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, KeyValues]:
        key1, key2 = split_key(dropout_key, 2)
        qkv = self.qkv(x, key1)
        q, k, v = rotate(qkv[..., :-2, :], tables), rotate(qkv[..., -2, :], tables), qkv[..., -1, :]
        q, new = rearrange(q, "b s k j h -> b s (k j) h"), KeyValues(k, v)
        if cached is None:
            y = attention(q, k, v, layout.segments, causal=True, window=self.window)
            return self.out(y, key2), new
        k, v = (
            jax.lax.dynamic_update_slice_in_dim(
                cached, fresh.astype(cached.dtype), cached.start, axis=1
            )
            for cached, fresh in zip(cached.cache, new)
        )
        y = attend(
            q,
            k,
            v,
            q_segments=layout.segments,
            kv_segments=cached.segments,
            q_start=cached.start,
            window=self.window,
        )
        return self.out(y, key2), new


class Mlp(nnx.Module):
    """(silu(x Wgate) * (x Wup)) Wdown."""

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
    """x: [B, S, D] -> ([B, S, D], keys and values of these slots)."""

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
        cached: KVCacheView | None,
        attention: SelfAttention,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, KeyValues]:
        key1, key2 = split_key(dropout_key, 2)
        y, new = self.attn(self.attn_norm(x), layout, tables, cached, attention, key1)
        x = x + y
        return x + self.mlp(self.mlp_norm(x), key2), new


class Decoder(nnx.Module):
    """Token embedding, stacked blocks, final norm and output head."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        lora: LoraConfig | None = None,
    ):
        kwargs = dict(rngs=rngs, dtype=dtype)
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
        """int32[B, S] -> dtype[B, S, D]."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(dtype)

    def run_layers(
        self,
        x: jax.Array,
        layout: TokenLayout,
        *,
        start: int = 0,
        stop: int | None = None,
        cached: KVCacheView | None = None,
        key_length: int | None = None,
        keep_kv: bool = False,
        remat: str = "none",
        attention: SelfAttention = SelfAttention(),
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Blocks start..stop-1 on one layout.

        x: [B, S, D]  ->  ([B, S, D], KeyValues [L, B, S, K, H] of these slots if `keep_kv`, else None)
        key_length: slots of the long layout, where this is the short one: all layers rotate alike. None: of this layout.
        """
        stop = self.config.layers if stop is None else stop
        if start == stop:  # LVTC without shallow layers
            none = jnp.zeros((0, *x.shape[:2], self.config.kv_heads, self.config.head_dim), x.dtype)
            return x, KeyValues(none, none) if keep_kv else None
        if key_length is None:
            key_length = x.shape[1] if cached is None else cached.segments.shape[1]
        tables = rope_tables(self.config.rope, layout.positions, self.config.head_dim, key_length)

        def body(x, block_and_inputs):
            block, (cache, dropout_key) = block_and_inputs
            view = None if cached is None else cached._replace(cache=cache)
            with jax.named_scope("decoder_block"):
                x, new = block(x, layout, tables, view, attention, dropout_key)
            return x, new if keep_kv else None

        cache, keys = None if cached is None else cached.cache, None
        if dropout_key is not None and self.lora is not None:
            keys = jax.random.split(dropout_key, self.config.layers)[start:stop]
        layers = slice_layers(self.layers, start, stop)
        return scan_layers(rematerialize(body, remat), x, layers, (cache, keys))

    @property
    def head_kernel(self) -> jax.Array:
        """[D, W]; the embedding's transpose where they are tied."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states after the last block, [..., D] -> float32[..., W]."""
        with jax.named_scope("head"):
            x = self.norm(x)
            return jnp.einsum(
                "...d,dw->...w",
                x,
                self.head_kernel.astype(x.dtype),
                preferred_element_type=jnp.float32,
            )
