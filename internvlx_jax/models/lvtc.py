"""LVTC: few visual tokens in the shallow decoder layers, many in the deep ones (design: lvtc.md 1, 3).

    X_low = P_low(V)                              image embeddings of layer 0
    h     = layers[0:k]([text ; X_low])           in the short layout, R slots
    h_img = up(h_img) + gate * P_high(V)          per tile, then in the long layout, S slots
    h     = layers[k:L]([text hidden ; h_img])
    h_img += gate_l * P_l(V)                      before each layer l of inject_layers

The host plan behind both frames is core/token_layout.py; InternVLX.run puts the layers around what is here.
Further dims: U, C low and high grid side (g_l, g_h), R short slots.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import LvtcConfig, ModelConfig
from internvlx_jax.core.projector_sites import RELEASED, projector_sites
from internvlx_jax.models.decoder import TokenLayout
from internvlx_jax.models.layers import constant, gather, insert_visual_tokens, param
from internvlx_jax.models.projectors import PVTC, RegionMlp, make_projector


class GatedProjector(nnx.Module):
    """gate * P(V), which joins the hidden states of the visual slots. projector None: P is the released one."""

    def __init__(
        self,
        projector: PVTC | RegionMlp | None,
        gate: float | None,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        self.projector = projector
        self.gate = None if gate is None else param(constant(gate), (), (), rngs=rngs, dtype=dtype)

    def __call__(
        self, x: jax.Array, *, drop_path_key: jax.Array | None, released: PVTC | None = None
    ) -> jax.Array:
        """x: [I, 1+P, V] of the tower -> [I, Q, D]."""
        projector = released if self.projector is None else self.projector
        x = projector(x, drop_path_key=drop_path_key)
        return x if self.gate is None else x * self.gate[...].astype(x.dtype)


class Lvtc(nnx.Module):
    """What LVTC adds to the parameters of a released model.

    Attributes:
        low: projector of layer 0, or None where that is the released one.
        high: residual of the expansion.
        inject_<l>: one before each layer l of inject_layers.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        kwargs = dict(rngs=rngs, dtype=dtype)
        lvtc = self.config = config.lvtc

        for site in projector_sites(config):
            released = site.path == RELEASED
            projector = None if released else make_projector(config, site, **kwargs)
            gated = site.name != "low"
            setattr(
                self,
                site.name,
                GatedProjector(projector, lvtc.gate, **kwargs) if gated else projector,
            )

    def injection(self, layer: int) -> GatedProjector:
        """What is added before `layer`, one of inject_layers."""
        return getattr(self, f"inject_{layer}")

    def deep_ranges(self, layers: int) -> list[tuple[int, int]]:
        """The decoder layers on the long layout, cut in front of each injection."""
        bounds = (self.config.expand_layer, *self.config.inject_layers, layers)
        return list(zip(bounds, bounds[1:]))


def short_inputs(inputs: Inputs) -> tuple[jax.Array, TokenLayout]:
    """Token ids int32[B, R] and the frame of the shallow layers; positions are those of the long layout."""
    tokens, positions, segments = (
        gather(x, inputs.short.short_to_long)
        for x in (inputs.tokens, inputs.positions, inputs.segment_ids)
    )
    return tokens, TokenLayout(positions, segments)


def expand(
    x: jax.Array, residual: jax.Array | None, inputs: Inputs, config: LvtcConfig
) -> jax.Array:
    """Hidden states of the short layout -> those of the long one: text untouched, tiles up(h_img) + residual.

    x: [B, R, D]; residual: gate * P_high(V), [B, T * Q, D], or None without tiles  ->  [B, S, D], 0 on padding
    """
    with jax.named_scope("lvtc_expand"):
        text = gather(x, inputs.short.long_to_short)
        if residual is None:
            return text
        rows, short_length = x.shape[:2]
        start = rearrange(inputs.short.tile_start, "b t -> b t 1")
        slots = jnp.where(
            start < short_length, start + np.arange(config.low_grid**2), short_length
        )  # [B, T, U * U]
        tiles = gather(x, rearrange(slots, "b t q -> b (t q)"))
        tiles = rearrange(tiles, "b (t q) d -> (b t) q d", q=config.low_grid**2)
        visual = rearrange(upsample(tiles, config), "(b t) q d -> b (t q) d", b=rows) + residual
        return insert_visual_tokens(visual, inputs.feature_index, text)


def upsample(x: jax.Array, config: LvtcConfig) -> jax.Array:
    """[I, U * U, D] -> [I, C * C, D], each tile by itself."""
    x = rearrange(x, "i (u v) d -> i u v d", u=config.low_grid)
    matrix = jnp.asarray(
        interpolation_matrix(config.low_grid, config.high_grid, config.upsample), x.dtype
    )
    x = jnp.einsum("au,iuvd->iavd", matrix, x)
    return rearrange(jnp.einsum("bv,iavd->iabd", matrix, x), "i a b d -> i (a b) d")


@functools.cache
def interpolation_matrix(low: int, high: int, method: str) -> np.ndarray:
    """float64[C, U]: the weights of the low tokens in each high one, along one side.

    `nearest` copies the parent. `bilinear` has half-pixel centres and clamped edges, as PyTorch's
    `align_corners=False`.
    """
    matrix = np.zeros((high, low))
    for c in range(high):
        if method == "nearest":
            matrix[c, c * low // high] = 1
            continue
        u = (c + 0.5) * low / high - 0.5
        below = int(np.floor(u))
        for neighbour, weight in ((below, 1 - (u - below)), (below + 1, u - below)):
            matrix[c, np.clip(neighbour, 0, low - 1)] += weight
    return matrix
