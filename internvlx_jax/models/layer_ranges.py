"""Runs a part of a layer stack without copying its weights (design: lvtc.md 5).

LVTC runs two ranges of one stack. A slice of the stack is a copy in XLA, and the gradient of a
slice is a whole stack of zeros around it. Here a scan goes over layer numbers instead and reads
each layer where it lies. Backward, each layer's gradient is written in place into the one gradient
of the stack, which the ranges hand to each other: a range returns the stack that it was given, and
the next range has to take it from there. Automatic differentiation would add a whole stack per
layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from internvlx_jax.models.layers import scan_layers

# (x, layer, its inputs, context) -> next x, output
Body = Callable[[Any, nnx.Module, Any, Any], tuple[Any, Any]]
Leaves = list[Any]


def run_range(
    body: Body,
    x: jax.Array,
    layers: nnx.Module,
    inputs: Any,
    context: Any,
    start: int,
    stop: int,
    keep_outputs: bool,
) -> tuple[jax.Array, Any, nnx.Module]:
    """Runs the layers start..stop-1 of a stack, or of separate layers.

    Args:
        body: Runs one layer; rematerialized already.
        x: Carried from layer to layer.
        layers: A stack, or an nnx.List of layers.
        inputs: As in layers.scan_layers, for the layers of the range.
        context: Arrays that all layers read.
        start, stop: The range.
        keep_outputs: Whether the outputs of the layers count; then a part of a stack has no
            gradient.

    Returns:
        The last x; the outputs, stacked, or a list if the inputs are one; and the stack, which the
        next range has to take.
    """

    def paired(x, layer_and_inputs):
        layer, own = layer_and_inputs
        return body(x, layer, own, context)

    if isinstance(layers, nnx.List):
        return *scan_layers(paired, x, nnx.List(layers[start:stop]), inputs), layers
    if start == 0 and all(leaf.shape[0] == stop for leaf in jax.tree.leaves(layers)):
        return *scan_layers(paired, x, layers, inputs), layers
    numbers = range(start, stop)
    if keep_outputs:
        return *scan_range(body, x, layers, inputs, context, numbers), layers
    x, layers = differentiable_range(body, x, layers, inputs, context, numbers)
    return x, None, layers


def scan_range(
    body: Body, x: jax.Array, layers: nnx.Module, inputs: Any, context: Any, numbers: range
) -> tuple[jax.Array, Any]:
    """Runs consecutive layers of a stack, forward only.

    Args:
        body: Runs one layer; rematerialized already.
        x: Carried from layer to layer.
        layers: The whole stack.
        inputs: A pytree whose leaves have a leading dim, the layers of the range.
        context: Arrays that all layers read.
        numbers: The layers to run.

    Returns:
        The last x, and the outputs, stacked.
    """

    def step(x, numbered):
        number, own = numbered
        return body(x, _layer(layers, number), own, context)

    return jax.lax.scan(step, x, (_array(numbers), inputs))


def differentiable_range(
    body: Body, x: jax.Array, layers: nnx.Module, inputs: Any, context: Any, numbers: range
) -> tuple[jax.Array, nnx.Module]:
    """Does the same for gradients with respect to x and the layers, in reverse mode.

    Args:
        body, x, layers, inputs, context, numbers: As in `scan_range`; outputs of the layers are not
            kept. No gradient flows to inputs and context.

    Returns:
        The last x, and the stack for the range that runs next. The layers of this range are used
        up in it: a gradient that came to them from elsewhere would be overwritten.
    """
    leaves, structure = jax.tree.flatten(layers)
    run = _Range(body, structure, numbers)
    compute = jax.custom_vjp(run.forward)
    compute.defvjp(run.forward_and_keep, run.backward, symbolic_zeros=True)
    x, leaves = compute(x, leaves, inputs, context)
    return x, jax.tree.unflatten(structure, leaves)


@dataclasses.dataclass
class _Range:
    """Holds what one call of `differentiable_range` knows outside of the arrays.

    Attributes:
        body, numbers: See there.
        structure: Of the stack.
        plan: How the backward function of a layer is put together, found by the forward pass.
    """

    body: Body
    structure: Any
    numbers: range
    plan: _Plan | None = None

    def forward(self, x, leaves: Leaves, inputs, context):
        layers = jax.tree.unflatten(self.structure, leaves)
        x, _ = scan_range(self.body, x, layers, inputs, context, self.numbers)
        return x, leaves

    def forward_and_keep(self, x, leaves, inputs, context):
        learns = tuple(leaf.perturbed for leaf in leaves)
        x, leaves, inputs, context = jax.tree.map(
            lambda primal: primal.value,
            (x, leaves, inputs, context),
            is_leaf=lambda node: hasattr(node, "perturbed"),
        )

        def step(x, numbered):
            number, own = numbered
            layer = [_at(leaf, number) for leaf in leaves]
            learned = [leaf for leaf, learn in zip(layer, learns, strict=True) if learn]

            def run(x, learned):
                mixed = _join(learned, layer, learns)
                return self.body(x, jax.tree.unflatten(self.structure, mixed), own, context)[0]

            x, backward = jax.vjp(run, x, learned)
            given = [*layer, *jax.tree.leaves((own, context))]
            self.plan, kept = _Plan.of(backward, given, learns)
            return x, kept

        x, kept = jax.lax.scan(step, x, (_array(self.numbers), inputs))
        return (x, leaves), (kept, leaves, inputs, context)

    def backward(self, residuals, gradients):
        kept, leaves, inputs, context = residuals
        assert self.plan is not None
        plan, (of_x, of_stack) = self.plan, gradients
        of_x = _instantiated(of_x)
        of_stack = [
            _instantiated(g) for g, learn in zip(of_stack, plan.learns, strict=True) if learn
        ]

        def step(carried, numbered):
            of_x, of_stack = carried
            number, kept, own = numbered
            layer = [_at(leaf, number) for leaf in leaves]
            of_x, of_layer = plan.backward(kept, [*layer, *jax.tree.leaves((own, context))])(of_x)
            of_stack = [
                jax.lax.dynamic_update_index_in_dim(whole, one, number, 0)
                for whole, one in zip(of_stack, of_layer, strict=True)
            ]
            return (of_x, of_stack), None

        (of_x, of_stack), _ = jax.lax.scan(
            step, (of_x, of_stack), (_array(self.numbers), kept, inputs), reverse=True
        )
        return of_x, _join(of_stack, [None] * len(leaves), plan.learns), None, None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Says how to put a layer's backward function together again.

    What it keeps is partly the layer's own weights, and arrays that all layers share. Those are
    taken from where they lie; only the rest is stored for each layer.

    Attributes:
        structure: Of the backward function, a pytree.
        sources: For each of its leaves the number of the given array that it is, or None if it is
            stored.
        learns: Which leaves of the stack get a gradient.
    """

    structure: Any
    sources: tuple[int | None, ...]
    learns: tuple[bool, ...]

    @classmethod
    def of(
        cls, backward: Any, given: Sequence[Any], learns: tuple[bool, ...]
    ) -> tuple[_Plan, Leaves]:
        """Returns the plan and what has to be stored."""
        leaves, structure = jax.tree.flatten(backward)
        number = {id(array): i for i, array in enumerate(given)}
        sources = tuple(number.get(id(leaf)) for leaf in leaves)
        stored = [leaf for leaf, source in zip(leaves, sources, strict=True) if source is None]
        return cls(structure, sources, learns), stored

    def backward(self, stored: Leaves, given: Sequence[Any]) -> Any:
        """Returns the backward function of one layer."""
        rest = iter(stored)
        leaves = [next(rest) if source is None else given[source] for source in self.sources]
        return jax.tree.unflatten(self.structure, leaves)


def _layer(layers: nnx.Module, number: jax.Array) -> nnx.Module:
    return jax.tree.map(lambda leaf: _at(leaf, number), layers)


def _at(leaf: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, number, 0, keepdims=False)


def _array(numbers: range) -> jax.Array:
    return jnp.arange(numbers.start, numbers.stop)


def _join(learned: Leaves, others: Leaves, learns: Sequence[bool]) -> Leaves:
    """Puts `learned` in the places where `learns` is true."""
    rest = iter(learned)
    return [next(rest) if learn else other for learn, other in zip(learns, others, strict=True)]


def _instantiated(gradient: Any) -> jax.Array:
    """Makes zeros of the symbol that stands for them."""
    if isinstance(gradient, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(gradient.shape, jnp.dtype(str(gradient.dtype)))
    return gradient
