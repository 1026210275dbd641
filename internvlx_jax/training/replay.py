"""Runs one step of a run again, without its update (design: training.md 6).

Shows which module, and which samples, make a step bad: `internvlx replay RUN_DIR --step N`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from internvlx_jax.checkpoints.run_folder import RunFolder, saved_metadata
from internvlx_jax.checkpoints.run_format import finished_steps
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import read_run_settings
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import from_dict, override
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.loss import shift_left
from internvlx_jax.models.params import unflatten
from internvlx_jax.models.sharding import make_mesh
from internvlx_jax.training.bad_steps import number
from internvlx_jax.training.data import open_loaders, to_devices
from internvlx_jax.training.freeze import join
from internvlx_jax.training.setup import Setup, prepare
from internvlx_jax.training.step import loss_and_grads, module_norms


def replay(run: str | Path, step: int, settings: list[str]) -> dict[str, Any]:
    """Computes a step's loss, gradient norms per module, and the loss of every row.

    Samples, drop path and arithmetic are those of the step. The parameters are those of the newest
    checkpoint before it, or else of the oldest one that is kept; the result names its step.

    Args:
        run: Run folder.
        step: The step from 1, as it is logged.
        settings: `FIELD=VALUE` that replace the run's settings, e.g. mesh.data=1.

    Raises:
        ConfigError: The run has no such step, or no checkpoint.
    """
    run = as_path(run)
    saved = read_run_settings(run)
    if not saved:
        raise FileNotFoundError(f"{run / 'config.json'} does not exist; give the folder of a run")
    try:
        config = from_dict(TrainConfig, saved["train"])
        model = from_dict(ModelConfig, saved["model"])
    except ConfigError as error:
        raise ConfigError(f"{run / 'config.json'}: {error}") from error
    config = override(config, settings)
    checkpoints = finished_steps(run)
    if not checkpoints:
        raise ConfigError(f"{run / 'checkpoints'} holds no finished checkpoint")
    before = [each for each in checkpoints if each < step]
    folder = RunFolder(run / "checkpoints" / str(before[-1] if before else checkpoints[0]))

    mesh = make_mesh(config.mesh, rows=config.micro_batch)
    loader, _ = open_loaders(
        config, model, Tokenizer.load(run / "tokenizer"), mesh, saved_metadata(run)["data"]
    )
    steps = config.steps or loader.plan.total
    assert steps is not None
    if not 1 <= step <= steps:
        raise ConfigError(f"--step {step}: the run has the steps 1 to {steps}")
    setup = prepare(config, model, mesh, steps)
    loaded = loader.load(loader.plan.step(step - 1))
    batch = to_devices(loaded, mesh)
    trained, frozen = setup.partition.split(folder.load(setup.abstract, setup.shardings))
    loss, norm, norms, rows, weights = jax.jit(_measure(setup, config, step))(
        trained, frozen, batch
    )
    rows, weights = np.asarray(rows), np.asarray(weights)
    return {
        "step": step,
        "parameters_of_step": folder.step,
        "bucket": {"tiles": loaded.bucket.tiles, "length": loaded.bucket.length},
        "loss": number(loss),
        "grad_norm": {name: number(each) for name, each in {"all": norm, **norms}.items()},
        "rows": [
            {"loss": number(row / weight) if weight else None, "samples": samples}
            for row, weight, samples in zip(
                rows, weights, loader.planned_ids(step - 1), strict=True
            )
        ],
    }


def _measure(setup: Setup, config: TrainConfig, step: int) -> Callable[..., Any]:
    """Makes the computation: (loss, norm, norms per module, losses per row, weights per row)."""

    def measure(trained, frozen, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), step - 1)
        graphdef = setup.abstract.graphdef
        (loss, _), grads = loss_and_grads(
            graphdef, trained, frozen, batch, key, config.compute.accumulation
        )
        model = nnx.merge(graphdef, unflatten(join(trained, frozen)))
        # Rows are judged without drop path, whose luck would hide what they are like.
        ce, _ = model.token_losses(batch.inputs, batch.labels)
        weight = shift_left(batch.loss_weight, 0.0)
        return (
            loss,
            optax.tree.norm(grads),
            module_norms(grads),
            (ce * weight).sum(axis=1),
            weight.sum(axis=1),
        )

    return measure


if __name__ == "__main__":
    from internvlx_jax.cli.replay import main

    sys.exit(main())
