"""PVTC, the point-to-region projector: local and global queries attend to small regions (design: model.md 4)."""

from __future__ import annotations

import dataclasses
from typing import Union

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.core.model_config import ModelConfig, ProjectorConfig
from internvlx_jax.core.projector_sites import ProjectorSite
from internvlx_jax.models.layers import LayerNorm, Linear, RMSNorm, drop_path, normal, param

Projector = Union["PVTC", "Mlp1", "RegionMlp"]


def make_projector(
    config: ModelConfig, site: ProjectorSite, *, rngs: nnx.Rngs, dtype: DTypeLike
) -> Projector:
    """Makes the projector of one place of a model."""
    kwargs = dict(rngs=rngs, dtype=dtype)
    patches, vision_width, width = config.vision.grid, config.vision.width, config.decoder.width
    if site.kind == "mlp":
        return RegionMlp(patches // site.grid, vision_width, width, **kwargs)
    if site.kind == "mlp1":
        return Mlp1(config.projector, vision_width, width, **kwargs)
    regions = dataclasses.replace(config.projector, downsample_ratio=site.grid / patches)
    return PVTC(regions, vision_width, site.grid, width, **kwargs)


NUM_HEADS = 16  # at every size
EPS = 1e-6


def split_regions(patches: jax.Array, side: int) -> jax.Array:
    """[I, P, V] -> [I, Q, M, V]: regions row-major over the token grid, patches row-major inside a region."""
    grid = int(round(patches.shape[1] ** 0.5))
    return rearrange(
        patches, "i (a y b x) v -> i (a b) (y x) v", a=grid // side, y=side, b=grid // side, x=side
    )


def transpose_grid(tokens: jax.Array) -> jax.Array:
    """[I, Q, ...] -> the same with rows and columns of the token grid swapped (pixel shuffle v1)."""
    grid = int(round(tokens.shape[1] ** 0.5))
    return rearrange(tokens, "i (a b) d -> i (b a) d", a=grid, b=grid)


class SmallMap(nnx.Module):
    """RMSNorm - Linear - SiLU over the last dim; no biases."""

    def __init__(self, spec: str, width: int, out: int, **kwargs):
        self.norm = RMSNorm(width, eps=EPS, **kwargs)
        self.linear = Linear(spec, (width, out), ("embed", None), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(self.linear(self.norm(x)))


class RegionAttention(nnx.Module):
    """One query attends to the M keys of its own region; [I, Q, D], [I, Q, M, D] -> [I, Q, D]."""

    def __init__(self, width: int, **kwargs):
        n, h = NUM_HEADS, width // NUM_HEADS
        self.q_norm = RMSNorm(width, eps=EPS, **kwargs)
        self.kv_norm = RMSNorm(width, eps=EPS, **kwargs)
        self.q = Linear("iqd,dnh->iqnh", (width, n, h), ("embed", "heads", None), **kwargs)
        self.k = Linear("iqmd,dnh->iqmnh", (width, n, h), ("embed", "heads", None), **kwargs)
        self.v = Linear("iqmd,dnh->iqmnh", (width, n, h), ("embed", "heads", None), **kwargs)
        self.proj = Linear("iqnh,nhd->iqd", (n, h, width), ("heads", None, "embed"), **kwargs)

    def __call__(self, u: jax.Array, kv: jax.Array) -> jax.Array:
        kv = self.kv_norm(kv)
        q, k, v = self.q(self.q_norm(u)), self.k(kv), self.v(kv)
        scores = jnp.einsum(
            "iqnh,iqmnh->iqnm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores, axis=-1).astype(u.dtype)
        return self.proj(jnp.einsum("iqnm,iqmnh->iqnh", weights, v))


class GatedMlp(nnx.Module):
    """(silu(x Wgate) * (x Wup)) Wdown on the normalised input; [I, Q, D] -> [I, Q, D]."""

    def __init__(self, width: int, **kwargs):
        self.norm = RMSNorm(width, eps=EPS, **kwargs)
        self.gate = Linear("iqd,df->iqf", (width, 4 * width), ("embed", "mlp"), **kwargs)
        self.up = Linear("iqd,df->iqf", (width, 4 * width), ("embed", "mlp"), **kwargs)
        self.down = Linear("iqf,fd->iqd", (4 * width, width), ("mlp", "embed"), **kwargs)

    def __call__(self, u: jax.Array) -> jax.Array:
        x = self.norm(u)
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class RegionBlock(nnx.Module):
    """Region attention and gated MLP around the un-normalised query."""

    def __init__(self, width: int, **kwargs):
        self.attn = RegionAttention(width, **kwargs)
        self.mlp = GatedMlp(width, **kwargs)

    def __call__(
        self, u: jax.Array, kv: jax.Array, key: jax.Array | None, rate: float
    ) -> jax.Array:
        key1, key2 = (None, None) if key is None else jax.random.split(key)
        u = u + drop_path(self.attn(u, kv), key1, rate, batch_dims=2)
        return u + drop_path(self.mlp(u), key2, rate, batch_dims=2)


class PVTC(nnx.Module):
    """x: [I, 1+P, V] with the class token first -> [I, Q, D], tokens row-major over the grid."""

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
        kwargs = dict(rngs=rngs, dtype=dtype)
        self.config = config
        region = config.region_side**2 * vision_width
        self.cls_scale = param(normal(1.0), (token_grid**2, width), (None, "embed"), **kwargs)
        self.local_query = SmallMap("iqv,vd->iqd", region, width, **kwargs)
        self.global_query = SmallMap("iv,vd->id", vision_width, width, **kwargs)
        self.region_kv = SmallMap("iqmv,vd->iqmd", vision_width, width, **kwargs)
        self.attn_local = RegionBlock(width, **kwargs)
        self.attn_global = RegionBlock(width, **kwargs)

    def __call__(self, x: jax.Array, *, drop_path_key: jax.Array | None = None) -> jax.Array:
        cls, patches = x[:, 0], x[:, 1:]
        tokens = self.cls_scale.shape[0]
        if patches.shape[1] != tokens * self.config.region_side**2:
            raise ValueError(
                f"PVTC was built for {tokens} tokens of {self.config.region_side}^2 patches a tile, "
                f"got {patches.shape[1]} patches: cls_scale fixes the grid"
            )
        rate = self.config.drop_path
        keys = (None, None)
        if drop_path_key is not None and rate > 0:
            keys = jax.random.split(drop_path_key)
        regions = split_regions(patches, self.config.region_side)  # [I, Q, M, V]
        local_query = self.local_query(rearrange(regions, "i q m v -> i q (m v)"))  # [I, Q, D]
        if self.config.pixel_shuffle == "v1":
            local_query = transpose_grid(local_query)
        scale = self.cls_scale[...].astype(x.dtype)
        global_query = self.global_query(cls)[:, None] * scale  # [I, Q, D]
        kv = self.region_kv(regions)  # [I, Q, M, D]
        with jax.named_scope("pvtc"):
            local = self.attn_local(local_query, kv, keys[0], rate)
            return local + self.attn_global(global_query, kv, keys[1], rate)


class Mlp1(nnx.Module):
    """x: [I, 1+P, V] -> [I, Q, D]; the class token is dropped."""

    def __init__(
        self,
        config: ProjectorConfig,
        vision_width: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        kwargs = dict(rngs=rngs, dtype=dtype)
        self.config = config
        region = config.region_side**2 * vision_width
        self.norm = LayerNorm(region, eps=1e-5, **kwargs)
        self.fc1 = Linear("iqv,vd->iqd", (region, width), ("embed", "mlp"), bias=True, **kwargs)
        self.fc2 = Linear("iqf,fd->iqd", (width, width), ("mlp", "embed"), bias=True, **kwargs)

    def __call__(self, x: jax.Array, *, drop_path_key: jax.Array | None = None) -> jax.Array:
        """drop_path_key is PVTC's; this projector has no drop path."""
        tokens = rearrange(split_regions(x[:, 1:], self.config.region_side), "i q m v -> i q (m v)")
        if self.config.pixel_shuffle == "v1":
            tokens = transpose_grid(tokens)
        return self.fc2(jax.nn.gelu(self.fc1(self.norm(tokens)), approximate=False))


class RegionMlp(nnx.Module):
    """x: [I, 1+P, V] -> [I, Q, D], tokens row-major over the grid; the class token is dropped.

    A region of one patch is that patch: then nothing is shuffled.
    """

    def __init__(
        self, region_side: int, vision_width: int, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        kwargs = dict(rngs=rngs, dtype=dtype)
        self.region_side = region_side
        region = region_side**2 * vision_width
        self.norm = RMSNorm(region, eps=1e-6, **kwargs)
        self.fc1 = Linear("iqv,vd->iqd", (region, width), ("embed", "mlp"), **kwargs)
        self.fc2 = Linear("iqf,fd->iqd", (width, width), ("mlp", "embed"), **kwargs)

    def __call__(self, x: jax.Array, *, drop_path_key: jax.Array | None = None) -> jax.Array:
        """drop_path_key is PVTC's; this projector has no drop path."""
        regions = rearrange(split_regions(x[:, 1:], self.region_side), "i q m v -> i q (m v)")
        return self.fc2(jax.nn.silu(self.fc1(self.norm(regions))))
