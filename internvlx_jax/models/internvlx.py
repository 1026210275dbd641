"""The whole model: tiles, tower, projector, merge with text, decoder (design: model.md 2, 7).

Reads from top to bottom as the paper's overview figure. What LVTC changes in this order stands in
models/lvtc.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from internvlx_jax.models.decoder import Decoder, KeyValues, KVCacheView, TokenLayout, on_cache
from internvlx_jax.models.layers import Linear, insert_visual_tokens, split_key
from internvlx_jax.models.lora import by_part
from internvlx_jax.models.loss import LossShardings, token_losses
from internvlx_jax.models.lvtc import Lvtc
from internvlx_jax.models.projectors import make_projector
from internvlx_jax.models.vit import VisionTower


class ActivationShardings(NamedTuple):
    """Says where activations live on a mesh.

    Left to itself the compiler divides some of them as their kernels are, and then moves them
    between devices for every gather by index.

    Attributes:
        rows: Sharding of activations whose leading axis is the batch; each device keeps its rows.
        looked_up: Sharding of fresh text embeddings, which come out of the table divided as it is.
        heads: Sharding of queries, keys and values, [rows, slots, heads, head dim].
        loss: How the slots of a batch are divided for the loss.
    """

    rows: NamedSharding
    looked_up: NamedSharding
    heads: NamedSharding
    loss: LossShardings


class InternVLX(nnx.Module):
    """InternVL-X, or InternVL2 with the `mlp1` projector.

    Attributes:
        vision: The tower.
        projector: The one that released checkpoints hold; None where LVTC has no use for it.
        lvtc: What LVTC adds; None without LVTC.
        decoder: The language model.
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
        """Makes the model with fresh parameters.

        Args:
            config: Sizes and variants.
            rngs: Stream `params` of the fresh values.
            dtype: Of the activations.
            param_dtype: Of the parameters; adapters are float32.
            remat: What both layer stacks keep for the backward pass; see layers.rematerialize.
            attention: Backend of both stacks; see models/attention.py.
            shardings: Of activations, on a mesh.
            lora: Adapters, at most one entry per part.
            frozen_layers: Layers at the bottom of the tower that no gradient enters.

        Raises:
            ConfigError: The attention backend cannot do what the others ask for, or two entries
                of `lora` name the same part.
        """
        adapters = by_part(lora)
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=param_dtype)
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.remat, self.shardings = remat, shardings
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
        for _, module in nnx.iter_modules(self):
            if isinstance(module, (Linear, Decoder)):
                module.on_cpu = self.attention.platform == "cpu"

    def encode_tiles(self, tiles: jax.Array) -> jax.Array:
        """Makes the visual tokens of decoder layer 0.

        Args:
            tiles: uint8[I, Y, X, 3], or normalized float.

        Returns:
            [I, Q, D].
        """
        low = None if self.lvtc is None else self.lvtc.low
        projector = self.projector if low is None else low
        assert projector is not None
        return projector(self.features(tiles))

    def features(
        self,
        tiles: jax.Array,
        drop_path_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the tower.

        Args:
            tiles: uint8[I, Y, X, 3], or normalized float.
            drop_path_key: Randomness of drop path, in training.
            dropout_key: Randomness of the adapters, in training.

        Returns:
            [I, 1+P, V], class token first.
        """
        return self.vision(
            normalize_tiles(tiles).astype(self.dtype),
            drop_path_key=drop_path_key,
            dropout_key=dropout_key,
            remat=self.remat,
            attention=self.attention,
        )

    def run(
        self,
        inputs: Inputs,
        *,
        keep_kv: bool = False,
        earlier: Sequence[KVCacheView] | None = None,
        drop_path_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[KeyValues | None]]:
        """Runs the model up to the last decoder block.

        Args:
            inputs: A batch; with LVTC it carries its short layout.
            keep_kv: Whether to return keys and values.
            earlier: Slots of the same rows that came before, in inference: the cache of all layers,
                or with LVTC those of the shallow and the deep ones. The result then has keys and
                values in the form of these caches.
            drop_path_key, dropout_key: As in `features`; the first one is for projectors too.

        Returns:
            Hidden states [B, S, D]. Keys and values of all layers in one entry, or with LVTC
            those of the shallow and of the deep layers; None without `keep_kv`.
        """
        tower_path, projector_path = split_key(drop_path_key, 2)
        tower_dropout, decoder_dropout = split_key(dropout_key, 2)
        features = None
        if inputs.tiles.shape[1]:  # a bucket of text alone compiles without the tower
            tiles = rearrange(inputs.tiles, "b t y x c -> (b t) y x c")
            features = self._by_row(self.features(tiles, tower_path, tower_dropout))
        project = functools.partial(self._project, features, len(inputs.tiles), projector_path)
        run_range = functools.partial(
            self.decoder.run_range,
            keep_kv=keep_kv,
            remat=self.remat,
            attention=self.attention,
            dropout_key=decoder_dropout,
        )
        if earlier is not None:
            first_deep = 0 if self.lvtc is None else self.lvtc.config.expand_layer
            run_range = on_cache(run_range, earlier, first_deep)
        if self.lvtc is not None:
            return self.lvtc.run(
                inputs,
                released=self.projector,
                project=project,
                embed=self._embed,
                run_range=run_range,
                by_row=self._by_row,
            )
        x = self._embed(inputs.tokens)
        x = insert_visual_tokens(project(self.projector, None), inputs.feature_index, x)
        layout = TokenLayout(inputs.positions, inputs.segment_ids)
        x, kv, _ = run_range(self._by_row(x), layout)
        return x, [kv]

    def _project(
        self,
        features: jax.Array | None,
        rows: int,
        key: jax.Array | None,
        projector: Callable[..., jax.Array] | None,
        layer: int | None,
    ) -> jax.Array | None:
        """Applies a projector to the tower's output, [B * T, 1+P, V] -> [B, T * Q, D].

        What joins in front of a decoder layer draws randomness of its own, from the layer's number.
        """
        if features is None:
            return None
        assert projector is not None
        if key is not None and layer is not None:
            key = jax.random.fold_in(key, layer)
        tokens = projector(features, drop_path_key=key)
        return self._by_row(rearrange(tokens, "(b t) q d -> b (t q) d", b=rows))

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """int32[B, S] -> text embeddings [B, S, D]."""
        x = self.decoder.embed(tokens, self.dtype)
        if self.shardings is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.shardings.looked_up)

    def _by_row(self, x: jax.Array) -> jax.Array:
        """Keeps x, [B, ...] or [B * T, ...], on the devices of its rows."""
        if self.shardings is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.shardings.rows)

    def __call__(
        self,
        inputs: Inputs,
        *,
        drop_path_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns hidden states [B, S, D], for `decoder.logits`; arguments are those of `run`."""
        return self.run(inputs, drop_path_key=drop_path_key, dropout_key=dropout_key)[0]

    def token_losses(
        self,
        inputs: Inputs,
        labels: jax.Array,
        *,
        drop_path_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns loss and hit of every slot; see loss.token_losses and `run`."""
        hidden, _ = self.run(inputs, drop_path_key=drop_path_key, dropout_key=dropout_key)
        shardings = None if self.shardings is None else self.shardings.loss
        return token_losses(self.decoder, hidden, labels, shardings)


def normalize_tiles(tiles: jax.Array) -> jax.Array:
    """Normalizes uint8 tiles to (x / 255 - mean) / std in float32; passes float tiles through.

    The host sends bytes, a quarter of float32's size; only ImageNet's constants occur in releases.
    """
    if jnp.issubdtype(tiles.dtype, jnp.floating):
        return tiles
    mean, std = (np.asarray(row, np.float32) for row in NORMALIZATIONS["imagenet"])
    return (tiles.astype(jnp.float32) / 255 - mean) / std
