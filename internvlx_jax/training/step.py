"""The jitted train and eval steps: arithmetic only (design: training.md 4, 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.loss import shift_left, weighted_loss
from internvlx_jax.models.params import unflatten
from internvlx_jax.training.freeze import join

FlatParams = dict[str, jax.Array]
Batch = Any  # a data.batch.Batch, whose arrays are on the devices here


class TrainState(NamedTuple):
    """Holds what a step changes; parameters are keyed by dotted path.

    Attributes:
        trainable: Parameters that get gradients, float32.
        frozen: The others, in the compute dtype; never differentiated, no moments.
        opt_state: The optimizer's state for `trainable`.
        step: Steps taken, int32 scalar; those without an update count too.
    """

    trainable: FlatParams
    frozen: FlatParams
    opt_state: optax.OptState
    step: jax.Array

    def params(self) -> FlatParams:
        """Returns whole parameters, trained and frozen ones together."""
        return join(self.trainable, self.frozen)


class Metrics(NamedTuple):
    """Holds the metrics of one step: float32 scalars unless stated otherwise.

    Attributes:
        loss: Weighted mean over all micro-batches and devices.
        loss_sums: Sum of weighted losses per dataset, [K].
        weight_sums: Sum of weights per dataset, [K].
        grad_norm: Norm of all gradients, before clipping.
        grad_norms: The same per module.
        param_norm: Norm of the trained parameters before the update.
        update_norm: Norm of what the update adds to them.
        learning_rate: The schedule's rate at this update.
        applied: Bool. False if nothing was supervised, or loss or gradient norm was not finite;
            then nothing changed.
    """

    loss: jax.Array
    loss_sums: jax.Array
    weight_sums: jax.Array
    grad_norm: jax.Array
    grad_norms: dict[str, jax.Array]
    param_norm: jax.Array
    update_norm: jax.Array
    learning_rate: jax.Array
    applied: jax.Array


class EvalSums(NamedTuple):
    """Holds sums over one batch; `exact` counts answers whose tokens are all arg max. float32."""

    loss: jax.Array
    weight: jax.Array
    exact: jax.Array
    answers: jax.Array


def loss_and_grads(
    graphdef: nnx.GraphDef,
    trainable: FlatParams,
    frozen: FlatParams,
    batch: Batch,
    key: jax.Array | None,
    accumulation: int = 1,
    datasets: int = 1,
) -> tuple[tuple[jax.Array, jax.Array], FlatParams]:
    """Computes the loss of a batch and its gradients.

    Numerator and denominator of the loss are summed over all micro-batches before dividing.

    Args:
        graphdef: Module structure of the model.
        trainable: Parameters to differentiate.
        frozen: The other parameters.
        batch: Global batch of B rows.
        key: Randomness of drop path and dropout; None switches both off.
        accumulation: Micro-batches that B divides into.
        datasets: K, the number of datasets.

    Returns:
        (loss, weighted losses per dataset float32[K]), and gradients like `trainable`.
    """
    total_weight = jnp.sum(shift_left(batch.loss_weight, 0.0))
    scale = jnp.where(total_weight > 0, 1 / jnp.where(total_weight > 0, total_weight, 1.0), 0.0)

    def micro_loss(trainable, micro, key):
        model: InternVLX = nnx.merge(graphdef, unflatten(join(trainable, frozen)))
        # The model splits the key of the drop path into 0 and 1.
        dropout_key = None if key is None else jax.random.fold_in(key, 2)
        ce, _ = model.token_losses(
            micro.inputs, micro.labels, drop_path_key=key, dropout_key=dropout_key
        )
        weighted = shift_left(micro.loss_weight, 0.0) * ce
        return jnp.sum(weighted) * scale, sums_by_dataset(weighted, micro.dataset, datasets)

    grad = jax.value_and_grad(micro_loss, has_aux=True)
    if accumulation == 1:
        return grad(trainable, batch, key)

    def body(sums, micro_and_key):
        micro, key = micro_and_key
        return jax.tree.map(jnp.add, sums, grad(trainable, micro, key)), None

    # Micro-batches interleave rows, so that every device keeps its own.
    micros = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch
    )
    keys = None if key is None else jax.random.split(key, accumulation)
    zeros = (jnp.float32(0), jnp.zeros(datasets)), jax.tree.map(jnp.zeros_like, trainable)
    return jax.lax.scan(body, zeros, (micros, keys))[0]


def sums_by_dataset(values: jax.Array, dataset: jax.Array, count: int) -> jax.Array:
    """Sums float32[B, S] by dataset, int32[B, S], to float32[count]."""
    return jnp.sum(jnp.where(dataset == jnp.arange(count)[:, None, None], values, 0.0), axis=(1, 2))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    accumulation: int,
    datasets: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the train step, a pure function for jax.jit.

    Where loss or gradient norm is not finite, or nothing is supervised, parameters, moments and the
    position in the schedule stay as they were, on all devices, and only the step number moves on
    (design: training.md 6). Randomness depends on (seed, step) alone, so that a resumed run repeats
    it.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, loss_sums), grads = loss_and_grads(
            graphdef, state.trainable, state.frozen, batch, key, accumulation, datasets
        )
        weight_sums = sums_by_dataset(shift_left(batch.loss_weight, 0.0), batch.dataset, datasets)
        grad_norm = optax.tree.norm(grads)
        applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (jnp.sum(weight_sums) > 0)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old),
            (trainable, opt_state),
            (state.trainable, state.opt_state),
        )
        metrics = Metrics(
            loss,
            loss_sums,
            weight_sums,
            grad_norm,
            module_norms(grads),
            optax.tree.norm(state.trainable),
            jnp.where(applied, optax.tree.norm(updates), 0.0),
            jnp.float32(schedule(updates_done(state.opt_state))),
            applied,
        )
        return TrainState(trainable, state.frozen, opt_state, state.step + 1), metrics

    return train_step


def module_norms(grads: FlatParams) -> dict[str, jax.Array]:
    """Returns the L2 norm of the gradients per module, the first component of their paths."""
    modules: dict[str, list[jax.Array]] = {}
    for path, grad in grads.items():
        modules.setdefault(path.partition(".")[0], []).append(grad)
    return {module: optax.tree.norm(leaves) for module, leaves in modules.items()}


def updates_done(opt_state: optax.OptState) -> jax.Array:
    """Returns AdamW's count of updates, the position in the schedule, int32 scalar."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[FlatParams, Batch], EvalSums]:
    """Makes the eval step: loss, and teacher-forced exact match.

    An answer matches if all its tokens are arg max, which is what greedy decoding would write.
    """

    def eval_step(params: FlatParams, batch: Batch) -> EvalSums:
        model: InternVLX = nnx.merge(graphdef, unflatten(params))
        ce, hit = model.token_losses(batch.inputs, batch.labels)
        loss, weight = weighted_loss(ce, batch.loss_weight)
        answers, exact = count_answers(shift_left(batch.labels, IGNORED) != IGNORED, hit)
        return EvalSums(loss, weight, exact, answers)

    return eval_step


def count_answers(supervised: jax.Array, hit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Counts answers, which are unbroken runs of supervised slots.

    Args:
        supervised: Whether a slot has a label, bool[B, S].
        hit: Whether its label is arg max, bool[B, S].

    Returns:
        The number of answers, and of those that are hit throughout, float32 scalars.
    """
    before = jnp.pad(supervised[:, :-1], ((0, 0), (1, 0)))
    first, last = supervised & ~before, supervised & ~shift_left(supervised, False)
    missed = jnp.cumsum(supervised & ~hit, axis=1)
    # Misses up to the start of the current run: the count only grows, so its largest value is the
    # newest one.
    missed_before = jax.lax.cummax(jnp.where(first, missed - ~hit, 0), axis=1)
    exact = last & (missed == missed_before)
    return jnp.sum(last, dtype=jnp.float32), jnp.sum(exact, dtype=jnp.float32)
