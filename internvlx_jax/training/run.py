"""What a run is before its first step: devices, model, data and set-up, opened from its config."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.checkpoints.run_folder import saved_metadata
from internvlx_jax.checkpoints.run_writer import CheckpointWriter
from internvlx_jax.checkpoints.staging import prepare_stage, stage_of
from internvlx_jax.checkpoints.transfer import check_same_model, transfer
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.flops import forward_flops
from internvlx_jax.models.params import init_adapters, init_params, without_adapters
from internvlx_jax.models.sharding import make_mesh, placed
from internvlx_jax.training.data import open_loaders, open_tokenizer
from internvlx_jax.training.freeze import describe
from internvlx_jax.training.setup import Setup, prepare
from internvlx_jax.training.step import TrainState

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine-{}.jsonl"  # in the run folder, by process


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that could start: everything is checked, nothing is allocated or written.

    Attributes:
        config: The run's config.
        folder: Its run folder, an absolute path.
        stage: Local folder into which its checkpoints are written first, if any.
        mesh: Its devices.
        source: The checkpoint of `config.init_from`, if any.
        model: The model, from the config or else from `source`.
        tokenizer: The tokenizer, from the config or else from `source`.
        saved: Metadata of the newest checkpoint in the run folder; empty for a new run.
        loader: Training data, at the position of that checkpoint.
        validation: Data of `data.val_meta`, if any.
        steps: Steps of the whole run.
        setup: Shapes, shardings, optimizer and jitted steps.
    """

    config: TrainConfig
    folder: Path
    stage: Path | None
    mesh: Mesh
    source: Any
    model: ModelConfig
    tokenizer: Tokenizer
    saved: Mapping[str, Any]
    loader: Loader
    validation: Loader | None
    steps: int
    setup: Setup

    @property
    def checkpoints(self) -> Path:
        """The folder that the run saves to and goes on from, by checkpoints/STEP."""
        return self.stage or self.folder

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configs, as config.json and each checkpoint store them."""
        return {"train": to_dict(self.config), "model": to_dict(self.model)}


def run_folder(config: TrainConfig) -> Path:
    """Returns the run folder of a config, an absolute path, which orbax insists on.

    Raises:
        ConfigError: Checkpoints cannot be kept there.
    """
    folder = as_path(config.output_dir).absolute()
    stage_of(folder, config.local_checkpoint_dir)
    return folder


def open_run(config: TrainConfig) -> Run:
    """Opens devices, checkpoint, tokenizer and data of a run, and sets up its steps.

    Raises:
        ConfigError: A setting, the data or the tokenizer cannot be used.
        CheckpointError: `init_from` holds another model, or the data have changed since the run's
            newest checkpoint.
    """
    folder = run_folder(config)
    stage = stage_of(folder, config.local_checkpoint_dir)
    if stage is not None:
        prepare_stage(folder, stage)
    mesh = make_mesh(config.mesh, rows=config.micro_batch)

    warn_of_slow_dtype(config, mesh)

    source = None if config.init_from is None else open_checkpoint(config.init_from)
    model = config.model
    if source is not None:
        if model is None:
            model = source.config
        else:
            check_same_model(model, source.config, source.path)
    assert model is not None  # a TrainConfig has a model or a checkpoint

    tokenizer, saved = open_tokenizer(config, source, model), saved_metadata(stage or folder)
    loader, validation = open_loaders(config, model, tokenizer, mesh, saved.get("data"))
    steps = config.steps or loader.plan.total
    assert steps is not None  # the plan is endless only where config.steps is set
    _describe_data(loader, steps, model)
    _describe_left_out(validation, "bad validation samples left out")

    setup = prepare(config, model, mesh, steps, len(loader.entries))
    logger.info(describe(setup.partition))
    return Run(
        config,
        folder,
        stage,
        mesh,
        source,
        model,
        tokenizer,
        saved,
        loader,
        validation,
        steps,
        setup,
    )


def warn_of_slow_dtype(config: TrainConfig, mesh: Mesh) -> None:
    """Says that a CPU may train faster in float32, where a config asks for bfloat16."""
    if config.compute.dtype == "bfloat16" and mesh.devices.flat[0].platform == "cpu":
        logger.warning(
            "compute.dtype is bfloat16, in which a CPU is slow in backward passes; "
            "compute.dtype=float32 may train faster"
        )


def first_state(
    run: Run, checkpoints: CheckpointWriter, *, resuming: bool
) -> tuple[int, TrainState]:
    """Loads the state of the newest checkpoint, or makes the one that a run begins with.

    Returns:
        How many steps are done, and the state on the devices.
    """
    if not resuming:
        return 0, new_state(run, first_params(run))
    first = checkpoints.latest_step or 0
    params, opt_state = checkpoints.load(
        first,
        placed(run.setup.abstract.shapes, run.setup.shardings),
        run.setup.state.opt_state,
        run.loader.state(first),
    )
    logger.info("resuming %s at step %d", run.folder, first)
    return first, new_state(run, params, step=first, opt_state=opt_state)


def first_params(run: Run) -> dict[str, jax.Array]:
    """Returns the parameters that a new run begins with, by dotted path, on the devices.

    They are those of `init_from`, and fresh ones for what that lacks.
    """
    abstract, shardings, seed = run.setup.abstract, run.setup.shardings, run.config.seed
    base = without_adapters(abstract)
    if run.source is None:
        params = init_params(run.model, seed, shardings={**shardings}, paths=base.shapes)
    else:
        transferred = transfer(run.source, run.model, base, run.mesh, seed=seed)
        params = transferred.params
        for line in transferred.report:
            logger.info(line)
    return params | init_adapters(abstract, seed, shardings)


def new_state(
    run: Run, params: Mapping[str, jax.Array], *, step: int = 0, opt_state: Any = None
) -> TrainState:
    """Puts a state together on the devices; it may hold the very arrays of `params`.

    Args:
        run: Whose state.
        params: All parameters by dotted path.
        step: How many steps are done.
        opt_state: The optimizer's; None is what it begins with.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, run.setup.state)
    trainable, frozen = jax.device_put(
        run.setup.partition.split(params), (places.trainable, places.frozen)
    )
    if opt_state is None:
        init = jax.jit(run.setup.optimizer.init, out_shardings=places.opt_state)
        opt_state = init(trainable)
    step_array = jax.device_put(np.int32(step), places.step)
    return TrainState(trainable, frozen, opt_state, step_array)


