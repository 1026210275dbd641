"""Analytic forward FLOPs of a batch, by part (spec: training.md 8, lvtc.md 5).

A multiply-add is 2. Counted are all matrix products, causal attention at half and the tower's attention in full; not
counted are recomputation, element-wise work and the embedding lookup. No import of jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from internvlx_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """tower, projector (with what LVTC adds to it), decoder (its layers), head (logits of every slot)."""

    tower: float
    projector: float
    decoder: float
    head: float

    @property
    def total(self) -> float:
        return self.tower + self.projector + self.decoder + self.head


def forward_flops(config: ModelConfig, *, tiles: int, lengths: Sequence[int],
                  short_lengths: Sequence[int] = ()) -> Flops:
    """tiles: of the whole batch; lengths: slots of each row, or of each segment of packed rows.

    short_lengths: the same in the short frame, with LVTC: its first `expand_layer` layers run on those.
    """
    decoder, layers = config.decoder, config.decoder.layers
    shallow = 0 if config.lvtc is None else config.lvtc.expand_layer
    if shallow and len(short_lengths) != len(lengths):
        raise ValueError(f"{len(lengths)} lengths, but {len(short_lengths)} short lengths")
    deep = (layers - shallow) * sum(_decoder_layer(config, length) for length in lengths)
    return Flops(tiles * _tower(config), tiles * _projectors(config),
                 deep + shallow * sum(_decoder_layer(config, length) for length in short_lengths),
                 2 * decoder.width * decoder.vocab_size * sum(lengths))


def _tower(config: ModelConfig) -> float:
    """Of a tile: patch embedding and the layers up to the selected one."""
    vision = config.vision
    patches = vision.grid**2
    slots = patches + 1
    embedding = 2 * patches * 3 * vision.patch_size**2 * vision.width
    linear = 2 * slots * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
    return embedding + vision.layers_run * (linear + 4 * slots**2 * vision.width)


def _projectors(config: ModelConfig) -> float:
    """Of a tile: every projector, and the up-sampling between the grids."""
    lvtc = config.lvtc
    if lvtc is None:
        return _pvtc(config, config.token_grid) if config.projector.kind == "pvtc" else _mlp(config, config.token_grid)
    kinds = [(lvtc.low_projector, lvtc.low_grid), (lvtc.high_projector, lvtc.high_grid),
             *[(lvtc.inject_projector, lvtc.high_grid)] * len(lvtc.inject_layers)]
    upsampling = 2 * config.decoder.width * (lvtc.high_grid * lvtc.low_grid**2 + lvtc.high_grid**2 * lvtc.low_grid)
    return upsampling + sum((_pvtc if kind == "pvtc" else _mlp)(config, grid) for kind, grid in kinds)


def _pvtc(config: ModelConfig, grid: int) -> float:
    """model.md 4: Q M V D + P V D + V D + 2 Q ((14 + 2 M) D^2 + 2 M D) multiply-adds."""
    v, d, p, q = config.vision.width, config.decoder.width, config.vision.grid**2, grid**2
    m = p // q
    return 2 * (q * m * v * d + p * v * d + v * d + 2 * q * ((14 + 2 * m) * d**2 + 2 * m * d))


def _mlp(config: ModelConfig, grid: int) -> float:
    """Both two-layer projectors, `mlp1` and LVTC's `mlp`: a region's patches -> D -> D."""
    d = config.decoder.width
    return 2 * (config.vision.grid**2 * config.vision.width * d + grid**2 * d**2)


def _decoder_layer(config: ModelConfig, length: int) -> float:
    decoder = config.decoder
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    weights = decoder.width * (2 * queries + 2 * keys + 3 * decoder.mlp_width)
    return 2 * weights * length + 2 * length**2 * queries
