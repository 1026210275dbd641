"""Linear maps, norms, drop path and layer stacks of tower, projectors, decoder (design: model.md).

Linear maps are einsums on kernels with named axes. Flax has modules for all of this, but they
promote to the dtype of their parameters; here the input decides, so that one float32 model computes
in bfloat16 wherever its activations are bfloat16 (design: model.md 13).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

Axes = tuple[str | None, ...]

# Checkpoint name of what the attention kernel leaves for its backward pass.
ATTENTION_OUTPUT = "attention_out"

# What a layer keeps for the backward pass besides its input; the rest is computed again.
REMAT_POLICIES = {
    "full": None,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    # Attention is products too, but the kernels hide them.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    ),
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


@dataclasses.dataclass(frozen=True)
class Init:
    """A distribution of fresh parameters.

    Attributes:
        name: The distribution in words, for reports.
        draw: (key, shape, dtype) -> values.
    """

    name: str
    draw: Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]


def uniform_fan_in(fan_in: int) -> Init:
    """Returns U(-b, b), b = 1 / sqrt(fan_in).

    PyTorch's default, which fills fresh towers and projectors of the release (model.md 12).
    """
    bound = fan_in**-0.5
    return Init(
        f"U(-{bound:.4g}, {bound:.4g})",
        lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
    )


def normal(stddev: float) -> Init:
    """Returns a normal distribution around 0."""
    return Init(
        f"N(0, {stddev:g}^2)",
        lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype),
    )


def constant(value: float) -> Init:
    """Returns the distribution that holds one value."""
    return Init(f"{value:g}", lambda key, shape, dtype: jnp.full(shape, value, dtype))


class ShapesOnly(nnx.Rngs):
    """Takes the place of randomness in a model that is described and never filled.

    Tracing the draws of all parameters would take longer than the rest of the description.
    """

    def __init__(self) -> None:
        super().__init__(0)


def param(
    init: Init, shape: tuple[int, ...], axes: Axes, *, rngs: nnx.Rngs, dtype: DTypeLike
) -> nnx.Param:
    """Makes a parameter.

    Args:
        init: Distribution of the fresh values; its name is kept as metadata.
        shape: Of the parameter.
        axes: A name per dim, which models/sharding.py maps to mesh axes.
        rngs: Stream `params`, or ShapesOnly.
        dtype: Of the parameter.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{len(axes)} axis names {axes} for shape {shape}")
    if isinstance(rngs, ShapesOnly):
        value = jnp.zeros(shape, dtype)
    else:
        value = init.draw(rngs.params(), shape, dtype)
    return nnx.Param(value, axes=axes, init=init.name)