def _describe_data(loader: Loader, steps: int, model: ModelConfig) -> None:
    plan = loader.plan
    logger.info(
        f"{len(loader.table.length):,} samples, {plan.first_step(1):,} steps in the first epoch, "
        f"{steps:,} steps in the run, {len(plan.buckets)} buckets:"
    )
    for bucket, rows in zip(plan.buckets, plan.rows, strict=True):
        logger.info(_describe_bucket(model, bucket, rows))
    _describe_left_out(loader, "left out")


def _describe_left_out(loader: Loader | None, words: str) -> None:
    if loader is not None and loader.index_faults.reasons:
        logger.info(
            f"{words}, see {QUARANTINE.format(0)} in the run folder: "
            f"{loader.index_faults.summary()}"
        )


def _describe_bucket(model: ModelConfig, bucket: Bucket, rows: int) -> str:
    """Returns its shape, and the work of its forward pass."""
    short = f" ({bucket.short_length} in the short layout)" if model.lvtc else ""
    flops = forward_flops(
        model,
        tiles=rows * bucket.tiles,
        lengths=[bucket.length] * rows,
        short_lengths=[bucket.short_length] * rows,
    )
    return (
        f"  {rows} rows of {bucket.tiles} tiles and {bucket.length} slots{short}: forward "
        f"{flops.total / 1e12:.3g} TFLOP"
    )
