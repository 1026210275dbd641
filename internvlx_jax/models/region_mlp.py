"""The `mlp` projector of LVTC: RMSNorm - Linear - SiLU - Linear on each region of patches (spec: lvtc.md 2)."""

from __future__ import annotations

import jax
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.models.layers import Linear, RMSNorm
from internvlx_jax.models.pvtc import split_regions

EPS = 1e-6


class RegionMlp(nnx.Module):
    """x: [I, 1+P, V] -> [I, Q, D], tokens row-major over the grid; the class token is dropped.

    A region of one patch is that patch: then nothing is shuffled.
    """

    def __init__(self, region_side: int, vision_width: int, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        kwargs = dict(rngs=rngs, dtype=dtype)
        self.region_side = region_side
        region = region_side**2 * vision_width
        self.norm = RMSNorm(region, eps=EPS, **kwargs)
        self.fc1 = Linear("iqv,vd->iqd", (region, width), ("embed", "mlp"), **kwargs)
        self.fc2 = Linear("iqf,fd->iqd", (width, width), ("mlp", "embed"), **kwargs)

    def __call__(self, x: jax.Array, *, drop_path_key: jax.Array | None = None) -> jax.Array:
        """drop_path_key is PVTC's; this projector has no drop path."""
        regions = rearrange(split_regions(x[:, 1:], self.region_side), "i q m v -> i q (m v)")
        return self.fc2(jax.nn.silu(self.fc1(self.norm(regions))))
