"""The InternVL2 baseline projector: pixel shuffle and a two-layer MLP (spec: model.md 5)."""

from __future__ import annotations

import jax
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.models.config import ProjectorConfig
from internvlx_jax.models.layers import LayerNorm, Linear
from internvlx_jax.models.pvtc import split_regions, transpose_grid


class Mlp1(nnx.Module):
    """x: [I, 1+P, V] -> [I, Q, D]; the class token is dropped."""

    def __init__(self, config: ProjectorConfig, vision_width: int, width: int, *,
                 rngs: nnx.Rngs, dtype: DTypeLike):
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
