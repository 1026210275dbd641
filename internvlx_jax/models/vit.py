"""InternViT, the vision tower (design: model.md 3).

Covers the 300M tower of InternVL-X (LayerNorm) and the 6B tower of larger InternVL2 models
(RMSNorm, normalized queries and keys). The tower reads each tile by itself; that tiles belong to
one image is known to the decoder alone, from their order in the sequence.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.core.model_config import LoraConfig, VisionConfig
from internvlx_jax.models.attention import DEFAULT_ATTENTION, SelfAttention
from internvlx_jax.models.layers import (
    LayerNorm,
    Linear,
    RMSNorm,
    constant,
    drop_path,
    gelu,
    normal,
    param,
    rematerialize,
    scan_layers,
    slice_layers,
    split_key,
    stack_layers,
)
from internvlx_jax.models.lora import make_linear


def _norm(config: VisionConfig, **kwargs) -> nnx.Module:
    make = LayerNorm if config.norm == "layer_norm" else RMSNorm
    return make(config.width, eps=config.eps, **kwargs)


class Attention(nnx.Module):
    """Full self-attention over class token and patches; [I, S, V] -> [I, S, V]."""

    def __init__(self, config: VisionConfig, lora: LoraConfig | None, **kwargs):
        v, n, h = config.width, config.heads, config.head_dim
        self.qkv = make_linear(
            "isv,vanh->aisnh",
            (v, 3, n, h),
            ("embed", None, "heads", None),
            bias=config.qkv_bias,
            lora=lora,
            **kwargs,
        )
        self.q_norm = RMSNorm(v, eps=config.eps, **kwargs) if config.qk_norm else None
        self.k_norm = RMSNorm(v, eps=config.eps, **kwargs) if config.qk_norm else None
        self.proj = make_linear(
            "isnh,nhv->isv", (n, h, v), ("heads", None, "embed"), bias=True, lora=lora, **kwargs
        )

    def __call__(
        self, x: jax.Array, attention: SelfAttention, dropout_key: jax.Array | None
    ) -> jax.Array:
        key1, key2 = split_key(dropout_key, 2)
        q, k, v = self.qkv(x, key1)
        if self.q_norm is not None and self.k_norm is not None:
            # Over all heads together, not per head: the release normalizes before it splits.
            q = self.q_norm(q.reshape(x.shape)).reshape(q.shape)
            k = self.k_norm(k.reshape(x.shape)).reshape(k.shape)
        return self.proj(attention(q, k, v, causal=False), key2)


class Mlp(nnx.Module):
    """Linear - exact GELU - Linear; [I, S, V] -> [I, S, V]."""

    def __init__(self, config: VisionConfig, lora: LoraConfig | None, **kwargs):
        v, f = config.width, config.mlp_width
        kwargs |= dict(bias=True, lora=lora)
        self.fc1 = make_linear("isv,vf->isf", (v, f), ("embed", "mlp"), **kwargs)
        self.fc2 = make_linear("isf,fv->isv", (f, v), ("mlp", "embed"), **kwargs)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        key1, key2 = split_key(dropout_key, 2)
        return self.fc2(gelu(self.fc1(x, key1)), key2)


class LayerDraws(NamedTuple):
    """Holds the randomness of a layer, or of a stack of layers; None where nothing is random.

    Attributes:
        drop_path: key[] or key[L].
        dropout: key[] or key[L], for the adapters.
    """

    drop_path: jax.Array | None
    dropout: jax.Array | None


class Block(nnx.Module):
    """A pre-norm block with layer scale and drop path on both branches.

    Layer scale is a learned factor per channel of each branch. The 6B tower starts it at 0.1, which
    keeps the fresh branches of a deep tower quiet.
    """

    def __init__(self, config: VisionConfig, lora: LoraConfig | None, **kwargs):
        scale = constant(config.layer_scale_init)
        self.norm1 = _norm(config, **kwargs)
        self.attn = Attention(config, lora, **kwargs)
        self.ls1 = param(scale, (config.width,), (None,), **kwargs)
        self.norm2 = _norm(config, **kwargs)
        self.mlp = Mlp(config, lora, **kwargs)
        self.ls2 = param(scale, (config.width,), (None,), **kwargs)

    def __call__(
        self, x: jax.Array, draws: LayerDraws, rate: jax.Array, attention: SelfAttention
    ) -> jax.Array:
        path1, path2 = split_key(draws.drop_path, 2)
        dropout1, dropout2 = split_key(draws.dropout, 2)
        y = self.ls1[...].astype(x.dtype) * self.attn(self.norm1(x), attention, dropout1)
        x = x + drop_path(y, path1, rate, batch_dims=1)
        y = self.ls2[...].astype(x.dtype) * self.mlp(self.norm2(x), dropout2)
        return x + drop_path(y, path2, rate, batch_dims=1)


class VisionTower(nnx.Module):
    """Patches, class token and positions, then blocks up to the selected output.

    There is no norm behind the last block: the projectors normalize what they read.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        lora: LoraConfig | None = None,
        frozen_layers: int = 0,
    ):
        """Makes a tower.

        Args:
            config: Sizes and variants.
            rngs: Stream `params` of the fresh values.
            dtype: Of the parameters.
            lora: Adapters of all blocks.
            frozen_layers: Blocks at the bottom that no gradient enters.
        """
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype)
        self.config, self.lora, self.frozen_layers = config, lora, frozen_layers
        v, features = config.width, 3 * config.patch_size**2
        self.patch_embed = Linear(
            "ipk,kv->ipv", (features, v), (None, "embed"), bias=True, **kwargs
        )
        self.class_embedding = param(normal(1.0), (v,), (None,), **kwargs)
        self.position_embedding = param(
            normal(1.0), (1 + config.grid**2, v), (None, "embed"), **kwargs
        )
        self.layers = stack_layers(
            lambda rngs: Block(config, lora, rngs=rngs, dtype=dtype), config.layers, rngs
        )

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Makes [I, 1+P, V] of pixels [I, Y, X, 3]: class token and patches, with positions.

        The patch convolution is a matrix product, since its stride is its kernel. Rows and columns
        at the right and bottom that fill no patch are dropped.
        """
        size = self.config.patch_size
        rows, columns = pixels.shape[1] // size, pixels.shape[2] // size
        with jax.named_scope("patch_embed"):
            patches = rearrange(
                pixels[:, : rows * size, : columns * size],
                "i (a y) (b x) c -> i (a b) (c y x)",
                y=size,
                x=size,
            )
            x = self.patch_embed(patches)
        cls = jnp.broadcast_to(
            self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[2])
        )
        positions = resize_positions(self.position_embedding[...], (rows, columns))
        return jnp.concatenate([cls, x], axis=1) + positions.astype(x.dtype)

    def __call__(
        self,
        pixels: jax.Array,
        *,
        drop_path_key: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        remat: str = "none",
        attention: SelfAttention = DEFAULT_ATTENTION,
    ) -> jax.Array:
        """Runs the tower.

        Args:
            pixels: [I, Y, X, 3], normalized.
            drop_path_key: Randomness of drop path; None outside training.
            dropout_key: Randomness of the adapters; None outside training.
            remat: See layers.rematerialize.
            attention: Attention of whole sequences.

        Returns:
            [I, 1+P, V] of the layer that `config.select_layer` names, class token first and
            patches row-major. Layers behind it are not run; they keep their parameters, so that
            checkpoints stay complete.
        """
        depth, total = self.config.layers_run, self.config.layers
        x = self.embed(pixels)
        # Rates grow with depth: early blocks carry what all later ones build on.
        rates = self.config.drop_path * jnp.arange(depth) / max(total - 1, 1)
        drop_path_key = drop_path_key if self.config.drop_path > 0 else None
        dropout_key = dropout_key if self.lora is not None else None
        draws = LayerDraws(
            *(
                None if key is None else jax.random.split(key, depth)
                for key in (drop_path_key, dropout_key)
            )
        )

        def body(x, block_and_draws):
            block, (draws, rate) = block_and_draws
            with jax.named_scope("vit_block"):
                return block(x, draws, rate, attention), None

        def run(x, layers, start, stop, remat):
            inputs = jax.tree.map(lambda leaf: leaf[start:stop], (draws, rates))
            return scan_layers(rematerialize(body, remat), x, layers, inputs)[0]

        # No gradient enters the frozen blocks, so there is nothing to keep for a backward pass.
        frozen = min(self.frozen_layers, depth)
        if frozen:
            x, layers = jax.lax.stop_gradient((x, slice_layers(self.layers, 0, frozen)))
            x = run(x, layers, 0, frozen, "none")
        return run(x, slice_layers(self.layers, frozen, depth), frozen, depth, remat)


# Coefficient of PyTorch's cubic kernel. jax.image.resize uses -0.5, drops weights that fall outside
# the grid and smooths when it shrinks; positions resized so would differ from the release by 0.15.
CUBIC = -0.75


def resize_positions(positions: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Fits a square position table to another patch grid; the class position stays.

    Args:
        positions: [1+P, V].
        grid: (rows, columns).

    Returns:
        [1 + rows * columns, V] in the dtype of `positions`.
    """
    side = int(round((positions.shape[0] - 1) ** 0.5))
    if grid == (side, side):
        return positions
    patches = positions[1:].astype(jnp.float32).reshape(side, side, -1)
    rows = jnp.asarray(bicubic_matrix(side, grid[0]), jnp.float32)
    columns = jnp.asarray(bicubic_matrix(side, grid[1]), jnp.float32)
    resized = jnp.einsum("ai,bj,ijv->abv", rows, columns, patches).reshape(grid[0] * grid[1], -1)
    return jnp.concatenate([positions[:1], resized.astype(positions.dtype)])


@functools.cache
def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Returns float64[size_out, size_in], the weights of each output sample along one axis.

    The edge sample is repeated beyond the edge.
    """

    def weight(d):
        d = abs(d)
        if d <= 1:
            return (CUBIC + 2) * d**3 - (CUBIC + 3) * d**2 + 1
        return CUBIC * d**3 - 5 * CUBIC * d**2 + 8 * CUBIC * d - 4 * CUBIC

    matrix = np.zeros((size_out, size_in))
    for o in range(size_out):
        u = (o + 0.5) * size_in / size_out - 0.5
        j = int(np.floor(u))
        for k in range(-1, 3):
            matrix[o, np.clip(j + k, 0, size_in - 1)] += weight(u - (j + k))
    return matrix
