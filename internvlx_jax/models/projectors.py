"""Projectors: what turns the tower's patches into visual tokens (design: model.md 4, 5, lvtc.md 2).

| kind | class | where |
|---|---|---|
| `pvtc` | `PVTC`, the paper's projector-level visual token compression | InternVL-X |
| `mlp1` | `Mlp1`, pixel shuffle and two layers | InternVL2, the baseline |
| `mlp` | `RegionMlp`, two layers per region | what LVTC adds to a model |

All of them cut the patch grid of a tile into square regions and make one token per region. A
projector maps the tower's output [I, 1+P, V], class token first, to [I, Q, D], tokens row-major
over the token grid. `core/projector_sites.py` says which projectors a model has.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias, Union

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.core.model_config import ModelConfig, ProjectorConfig
from internvlx_jax.core.projector_sites import ProjectorSite
from internvlx_jax.models.layers import (
    LayerNorm,
    Linear,
    RMSNorm,
    drop_path,
    gelu,
    normal,
    param,
    split_key,
)

Projector: TypeAlias = Union["PVTC", "Mlp1", "RegionMlp"]

NUM_HEADS = 16  # heads of PVTC at every size: a constant of the release, in no config file
EPS = 1e-6  # of the RMS norms of PVTC and RegionMlp


def make_projector(
    config: ModelConfig, site: ProjectorSite, *, rngs: nnx.Rngs, dtype: DTypeLike
) -> Projector:
    """Makes the projector of one place of a model, in the given parameter dtype."""
    kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype)
    patches, vision_width, width = config.vision.grid, config.vision.width, config.decoder.width
    if site.kind == "mlp":
        return RegionMlp(patches // site.grid, vision_width, width, **kwargs)
    if site.kind == "mlp1":
        return Mlp1(config.projector, vision_width, width, **kwargs)
    regions = dataclasses.replace(config.projector, downsample_ratio=site.grid / patches)
    return PVTC(regions, vision_width, site.grid, width, **kwargs)


def split_regions(patches: jax.Array, side: int) -> jax.Array:
    """Cuts the patch grid into regions of `side` x `side` patches.

    Args:
        patches: [I, P, V], row-major over a square grid.
        side: Patches along one side of a region.

    Returns:
        [I, Q, M, V]: regions row-major over the token grid, patches row-major inside a region.
    """
    grid = int(round(patches.shape[1] ** 0.5))
    return rearrange(
        patches, "i (a y b x) v -> i (a b) (y x) v", a=grid // side, y=side, b=grid // side, x=side
    )


def concatenate_patches(regions: jax.Array, pixel_shuffle: Literal["v1", "v2"] = "v2") -> jax.Array:
    """Makes one vector per region from its patches, side by side.

    Args:
        regions: [I, Q, M, V].
        pixel_shuffle: `v1` swaps rows and columns of the token grid. The first InternVL releases
            did so by mistake and their projectors were trained on it; `v2` leaves the grid as it
            is.

    Returns:
        [I, Q, M * V].
    """
    tokens = rearrange(regions, "i q m v -> i q (m v)")
    return transpose_grid(tokens) if pixel_shuffle == "v1" else tokens


def transpose_grid(tokens: jax.Array) -> jax.Array:
    """Swaps rows and columns of the token grid of [I, Q, ...]."""
    grid = int(round(tokens.shape[1] ** 0.5))
    return rearrange(tokens, "i (a b) d -> i (b a) d", a=grid)


class PVTC(nnx.Module):
    """Point-to-region visual token compression: the paper's projector (design: model.md 4).

    Each token of the compressed grid is a query that attends to the patches of its own region, so
    the cost is linear in the number of patches and a token keeps what lies in its region. Two
    kinds of queries look at the same keys through separate blocks, and the results are added:

    * The local query is made of the region's own patches. It asks what this region holds in terms
      of its details, and it is what a plain pixel-shuffle projector would pass on.
    * The global query is made of the class token, the tower's summary of the whole tile. It asks
      what of this region matters for the tile.

    One class token cannot serve all regions alike, therefore `cls_scale`, a learned vector per
    position of the token grid, multiplies it: it acts as a position embedding that tells the
    queries of the regions apart. It also fixes the grid that a trained PVTC can be used on.
    """

    def __init__(
        self,
        config: ProjectorConfig,
        vision_width: int,
        token_grid: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        if width % NUM_HEADS:
            raise ValueError(
                f"PVTC has {NUM_HEADS} heads: decoder.width {width} must be a multiple of it"
            )
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype)
        self.config = config
        region = config.region_side**2 * vision_width
        self.cls_scale = param(normal(1.0), (token_grid**2, width), (None, "embed"), **kwargs)
        self.local_query = SmallMap("iqv,vd->iqd", region, width, **kwargs)
        self.global_query = SmallMap("iv,vd->id", vision_width, width, **kwargs)
        self.region_kv = SmallMap("iqmv,vd->iqmd", vision_width, width, **kwargs)
        self.attn_local = RegionBlock(width, **kwargs)
        self.attn_global = RegionBlock(width, **kwargs)

    def __call__(self, x: jax.Array, *, drop_path_key: jax.Array | None = None) -> jax.Array:
        """Makes [I, Q, D] of [I, 1+P, V]; `drop_path_key` is for training."""
        cls, patches = x[:, 0], x[:, 1:]
        tokens = self.cls_scale.shape[0]
        if patches.shape[1] != tokens * self.config.region_side**2:
            raise ValueError(
                f"PVTC was built for {tokens} tokens of {self.config.region_side}^2 patches per "
                f"tile, got {patches.shape[1]} patches: cls_scale fixes the grid"
            )
        rate = self.config.drop_path
        keys = split_key(drop_path_key if rate > 0 else None, 2)
        regions = split_regions(patches, self.config.region_side)  # [I, Q, M, V]
        # Only the local query follows the pixel shuffle of the release: with v1 its grid is
        # transposed, those of `regions` and `cls_scale` are not, and weights were trained so.
        shuffled = concatenate_patches(regions, self.config.pixel_shuffle)
        local_query = self.local_query(shuffled)  # [I, Q, D]
        scale = self.cls_scale[...].astype(x.dtype)
        global_query = self.global_query(cls)[:, None] * scale  # [I, Q, D]
        kv = self.region_kv(regions)  # [I, Q, M, D]
        with jax.named_scope("pvtc"):
            local = self.attn_local(local_query, kv, keys[0], rate)
            return local + self.attn_global(global_query, kv, keys[1], rate)


class RegionBlock(nnx.Module):
    """Region attention and gated MLP, added to the un-normalized query."""

    def __init__(self, width: int, **kwargs):
        self.attn = RegionAttention(width, **kwargs)
        self.mlp = GatedMlp(width, **kwargs)

    def __call__(
        self, u: jax.Array, kv: jax.Array, key: jax.Array | None, rate: float
    ) -> jax.Array:
        """u: [I, Q, D], kv: [I, Q, M, D] -> [I, Q, D]; drop path acts per token."""
        key1, key2 = split_key(key, 2)
        u = u + drop_path(self.attn(u, kv), key1, rate, batch_dims=2)
        return u + drop_path(self.mlp(u), key2, rate, batch_dims=2)


class RegionAttention(nnx.Module):
    """Attention of one query per region to the M patches of that region.

    Softmax is in float32 in any compute dtype. It runs over as few as four keys, so there is
    nothing to win in a narrower type, and in bfloat16 the weights would not add up to one.
    """

    def __init__(self, width: int, **kwargs):
        n, h = NUM_HEADS, width // NUM_HEADS
        self.q_norm = RMSNorm(width, eps=EPS, **kwargs)
        self.kv_norm = RMSNorm(width, eps=EPS, **kwargs)
        self.q = Linear("iqd,dnh->iqnh", (width, n, h), ("embed", "heads", None), **kwargs)
        self.k = Linear("iqmd,dnh->iqmnh", (width, n, h), ("embed", "heads", None), **kwargs)
        self.v = Linear("iqmd,dnh->iqmnh", (width, n, h), ("embed", "heads", None), **kwargs)
        self.proj = Linear("iqnh,nhd->iqd", (n, h, width), ("heads", None, "embed"), **kwargs)

    def __call__(self, u: jax.Array, kv: jax.Array) -> jax.Array:
        """u: [I, Q, D], kv: [I, Q, M, D] -> [I, Q, D]."""
        kv = self.kv_norm(kv)
        q, k, v = self.q(self.q_norm(u)), self.k(kv), self.v(kv)
        scores = jnp.einsum(
            "iqnh,iqmnh->iqnm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores, axis=-1).astype(u.dtype)
        return self.proj(jnp.einsum("iqnm,iqmnh->iqnh", weights, v))


class GatedMlp(nnx.Module):
    """(silu(x Wgate) * (x Wup)) Wdown on the normalized input; [I, Q, D] -> [I, Q, D]."""

    def __init__(self, width: int, **kwargs):
        self.norm = RMSNorm(width, eps=EPS, **kwargs)
        self.gate = Linear("iqd,df->iqf", (width, 4 * width), ("embed", "mlp"), **kwargs)
        self.up = Linear("iqd,df->iqf", (width, 4 * width), ("embed", "mlp"), **kwargs)
        self.down = Linear("iqf,fd->iqd", (4 * width, width), ("mlp", "embed"), **kwargs)

    def __call__(self, u: jax.Array) -> jax.Array:
        x = self.norm(u)
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class SmallMap(nnx.Module):
    """RMSNorm - Linear - SiLU over the last dim, without biases."""

    def __init__(self, spec: str, width: int, out: int, **kwargs):
        self.norm = RMSNorm(width, eps=EPS, **kwargs)
        self.linear = Linear(spec, (width, out), ("embed", None), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(self.linear(self.norm(x)))


class Mlp1(nnx.Module):
    """The projector of InternVL2: pixel shuffle, LayerNorm, two layers with GELU (model.md 5).

    The class token is dropped.
    """

    def __init__(
        self,
        config: ProjectorConfig,
        vision_width: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype)
        self.config = config
        region = config.region_side**2 * vision_width
        self.norm = LayerNorm(region, eps=1e-5, **kwargs)
        self.fc1 = Linear("iqv,vd->iqd", (region, width), ("embed", "mlp"), bias=True, **kwargs)
        self.fc2 = Linear("iqf,fd->iqd", (width, width), ("mlp", "embed"), bias=True, **kwargs)

    def __call__(self, x: jax.Array, *, drop_path_key: jax.Array | None = None) -> jax.Array:
        """Makes [I, Q, D] of [I, 1+P, V]; without drop path, the key has no effect."""
        regions = split_regions(x[:, 1:], self.config.region_side)
        tokens = concatenate_patches(regions, self.config.pixel_shuffle)
        return self.fc2(gelu(self.fc1(self.norm(tokens))))


class RegionMlp(nnx.Module):
    """The light projector of LVTC's residuals: RMSNorm and two layers with SiLU per region.

    It adds detail to tokens that a PVTC made already, so it need not attend. The class token is
    dropped. A region of one patch is that patch.
    """

    def __init__(
        self, region_side: int, vision_width: int, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        kwargs: dict[str, Any] = dict(rngs=rngs, dtype=dtype)
        self.region_side = region_side
        region = region_side**2 * vision_width
        self.norm = RMSNorm(region, eps=EPS, **kwargs)
        self.fc1 = Linear("iqv,vd->iqd", (region, width), ("embed", "mlp"), **kwargs)
        self.fc2 = Linear("iqf,fd->iqd", (width, width), ("mlp", "embed"), **kwargs)

    def __call__(self, x: jax.Array, *, drop_path_key: jax.Array | None = None) -> jax.Array:
        """Makes [I, Q, D] of [I, 1+P, V]; without drop path, the key has no effect."""
        regions = concatenate_patches(split_regions(x[:, 1:], self.region_side))
        return self.fc2(jax.nn.silu(self.fc1(self.norm(regions))))
