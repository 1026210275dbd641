"""What of a run exists before its arrays: what is trained, where it lives, the jitted steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from internvlx_jax.core.inputs import Inputs, ShortLayout
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.batch import Batch
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.models.params import AbstractModel, abstract_model
from internvlx_jax.models.sharding import (
    activation_shardings,
    batch_sharding,
    optimizer_shardings,
    param_shardings,
    placed,
    replicated,
)
from internvlx_jax.training.freeze import ParameterPartition, as_trained, divide
from internvlx_jax.training.optimizer import make_optimizer, make_schedule
from internvlx_jax.training.step import TrainState, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Setup:
    """Describes what a config means on a mesh; nothing in it is allocated.

    Attributes:
        mesh: The devices.
        model: The model.
        abstract: Its structure; frozen parameters have the compute dtype.
        shardings: Where each parameter lives, by dotted path.
        partition: Which parameters are trained.
        optimizer: Their optimizer.
        schedule: Its learning rate.
        state: TrainState of jax.ShapeDtypeStruct, with shardings.
        remat: Rematerialization policy of both layer stacks.
        train_step: The jitted train step, which is donated its state.
        eval_step: The jitted eval step.
    """

    mesh: Mesh
    model: ModelConfig
    abstract: AbstractModel
    shardings: dict[str, NamedSharding]
    partition: ParameterPartition
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    state: TrainState
    remat: str
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]

    def batch(self, bucket: Bucket, rows: int) -> Batch:
        """Returns the batch of a bucket's step, as jax.ShapeDtypeStruct with shardings."""
        model, t, s, r = self.model, bucket.tiles, bucket.length, bucket.short_length
        size = model.prompt.tiles.tile_size

        def leaf(*shape: int, dtype: Any = jnp.int32) -> Any:
            return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(self.mesh))

        short = None if model.lvtc is None else ShortLayout(leaf(r), leaf(s), leaf(t), leaf(r))
        inputs = Inputs(
            leaf(s), leaf(s), leaf(s), leaf(t, size, size, 3, dtype=jnp.uint8), leaf(s), short
        )
        return Batch(inputs, leaf(s), leaf(s, dtype=jnp.float32), leaf(s))


def prepare(
    config: TrainConfig, model: ModelConfig, mesh: Mesh, steps: int, datasets: int = 1
) -> Setup:
    """Sets up a run on a mesh.

    Args:
        config: The run.
        model: Its model.
        mesh: Its devices.
        steps: Updates of the whole run, which the schedule is stretched over.
        datasets: How many datasets have their losses told apart.

    Raises:
        ConfigError: An expression of the config matches no parameter.
    """
    build = functools.partial(
        abstract_model,
        dtype=config.compute.dtype,
        remat=config.compute.remat,
        attention=config.compute.attention,
        shardings=activation_shardings(mesh),
        lora=config.lora,
    )
    partition = divide(build(model).shapes, config.freeze, config.compute.dtype)
    abstract = as_trained(build, model, partition, config.freeze.vit_mode)
    shardings = param_shardings(abstract.shapes, abstract.axes, mesh)
    schedule = make_schedule(config.optimizer, steps)
    optimizer = make_optimizer(config.optimizer, schedule, partition.trained, abstract.axes, model)

    trained_shardings = {path: shardings[path] for path in partition.trained}
    frozen_shardings = {path: shardings[path] for path in partition.frozen}
    opt_shardings = optimizer_shardings(optimizer, partition.trained, trained_shardings, mesh)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = TrainState(
        placed(partition.trained, trained_shardings),
        placed(partition.frozen, frozen_shardings),
        placed(jax.eval_shape(optimizer.init, partition.trained), opt_shardings),
        step,
    )
    train_step = jax.jit(
        make_train_step(
            abstract.graphdef,
            optimizer,
            schedule,
            config.seed,
            config.compute.accumulation,
            datasets,
        ),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)),
    )
    eval_step = jax.jit(make_eval_step(abstract.graphdef), out_shardings=replicated(mesh))
    return Setup(
        mesh,
        model,
        abstract,
        shardings,
        partition,
        optimizer,
        schedule,
        state,
        config.compute.remat,
        train_step,
        eval_step,
    )
