"""LoRA: low-rank additions to the linear maps of the layer stacks (design: training.md 11).

    y = x W + b + scale * (drop(x) A) B

A starts as U(-1/sqrt(in), 1/sqrt(in)) and B as zero, so that a model with fresh adapters computes
what its base computes. The adapters of the linear map `M.kernel` are two parameters beside it, in
the axes of that kernel:

    M.lora_a  [L, *in, r]     M.lora_b  [L, r, *out]

Checkpoints of Llama and Qwen2 keep queries, keys and values apart. Adapters of those checkpoints
have to find a place in the packed kernel here, so each of the three has a pair of its own:
`M.lora_a_q`, `M.lora_b_q`, `M.lora_a_k`, ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import LoraConfig
from internvlx_jax.models.layers import (
    Axes,
    Linear,
    ShapesOnly,
    constant,
    param,
    uniform_fan_in,
)

# Suffix of the parameter names, and how much of the output's axis j that pair covers (None: all).
Pieces = tuple[tuple[str, int | None], ...]
WHOLE: Pieces = (("", None),)


class LoraLinear(Linear):
    """Wraps a linear map: its kernel and bias as in `Linear`, and a low-rank addition.

    Adapters are float32 whatever the base is stored in: they are what the run trains. They draw
    from the stream `lora`, so that the base has the same fresh values with and without them.
    """

    def __init__(
        self,
        spec: str,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        lora: LoraConfig,
        pieces: Pieces = WHOLE,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        **kwargs,
    ):
        super().__init__(spec, shape, axes, rngs=rngs, dtype=dtype, **kwargs)
        self.scale, self.dropout, self.pieces = lora.scale, lora.dropout, pieces
        letters = spec.split("->")[0].split(",")[1]
        size, axis = dict(zip(letters, shape, strict=True)), dict(zip(letters, axes, strict=True))
        inside, outside = _sides(spec)
        in_shape = tuple(size[letter] for letter in inside)
        in_axes = tuple(axis[letter] for letter in inside)
        out_axes = tuple(axis[letter] for letter in outside)
        draws = rngs if isinstance(rngs, ShapesOnly) else nnx.Rngs(params=rngs.lora())
        fresh: dict[str, Any] = dict(rngs=draws, dtype=jnp.float32)
        for end, count in pieces:
            out = tuple(count if count and letter == "j" else size[letter] for letter in outside)
            init = uniform_fan_in(math.prod(in_shape))
            a = param(init, (*in_shape, lora.rank), (*in_axes, None), **fresh)
            b = param(constant(0.0), (lora.rank, *out), (None, *out_axes), **fresh)
            setattr(self, f"lora_a{end}", a)
            setattr(self, f"lora_b{end}", b)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        return super().__call__(x) + self._addition(x, dropout_key)

    def _addition(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        to_rank, from_rank = _specs(self.spec)
        if self.dropout and dropout_key is not None:
            keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / jnp.asarray(1 - self.dropout, x.dtype), 0)
        parts = []
        for end, _ in self.pieces:
            a, b = (getattr(self, f"lora_{side}{end}")[...].astype(x.dtype) for side in "ab")
            parts.append(self.multiply(from_rank, self.multiply(to_rank, x, a), b))
        y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=self.output.index("j"))
        return y * jnp.asarray(self.scale, y.dtype)


def make_linear(
    spec: str,
    shape: tuple[int, ...],
    axes: Axes,
    *,
    lora: LoraConfig | None,
    pieces: Pieces = WHOLE,
    **kwargs,
) -> Linear:
    """Makes a linear map of a layer stack, with an adapter where `lora` asks for one."""
    if lora is None:
        return Linear(spec, shape, axes, **kwargs)
    return LoraLinear(spec, shape, axes, lora=lora, pieces=pieces, **kwargs)


def by_part(loras: Sequence[LoraConfig]) -> dict[str, LoraConfig]:
    """Returns the adapters of each part of a model.

    Raises:
        ConfigError: Two entries name the same part.
    """
    parts = [lora.part for lora in loras]
    if len(set(parts)) != len(parts):
        raise ConfigError(f"lora: {', '.join(parts)} name a part twice; give one entry per part")
    return {lora.part: lora for lora in loras}


def is_adapter(path: str) -> bool:
    """Tells whether a dotted parameter path is that of an adapter."""
    return ".lora_" in path


def _sides(spec: str) -> tuple[str, str]:
    """Returns the letters of a kernel that are summed over, and those of the output."""
    inputs, output = spec.split("->")
    kernel = inputs.split(",")[1]
    return "".join(x for x in kernel if x not in output), "".join(x for x in kernel if x in output)


def _specs(spec: str) -> tuple[str, str]:
    """`bsd,dkjh->bskjh` -> `bsd,dr->bsr`, `bsr,rkjh->bskjh`."""
    inputs, output = spec.split("->")
    x = inputs.split(",")[0]
    inside, outside = _sides(spec)
    hidden = "".join(letter for letter in x if letter not in inside) + "r"
    return f"{x},{inside}r->{hidden}", f"{hidden},r{outside}->{output}"
