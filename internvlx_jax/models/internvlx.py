"""The whole model: tiles -> tower -> projector -> merge with text -> decoder (design: model.md 2, 7; lvtc.md 1)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.core.projector_sites import released_site
from internvlx_jax.core.tile_config import NORMALIZATIONS
from internvlx_jax.models.attention import Backend, SelfAttention
from internvlx_jax.models.decoder import Decoder, KeyValues, TokenLayout
from internvlx_jax.models.layers import gather, insert_visual_tokens, split_key
from internvlx_jax.models.lora import by_part
from internvlx_jax.models.loss import LossShardings, token_losses
from internvlx_jax.models.lvtc import Lvtc, expand, short_inputs
from internvlx_jax.models.projectors import make_projector
from internvlx_jax.models.vit import VisionTower


class ActivationShardings(NamedTuple):
    """Where activations live. Left to itself the compiler divides some as their kernels are, and then moves them between
    devices for every gather by index.

    Attributes:
        rows: of what has the rows of a batch in front; each device keeps its own.
        looked_up: of fresh text embeddings, which come out of the table divided as it is.
        heads: of queries, keys and values, [rows, slots, heads, head dim].
        loss: how the slots of a batch are divided for the loss.
    """

    rows: NamedSharding
    looked_up: NamedSharding
    heads: NamedSharding
    loss: LossShardings


class InternVLX(nnx.Module):
    """InternVL-X, or InternVL2 with the `mlp1` projector; `projector` is the one that released checkpoints hold.

    dtype: of the activations; param_dtype: of the parameters. remat: see layers.rematerialize, for both layer stacks.
    attention: backend of both stacks, see models/attention.py. shardings: of activations, on a mesh (see
    ActivationShardings). Raises ConfigError when the backend cannot do what these ask for.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        attention: Backend = "auto",
        shardings: ActivationShardings | None = None,
        lora: Sequence[LoraConfig] = (),
        frozen_layers: int = 0,
    ):
        adapters = by_part(lora)
        kwargs = dict(rngs=rngs, dtype=param_dtype)
        self.config, self.dtype, self.remat, self.shardings = (
            config,
            jnp.dtype(dtype),
            remat,
            shardings,
        )
        self.attention = SelfAttention(attention)
        if shardings is not None:
            self.attention = SelfAttention(attention, rows=shardings.rows, heads=shardings.heads)
        self.attention.check(self.dtype, (config.vision.head_dim, config.decoder.head_dim))
        self.vision = VisionTower(
            config.vision, lora=adapters.get("vision"), frozen_layers=frozen_layers, **kwargs
        )
        released = released_site(config)
        self.projector = None if released is None else make_projector(config, released, **kwargs)
        self.lvtc = None if config.lvtc is None else Lvtc(config, **kwargs)
        self.decoder = Decoder(config.decoder, lora=adapters.get("decoder"), **kwargs)

    def encode_tiles(self, tiles: jax.Array) -> jax.Array:
        """uint8 or normalised float[I, Y, X, 3] -> the visual tokens of decoder layer 0, [I, Q, D]."""
        return self.low_projector(self.features(tiles))

    def features(
        self,
        tiles: jax.Array,
        drop_path_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """uint8 or normalised float[I, Y, X, 3] -> the tower's output [I, 1+P, V], class token first."""
        pixels = normalize_tiles(tiles).astype(self.dtype)
        return self.vision(
            pixels,
            drop_path_key=drop_path_key,
            dropout_key=dropout_key,
            remat=self.remat,
            attention=self.attention,
        )

    @property
    def low_projector(self) -> nnx.Module:
        """What makes the visual tokens of decoder layer 0."""
        return self.projector if self.lvtc is None or self.lvtc.low is None else self.lvtc.low

    def run(
        self,
        inputs: Inputs,
        *,
        keep_kv: bool = False,
        drop_path_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[KeyValues | None]]:
        """Hidden states after the last block, [B, S, D]; if asked for, keys and values of each frame: of all layers, or
        with LVTC of the shallow and of the deep ones."""
        tower_key, projector_key = split_key(drop_path_key, 2)
        tower_dropout, decoder_dropout = split_key(dropout_key, 2)
        rows = len(inputs.tiles)
        # A text-only bucket compiles without the tower.
        features = None
        if inputs.tiles.shape[1]:
            tiles = rearrange(inputs.tiles, "b t y x c -> (b t) y x c")
            features = self._by_row(self.features(tiles, tower_key, tower_dropout))

        def visual(projector: Callable, key: jax.Array | None) -> jax.Array | None:
            if features is None:
                return None
            return self._by_row(
                rearrange(projector(features, drop_path_key=key), "(b t) q d -> b (t q) d", b=rows)
            )

        run_layers = functools.partial(
            self.decoder.run_layers,
            keep_kv=keep_kv,
            remat=self.remat,
            attention=self.attention,
            dropout_key=decoder_dropout,
        )
        frame = TokenLayout(inputs.positions, inputs.segment_ids)
        if self.lvtc is None:
            x = self._embed(inputs.tokens)
            x = self._by_row(
                insert_visual_tokens(visual(self.projector, projector_key), inputs.feature_index, x)
            )
            x, kv = run_layers(x, frame)
            return x, [kv]

        lvtc, first_deep = self.lvtc, self.lvtc.config.expand_layer
        tokens, short_layout = short_inputs(inputs)
        x = self._embed(tokens)
        x = self._by_row(
            insert_visual_tokens(
                visual(self.low_projector, projector_key), inputs.short.feature_index, x
            )
        )
        x, shallow = run_layers(x, short_layout, stop=first_deep, key_length=inputs.tokens.shape[1])
        high = functools.partial(lvtc.high, released=self.projector)
        residual = visual(high, _of_layer(projector_key, first_deep))
        x = self._by_row(expand(self._by_row(x), residual, inputs, lvtc.config))
        deep = []
        for start, stop in lvtc.deep_ranges(self.config.decoder.layers):
            if start in lvtc.config.inject_layers and features is not None:
                added = visual(lvtc.injection(start), _of_layer(projector_key, start))
                x = self._by_row(x + gather(added, inputs.feature_index))
            x, kv = run_layers(x, frame, start=start, stop=stop)
            deep.append(kv)
        return x, [shallow, jax.tree.map(lambda *parts: jnp.concatenate(parts), *deep)]

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """int32[B, S] -> text embeddings [B, S, D]."""
        x = self.decoder.embed(tokens, self.dtype)
        return (
            x
            if self.shardings is None
            else jax.lax.with_sharding_constraint(x, self.shardings.looked_up)
        )

    def _by_row(self, x: jax.Array) -> jax.Array:
        """x: [B, ...], or [B * T, ...]."""
        return (
            x
            if self.shardings is None
            else jax.lax.with_sharding_constraint(x, self.shardings.rows)
        )

    def __call__(
        self,
        inputs: Inputs,
        *,
        drop_path_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, S, D]; `decoder.logits` or `token_losses` follow. The keys: training only."""
        return self.run(inputs, drop_path_key=drop_path_key, dropout_key=dropout_key)[0]

    def token_losses(
        self,
        inputs: Inputs,
        labels: jax.Array,
        *,
        drop_path_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """See loss.token_losses."""
        hidden = self(inputs, drop_path_key=drop_path_key, dropout_key=dropout_key)
        return token_losses(
            self.decoder, hidden, labels, None if self.shardings is None else self.shardings.loss
        )


def _of_layer(key: jax.Array | None, layer: int) -> jax.Array | None:
    """Drop-path randomness of what joins at a layer."""
    return None if key is None else jax.random.fold_in(key, layer)


def normalize_tiles(tiles: jax.Array) -> jax.Array:
    """uint8 -> (x / 255 - mean) / std in float32; float tiles are normalised already."""
    if jnp.issubdtype(tiles.dtype, jnp.floating):
        return tiles
    mean, std = (np.asarray(row, np.float32) for row in NORMALIZATIONS["imagenet"])
    return (tiles.astype(jnp.float32) / 255 - mean) / std
