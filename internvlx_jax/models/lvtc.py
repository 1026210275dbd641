"""LVTC: few visual tokens in the shallow decoder layers, many in the deep ones (design: lvtc.md).

The paper's layer-wise visual token compression. With k = `expand_layer` and L decoder layers:

    X_low = P_low(V)                              visual tokens of layer 0
    h     = layers[0:k]([text ; X_low])           on the short layout, R slots
    h_img = up(h_img) + gate * P_high(V)          per tile; then on the long layout, S slots
    h     = layers[k:L]([text hidden ; h_img])
    h_img += gate_l * P_l(V)                      before each layer l of `inject_layers`

Tokens, labels and positions of a batch are laid out in the long layout, in which a tile has C * C
slots. The short layout is the same sequence with U * U slots per tile, in the same order and
without gaps. For U = 2, C = 4 and a row with text a, b before one tile and c behind it:

    long   a b 0 1 2 3 4 5 6 7 8 9 A B C D E F c     16 tokens of a tile, row-major on 4 x 4
    short  a b 0   2           8   A           c     4 tokens; each stands for its top-left child

Which long slot a short slot stands for, and which short slot a long one comes from, is integers
that the host computes with the batch: `core/token_layout.py` (NumPy, since loader processes do not
import jax), whose result is `core.inputs.ShortLayout`. On the device both directions are gathers.

Which projector serves where, and which of them released checkpoints hold, is listed by
`core/projector_sites.py`: the first PVTC on the model's own token grid is `projector`, at the root
of the model; all others are parameters of the module `Lvtc` below.

Further dims: U, C low and high grid side (g_l, g_h), R short slots.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import LvtcConfig, ModelConfig
from internvlx_jax.core.projector_sites import RELEASED, projector_sites
from internvlx_jax.models.decoder import KeyValues, TokenLayout
from internvlx_jax.models.layers import constant, gather, insert_visual_tokens, param
from internvlx_jax.models.projectors import Projector, make_projector

RunRange = Callable[..., tuple[jax.Array, KeyValues | None, nnx.Module]]
# (projector, decoder layer in front of which it joins; None for the tokens of layer 0)
# -> [B, T * Q, D], or None for a batch without tiles
Project = Callable[[Callable | None, int | None], jax.Array | None]


class GatedProjector(nnx.Module):
    """gate * P(V), which is added to the hidden states of the visual slots.

    The gate is a learned scalar that starts at 0 by default: a model that was trained without LVTC
    then begins as itself on upsampled tokens, and fresh projectors cannot disturb it before they
    have learned something. The gate has a gradient from the first step on, and the projector
    follows as soon as the gate has moved.

    `projector` is None where P is the released one, which the model holds.
    """

    def __init__(
        self,
        projector: Projector | None,
        gate: float | None,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        self.projector = projector
        self.gate = None if gate is None else param(constant(gate), (), (), rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        *,
        drop_path_key: jax.Array | None,
        released: Projector | None = None,
    ) -> jax.Array:
        """Makes [I, Q, D] of the tower's output [I, 1+P, V]."""
        projector = released if self.projector is None else self.projector
        assert projector is not None
        x = projector(x, drop_path_key=drop_path_key)
        return x if self.gate is None else x * self.gate[...].astype(x.dtype)


class Lvtc(nnx.Module):
    """What LVTC adds to the parameters of a released model, and the forward pass in two ranges.

    Attributes:
        low: Projector of layer 0, or None where that is the released one.
        high: Residual of the expansion.
        inject_<l>: One before each layer l of `inject_layers`.
    """

    low: Projector | None
    high: GatedProjector

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        assert config.lvtc is not None
        self.config, self.layers = config.lvtc, config.decoder.layers
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype)
        for site in projector_sites(config):
            module = None if site.path == RELEASED else make_projector(config, site, **kwargs)
            if site.name != "low":
                module = GatedProjector(module, config.lvtc.gate, **kwargs)
            setattr(self, site.name, module)

    def injection(self, layer: int) -> GatedProjector:
        """Returns what is added before `layer`, one of `inject_layers`."""
        return getattr(self, f"inject_{layer}")

    def run(
        self,
        inputs: Inputs,
        *,
        released: Projector | None,
        project: Project,
        embed: Callable[[jax.Array], jax.Array],
        run_range: RunRange,
        by_row: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, list[KeyValues | None]]:
        """Runs the decoder: shallow layers, expansion, deep layers with their injections.

        Args:
            inputs: In the long layout, with `short`.
            released: The model's `projector`.
            project: Applies a projector to the tower's output of this batch.
            embed: Token ids -> embeddings.
            run_range: `Decoder.run_range` with the options of this call.
            by_row: Keeps an array with a leading batch axis on the devices of its rows.

        Returns:
            Hidden states [B, S, D]; keys and values of the shallow and of the deep layers.
        """
        assert inputs.short is not None
        first_deep = self.config.expand_layer
        tokens, short = short_inputs(inputs)
        low = project(self.low if self.low is not None else released, None)
        x = by_row(insert_visual_tokens(low, inputs.short.feature_index, embed(tokens)))
        # Rope may depend on the number of key slots; all layers take that of the long layout.
        length = inputs.tokens.shape[1]
        x, shallow, layers = run_range(x, short, stop=first_deep, key_length=length)

        residual = project(functools.partial(self.high, released=released), first_deep)
        x = by_row(expand(by_row(x), residual, inputs, self.config))

        long, deep = TokenLayout(inputs.positions, inputs.segment_ids), []
        for start, stop in self.deep_ranges():
            if start in self.config.inject_layers:
                added = project(self.injection(start), start)
                if added is not None:
                    x = by_row(x + gather(added, inputs.feature_index))
            x, kv, layers = run_range(x, long, start=start, stop=stop, layers=layers)
            deep.append(kv)
        return x, [shallow, _all_layers(deep)]

    def deep_ranges(self) -> list[tuple[int, int]]:
        """Returns the decoder layers on the long layout, cut in front of each injection."""
        bounds = (self.config.expand_layer, *self.config.inject_layers, self.layers)
        return list(itertools.pairwise(bounds))


