"""Linear maps, norms, drop path, remat and layer stacks shared by tower, projectors and decoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Axes = tuple[str | None, ...]

ATTENTION_OUTPUT = (
    "attention_out"  # checkpoint name of what the attention kernel leaves for its backward pass
)

# What of a layer is kept for the backward pass; the rest is computed again.
REMAT_POLICIES = {
    "full": None,  # nothing but the input
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


@dataclasses.dataclass(frozen=True)
class Init:
    """A distribution of fresh parameters: its name for reports, and draw(key, shape, dtype)."""

    name: str
    draw: Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]


def uniform_fan_in(fan_in: int) -> Init:
    """U(-b, b), b = 1 / sqrt(fan_in): PyTorch's default of the tower and the projectors (model.md 12)."""
    bound = fan_in**-0.5
    return Init(
        f"U(-{bound:.4g}, {bound:.4g})",
        lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
    )


def normal(stddev: float) -> Init:
    return Init(
        f"N(0, {stddev:g}^2)",
        lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype),
    )


def constant(value: float) -> Init:
    return Init(f"{value:g}", lambda key, shape, dtype: jnp.full(shape, value, dtype))


def param(
    init: Init, shape: tuple[int, ...], axes: Axes, *, rngs: nnx.Rngs, dtype: DTypeLike
) -> nnx.Param:
    """A parameter whose `axes` name each dim (models/sharding.py maps the names to mesh axes) and whose `init` names
    the distribution."""
    if len(shape) != len(axes):
        raise ValueError(f"{len(axes)} axis names {axes} for shape {shape}")
    return nnx.Param(init.draw(rngs.params(), shape, dtype), axes=axes, init=init.name)


class Linear(nnx.Module):
    """y = einsum(spec, x, kernel) + bias, in x.dtype.

    nnx.Einsum would promote to the parameter dtype; here the input decides, so that one float32 model
    computes in bfloat16 wherever its activations are bfloat16.

    spec names input, kernel and output; the bias has the output dims of the kernel, in kernel order.
    """

    def __init__(
        self,
        spec: str,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        bias: bool = False,
        init: Init | None = None,
        bias_init: Init | None = None,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ):
        inputs, self.output = spec.split("->")
        contracted, letters = inputs.split(",")
        is_output = [letter in self.output for letter in letters]
        fan_in = math.prod(n for n, out in zip(shape, is_output) if not out)
        self.spec = spec
        self.bias_letters = "".join(letter for letter, out in zip(letters, is_output) if out)
        self.kernel = param(init or uniform_fan_in(fan_in), shape, axes, rngs=rngs, dtype=dtype)
        if bias:
            bias_shape = tuple(n for n, out in zip(shape, is_output) if out)
            bias_axes = tuple(a for a, out in zip(axes, is_output) if out)
            self.bias = param(
                bias_init or uniform_fan_in(fan_in), bias_shape, bias_axes, rngs=rngs, dtype=dtype
            )
        else:
            self.bias = None

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Applies the map; `dropout_key` is for adapters, see models/lora.py."""
        y = jnp.einsum(self.spec, x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            bias = self.bias[...].astype(x.dtype)
            y = y + bias.reshape(
                [
                    y.shape[i] if letter in self.bias_letters else 1
                    for i, letter in enumerate(self.output)
                ]
            )
        return y


class RMSNorm(nnx.Module):
    """x / rms(x) over the last dim: statistics in float32, cast back, then times the weight (model.md 13)."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs, dtype: DTypeLike):
        self.eps = eps
        self.weight = param(constant(1.0), (width,), (None,), rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * self.weight[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean and variance over the last dim, weight and bias, all in float32, then cast (model.md 13)."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs, dtype: DTypeLike):
        self.eps = eps
        self.weight = param(constant(1.0), (width,), (None,), rngs=rngs, dtype=dtype)
        self.bias = param(constant(0.0), (width,), (None,), rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32, -1, keepdims=True)
        variance = jnp.mean(jnp.square(x32 - mean), -1, keepdims=True)
        y = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        return (
            y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        ).astype(x.dtype)


def split_key(key: jax.Array | None, count: int) -> Sequence[jax.Array | None]:
    """Splits a key; None, which stands for no randomness, gives as many None."""
    return (None,) * count if key is None else jax.random.split(key, count)


def drop_path(
    branch: jax.Array, key: jax.Array | None, rate: float | jax.Array, batch_dims: int
) -> jax.Array:
    """Zero whole entries of the leading `batch_dims` with probability `rate`, scale the survivors (model.md 3, 4).

    key: None outside training, which is the identity.
    """
    if key is None:
        return branch
    shape = branch.shape[:batch_dims] + (1,) * (branch.ndim - batch_dims)
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, branch / jnp.asarray(1 - rate, branch.dtype), 0)


def rematerialize(body: Callable, policy: str) -> Callable:
    """Wrap a scan body: `none` keeps all activations, `full` recomputes all, `attention` keeps what the splash kernel
    leaves, `dots` keeps matmul outputs, `offload` keeps those in the memory of the host."""
    if policy == "none":
        return body
    if policy not in REMAT_POLICIES:
        raise ValueError(
            f"remat {policy!r} is unknown; choose one of none, {', '.join(REMAT_POLICIES)}"
        )
    return jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=False)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> nnx.Module:
    """`length` layers as one module whose parameters have a leading `layers` dim, ready for lax.scan."""
    keys = jax.random.split(rngs.params(), length)
    layers = jax.vmap(lambda key: make(nnx.Rngs(params=key, lora=jax.random.fold_in(key, 1))))(keys)
    for variable in jax.tree.leaves(layers, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)):
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
    return layers


def slice_layers(layers: nnx.Module, start: int, stop: int) -> nnx.Module:
    """Layers start..stop-1 of a stack or of separate layers; the stack itself when that is all of it."""
    if isinstance(layers, nnx.List):
        return nnx.List(layers[start:stop])
    if start == 0 and all(p.shape[0] == stop for p in jax.tree.leaves(layers)):
        return layers
    return jax.tree.map(lambda p: p[start:stop], layers)


def separate_layers(layers: nnx.Module, length: int) -> nnx.List:
    """The layers of a stack in arrays of their own, for `scan_layers`.

    XLA on a CPU copies a layer's weights out of the stack in every step of a scan, which costs more than a decoding
    step; accelerators read them in place.
    """
    return nnx.List([jax.tree.map(lambda p: p[i], layers) for i in range(length)])


def scan_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], x: Any, layers: nnx.Module, inputs: Any
) -> tuple[Any, Any]:
    """lax.scan of `body(x, (layer, input))` over a stack, or a loop over separate layers; `inputs` are stacked."""
    if not isinstance(layers, nnx.List):
        return jax.lax.scan(body, x, (layers, inputs))
    outputs = []
    for i, layer in enumerate(layers):
        x, output = body(x, (layer, jax.tree.map(lambda leaf: leaf[i], inputs)))
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """x: [B, Z, ...], index: int[B, Y] -> [B, Y, ...]; 0 where the index is out of range."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def insert_visual_tokens(
    visual: jax.Array | None, feature_index: jax.Array, x: jax.Array
) -> jax.Array:
    """Visual tokens in their slots, x in the others.

    visual: [B, T * Q, D]; feature_index: int32[B, S], out of range where x stays; x: [B, S, D] -> [B, S, D]
    visual None: a batch without tiles.
    """
    if visual is None:
        return x
    with jax.named_scope("merge"):
        return jnp.where(
            feature_index[..., None] < visual.shape[1], gather(visual, feature_index), x
        )
