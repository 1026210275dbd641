"""The whole model: tiles -> tower -> projector -> merge with text -> decoder (spec: model.md 2, 7)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.data.tiles import NORMALIZATIONS
from internvlx_jax.models.config import ModelConfig
from internvlx_jax.models.decoder import Decoder, Frame, KeyValues
from internvlx_jax.models.inputs import Inputs
from internvlx_jax.models.mlp1 import Mlp1
from internvlx_jax.models.pvtc import PVTC
from internvlx_jax.models.vit import VisionTower


class InternVLX(nnx.Module):
    """InternVL-X, or InternVL2 with the `mlp1` projector.

    dtype: of the activations; param_dtype: of the parameters. remat: none, full or dots, for both layer stacks.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32,
                 param_dtype: DTypeLike = jnp.float32, remat: str = "none"):
        kwargs = dict(rngs=rngs, dtype=param_dtype)
        width = config.decoder.width
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        self.vision = VisionTower(config.vision, **kwargs)
        if config.projector.kind == "pvtc":
            self.projector = PVTC(config.projector, config.vision.width, config.token_grid, width, **kwargs)
        else:
            self.projector = Mlp1(config.projector, config.vision.width, width, **kwargs)
        self.decoder = Decoder(config.decoder, **kwargs)

    def encode_tiles(self, tiles: jax.Array, drop_path_key: jax.Array | None = None) -> jax.Array:
        """uint8 or normalised float[I, Y, X, 3] -> visual tokens [I, Q, D]."""
        tower_key, projector_key = (None, None) if drop_path_key is None else jax.random.split(drop_path_key)
        pixels = normalize_tiles(tiles).astype(self.dtype)
        x = self.vision(pixels, drop_path_key=tower_key, remat=self.remat)
        return self.projector(x, drop_path_key=projector_key)

    def embed(self, inputs: Inputs, drop_path_key: jax.Array | None = None) -> jax.Array:
        """Text embeddings with the visual tokens in their slots: [B, S, D]."""
        x = self.decoder.embed(inputs.tokens, self.dtype)
        rows, tiles = inputs.tiles.shape[:2]
        if tiles == 0:  # a text-only bucket compiles without the tower
            return x
        features = self.encode_tiles(rearrange(inputs.tiles, "b t y x c -> (b t) y x c"), drop_path_key)
        features = rearrange(features, "(b t) q d -> b (t q) d", b=rows)
        with jax.named_scope("merge"):
            visual = jnp.take_along_axis(features, inputs.feature_index[..., None], axis=1, mode="fill", fill_value=0)
            return jnp.where(inputs.feature_index[..., None] < features.shape[1], visual, x)

    def run(self, inputs: Inputs, *, keep_kv: bool = False,
            drop_path_key: jax.Array | None = None) -> tuple[jax.Array, KeyValues | None]:
        """Hidden states after the last block, [B, S, D], and the keys and values if asked for."""
        frame = Frame(inputs.positions, inputs.segment_ids)
        x = self.embed(inputs, drop_path_key)
        return self.decoder.run_layers(x, frame, keep_kv=keep_kv, remat=self.remat)

    def __call__(self, inputs: Inputs, *, drop_path_key: jax.Array | None = None) -> jax.Array:
        """Hidden states [B, S, D]; `decoder.logits` or `loss.token_losses` follow. drop_path_key: training only."""
        return self.run(inputs, drop_path_key=drop_path_key)[0]


def normalize_tiles(tiles: jax.Array) -> jax.Array:
    """uint8 -> (x / 255 - mean) / std in float32; float tiles are normalised already."""
    if jnp.issubdtype(tiles.dtype, jnp.floating):
        return tiles
    mean, std = (np.asarray(row, np.float32) for row in NORMALIZATIONS["imagenet"])
    return (tiles.astype(jnp.float32) / 255 - mean) / std