def _all_layers(parts: list[Any]) -> Any:
    """Returns the keys and values of consecutive layer ranges as those of one."""
    if isinstance(parts[0], list):  # an entry for each layer
        return [layer for part in parts for layer in part]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def short_inputs(inputs: Inputs) -> tuple[jax.Array, TokenLayout]:
    """Gathers what the shallow layers read.

    Positions are those of the long layout at every depth: a low token takes the position of its
    top-left child. So text keeps its positions where the sequence grows, keys of shallow and deep
    layers are rotated alike, and a decoded token has one position everywhere.

    Returns:
        Token ids int32[B, R], and the short layout.
    """
    assert inputs.short is not None
    tokens, positions, segments = (
        gather(x, inputs.short.short_to_long)
        for x in (inputs.tokens, inputs.positions, inputs.segment_ids)
    )
    return tokens, TokenLayout(positions, segments)


def expand(
    x: jax.Array, residual: jax.Array | None, inputs: Inputs, config: LvtcConfig
) -> jax.Array:
    """Brings hidden states from the short layout to the long one.

    Text is untouched. Each tile becomes up(h_img) + residual by itself: interpolation across tile
    borders would mix parts of the image that do not touch.

    Args:
        x: [B, R, D].
        residual: gate * P_high(V), [B, T * Q, D], or None for a batch without tiles.
        inputs: The batch.
        config: Grids and interpolation.

    Returns:
        [B, S, D], 0 on padding.
    """
    assert inputs.short is not None
    with jax.named_scope("lvtc_expand"):
        text = gather(x, inputs.short.long_to_short)
        if residual is None:
            return text
        rows, short_length = x.shape[:2]
        start = rearrange(inputs.short.tile_start, "b t -> b t 1")
        # Slots of an unused tile must stay out of range; start + offset of a used one never is.
        slots = jnp.where(
            start < short_length, start + np.arange(config.low_grid**2), short_length
        )  # [B, T, U * U]
        tiles = gather(x, rearrange(slots, "b t q -> b (t q)"))
        tiles = rearrange(tiles, "b (t q) d -> (b t) q d", q=config.low_grid**2)
        visual = rearrange(upsample(tiles, config), "(b t) q d -> b (t q) d", b=rows) + residual
        return insert_visual_tokens(visual, inputs.feature_index, text)


def upsample(x: jax.Array, config: LvtcConfig) -> jax.Array:
    """Interpolates [I, U * U, D] to [I, C * C, D], each tile by itself.

    Interpolation is separable, so it is two small matrix products with constant matrices.
    """
    x = rearrange(x, "i (u v) d -> i u v d", u=config.low_grid)
    matrix = jnp.asarray(
        interpolation_matrix(config.low_grid, config.high_grid, config.upsample), x.dtype
    )
    x = jnp.einsum("au,iuvd->iavd", matrix, x)
    return rearrange(jnp.einsum("bv,iavd->iabd", matrix, x), "i a b d -> i (a b) d")


@functools.cache
def interpolation_matrix(low: int, high: int, method: str) -> np.ndarray:
    """Returns float64[C, U], the weights of the low tokens in each high one along one side.

    `nearest` copies the parent. `bilinear` has half-pixel centers and clamped edges, as PyTorch's
    `align_corners=False`.
    """
    matrix = np.zeros((high, low))
    for c in range(high):
        if method == "nearest":
            matrix[c, c * low // high] = 1
            continue
        u = (c + 0.5) * low / high - 0.5
        below = int(np.floor(u))
        for neighbor, weight in ((below, 1 - (u - below)), (below + 1, u - below)):
            matrix[c, np.clip(neighbor, 0, low - 1)] += weight
    return matrix