def product(spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes float32 einsum(spec, x, kernel) of 16-bit arrays in the way that is fast on a CPU.

    XLA:CPU multiplies them as they are only where the result is float32 and there are at least two
    rows; else it makes float32 copies of both first, which takes two to seven times as long and
    twice the memory of the weights. The backward pass is written out because the automatic one
    would multiply float32 gradients with 16-bit arrays, which makes copies again.

    Args:
        spec: Names the dims of x, kernel and result, each letter at least twice.
        x, kernel: In the same dtype.
    """
    return cast(jax.Array, _product(spec, x, kernel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    (of_x, of_kernel), output = spec.split("->")[0].split(","), spec.split("->")[1]
    rows, inside = ("".join(c for c in of_x if (c in output) == kept) for kept in (True, False))
    outside = "".join(c for c in of_kernel if c in output)
    turned = of_kernel == outside + inside
    if of_x != rows + inside or not (turned or of_kernel == inside + outside):
        return jnp.einsum(spec, x, kernel, preferred_element_type=jnp.float32)
    # Matrices, since XLA copies kernels of more dims into matrices first.
    size = dict(zip(of_x + of_kernel, x.shape + kernel.shape, strict=True))
    count, within, beyond = (math.prod(size[c] for c in part) for part in (rows, inside, outside))
    matrix = jnp.pad(x.reshape(count, within), ((0, int(count == 1)), (0, 0)))
    # Not einsum, which puts the larger operand first, and so has XLA turn it once more.
    y = jax.lax.dot_general(
        matrix,
        kernel.reshape((beyond, within) if turned else (within, beyond)),
        (((1,), (int(turned),)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    y = y[:count].reshape([size[c] for c in rows + outside])
    return jnp.einsum(f"{rows}{outside}->{output}", y)


def _product_backward(spec: str, kept: tuple[jax.Array, jax.Array], dy: jax.Array):
    (x, kernel), (inputs, output) = kept, spec.split("->")
    of_x, of_kernel = inputs.split(",")
    dy = dy.astype(x.dtype)
    dx = product(f"{output},{of_kernel}->{of_x}", dy, kernel)
    dkernel = product(f"{of_x},{output}->{of_kernel}", x, dy)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_product.defvjp(lambda spec, x, kernel: (product(spec, x, kernel), (x, kernel)), _product_backward)


class Linear(nnx.Module):
    """y = einsum(spec, x, kernel) + bias, in x.dtype.

    `spec` names input, kernel and output. The bias has the output dims of the kernel, in the
    kernel's order. Kernels are stored input first.

    Attributes:
        on_cpu: Whether the products of 16-bit arrays are those of `product`.
    """

    on_cpu = False

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
        letters = inputs.split(",")[1]
        is_output = [letter in self.output for letter in letters]
        fan_in = math.prod(n for n, out in zip(shape, is_output, strict=True) if not out)
        self.spec = spec
        self.bias_letters = "".join(
            letter for letter, out in zip(letters, is_output, strict=True) if out
        )
        self.kernel = param(init or uniform_fan_in(fan_in), shape, axes, rngs=rngs, dtype=dtype)
        if not bias:
            self.bias = None
        else:
            bias_shape = tuple(n for n, out in zip(shape, is_output, strict=True) if out)
            bias_axes = tuple(a for a, out in zip(axes, is_output, strict=True) if out)
            self.bias = param(
                bias_init or uniform_fan_in(fan_in), bias_shape, bias_axes, rngs=rngs, dtype=dtype
            )

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Applies the map; `dropout_key` is for adapters, see models/lora.py."""
        y = self.multiply(self.spec, x, self.kernel[...].astype(x.dtype))
        if self.bias is None:
            return y
        bias = self.bias[...].astype(x.dtype)
        sizes = zip(self.output, y.shape, strict=True)
        shape = [size if letter in self.bias_letters else 1 for letter, size in sizes]
        return y + bias.reshape(shape)

    def turn(self) -> None:
        """Stores the kernel with its outputs first, which products of few rows read faster."""
        x, letters = self.spec.split("->")[0].split(",")
        outputs = [letter for letter in letters if letter in self.output]
        turned = "".join([*outputs, *(letter for letter in letters if letter not in outputs)])
        self.kernel = nnx.Param(jnp.einsum(f"{letters}->{turned}", self.kernel[...]))
        self.spec = f"{x},{turned}->{self.output}"

    def multiply(self, spec: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Computes einsum(spec, x, kernel) in their dtype."""
        if self.on_cpu and x.dtype.itemsize == 2:
            return product(spec, x, kernel).astype(x.dtype)
        return jnp.einsum(spec, x, kernel)


class RMSNorm(nnx.Module):
    """x / rms(x) over the last dim, times a weight (model.md 13).

    Statistics are in float32, since squares of bfloat16 activations lose the small ones. The
    result is cast back before the weight is applied, in the order of the release.
    """

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs, dtype: DTypeLike):
        self.eps = eps
        self.weight = param(constant(1.0), (width,), (None,), rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * self.weight[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last dim, with weight and bias.

    Everything is in float32 and cast at the end, in the order of the release (model.md 13).
    """

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


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Computes the exact GELU in float32, x * (1 + erf(x / sqrt(2))) / 2, as the release does.

    jax.nn.gelu takes erfc, which costs a CPU two and a half times as much. The derivative is
    written out so that a backward pass keeps one array in the dtype of x.
    """
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * np.float32(0.5**0.5)))).astype(x.dtype)


@gelu.defjvp
def _gelu_derivative(primals, tangents):
    (x,), (dx,) = primals, tangents
    x32 = x.astype(jnp.float32)
    below = 0.5 * (1 + jax.lax.erf(x32 * np.float32(0.5**0.5)))
    density = jnp.exp(-0.5 * jnp.square(x32)) * np.float32((2 * math.pi) ** -0.5)
    return (x32 * below).astype(x.dtype), (below + x32 * density).astype(x.dtype) * dx


def split_key(key: jax.Array | None, count: int) -> Sequence[jax.Array | None] | jax.Array:
    """Splits a key; None, which stands for no randomness, gives as many None."""
    return (None,) * count if key is None else jax.random.split(key, count)


def drop_path(
    branch: jax.Array, key: jax.Array | None, rate: float | jax.Array, batch_dims: int
) -> jax.Array:
    """Drops a residual branch at random (model.md 3, 4).

    Whole entries of the leading `batch_dims` become zero with probability `rate`, and survivors
    are divided by 1 - rate, so that the expected value stays.

    Args:
        branch: What a residual connection adds.
        key: None outside training, which is the identity.
        rate: Probability; a traced scalar where layers of a stack differ.
        batch_dims: Leading dims that are dropped independently of each other.
    """
    if key is None:
        return branch
    shape = branch.shape[:batch_dims] + (1,) * (branch.ndim - batch_dims)
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, branch / jnp.asarray(1 - rate, branch.dtype), 0)


def rematerialize(body: Callable, policy: str) -> Callable:
    """Wraps the body of a scan over layers.

    Args:
        body: Runs one layer.
        policy: `none` keeps all activations, `full` recomputes all of them, `attention` keeps what
            the attention kernels leave, `dots` keeps that and the results of matrix products,
            `offload` keeps those results in the memory of the host.

    Raises:
        ValueError: The policy is unknown.
    """
    if policy == "none":
        return body
    if policy not in REMAT_POLICIES:
        raise ValueError(
            f"remat {policy!r} is unknown; choose one of none, {', '.join(REMAT_POLICIES)}"
        )
    # Inside a scan XLA cannot merge the recomputation with the forward pass: nothing to prevent.
    return jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=False)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> nnx.Module:
    """Makes `length` layers as one module whose parameters have a leading `layers` dim.

    A scan over such a stack compiles one layer however many there are. Adapters draw from a stream
    of their own, so that the base has the same fresh values with and without them.
    """
    if isinstance(rngs, ShapesOnly):
        layers = jax.vmap(lambda _: make(rngs))(jnp.arange(length))
    else:
        keys = jax.random.split(rngs.params(), length)
        layers = jax.vmap(lambda key: make(nnx.Rngs(params=key, lora=jax.random.fold_in(key, 1))))(
            keys
        )
    for variable in jax.tree.leaves(layers, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)):
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
    return layers


def slice_layers(layers: nnx.Module, start: int, stop: int) -> nnx.Module:
    """Returns layers start..stop-1 of a stack or of separate layers.

    The stack itself is returned when that is all of it: a slice would copy its weights.
    """
    if isinstance(layers, nnx.List):
        return nnx.List(layers[start:stop])
    if start == 0 and all(p.shape[0] == stop for p in jax.tree.leaves(layers)):
        return layers
    return jax.tree.map(lambda p: p[start:stop], layers)


def separate_layers(layers: nnx.Module, length: int) -> nnx.List:
    """Returns the layers of a stack in arrays of their own, for `scan_layers`.

    XLA copies a layer's weights out of the stack in every step of a scan, which costs more than
    the decoding step.
    """
    # In one program: compiling a slice for each layer and parameter takes longer than the slices.
    return nnx.List(_separate(layers, length))


@functools.partial(jax.jit, static_argnums=1)
def _separate(layers: nnx.Module, length: int) -> list[nnx.Module]:
    return [jax.tree.map(lambda p, i=i: p[i], layers) for i in range(length)]


def scan_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], x: Any, layers: nnx.Module, inputs: Any
) -> tuple[Any, Any]:
    """Runs `body(x, (layer, input))` over a stack by lax.scan, or over separate layers by a loop.

    Args:
        body: Returns the next x, and an output.
        x: Carried from layer to layer.
        layers: A stack, or an nnx.List of layers.
        inputs: A pytree whose leaves have a leading layer dim; for separate layers also a list
            with an entry for each.

    Returns:
        The last x; and the outputs, stacked, or a list if the inputs are one.
    """
    if not isinstance(layers, nnx.List):
        return jax.lax.scan(body, x, (layers, inputs))
    outputs = []
    body = jax.jit(body)  # layers of equal shapes are traced once; XLA puts the calls in line
    for i, layer in enumerate(layers):
        own = inputs[i] if isinstance(inputs, list) else jax.tree.map(lambda leaf: leaf[i], inputs)
        x, output = body(x, (layer, own))
        outputs.append(output)
    if isinstance(inputs, list):
        return x, outputs
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def move_bits(move: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Applies a function that moves 16-bit numbers and computes none, without gradients.

    It sees their bits as integers: XLA:CPU makes float32 copies of whole bfloat16 arrays before it
    reads or writes a part of them.
    """
    bits = (jax.lax.bitcast_convert_type(array, jnp.uint16) for array in arrays)
    return jax.lax.bitcast_convert_type(move(*bits), arrays[0].dtype)


def gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """Takes x[b, index[b, y]] for every row; [B, Z, ...], int[B, Y] -> [B, Y, ...].

    An index out of range means "none" and gives 0. It is never clamped: that would read a real
    slot.
    """
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def insert_visual_tokens(
    visual: jax.Array | None, feature_index: jax.Array, x: jax.Array
) -> jax.Array:
    """Puts visual tokens into their slots and leaves text as it is (model.md 7).

    The merge is a gather and a select, not a scatter: each slot looks up its own token, so the
    slots of a row need nothing from another row or device, nothing depends on how many tiles a
    sample has, and the text embedding of a placeholder gets a gradient of exactly zero.

    Args:
        visual: [B, T * Q, D], or None for a batch without tiles.
        feature_index: int32[B, S], the row's visual token of each slot; out of range on text.
        x: [B, S, D].

    Returns:
        [B, S, D].
    """
    if visual is None:
        return x
    with jax.named_scope("merge"):
        return jnp.where(
            feature_index[..., None] < visual.shape[1], gather(visual, feature_index), x
        )
