"""Scores during a run: loss on held-out data, and benchmarks (design: training.md 9)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.params import AbstractModel
from internvlx_jax.training.data import to_devices
from internvlx_jax.training.run import QUARANTINE, Run
from internvlx_jax.training.step import FlatParams

logger = logging.getLogger(__name__)

QUARANTINE_FILES = QUARANTINE.format("*") + " in the run folder"


class Benchmarks(Protocol):
    """Scores parameters; all processes call it together, and the first one gets the scores."""

    def __call__(self, step: int, params: FlatParams) -> dict[str, float]: ...


class BenchmarksFactory(Protocol):
    """Prepares the benchmarks of a run, once; `evaluation.in_loop.InLoop` is one.

    Training stands below evaluation, so its caller brings the benchmarks.
    """

    def __call__(
        self,
        selection: EvaluationConfig,
        folder: Path,
        *,
        model: ModelConfig,
        abstract: AbstractModel,
        tokenizer: Tokenizer,
        mesh: Mesh,
    ) -> Benchmarks: ...


def check_benchmarks(config: TrainConfig, benchmarks: BenchmarksFactory | None) -> None:
    """Raises ConfigError when a config asks for benchmarks that nobody brings."""
    if config.evaluation is not None and benchmarks is None:
        raise ConfigError(
            "evaluation is set, but train() was given no benchmarks; call "
            "train(config, benchmarks=internvlx_jax.evaluation.in_loop.InLoop), or set "
            "evaluation=none"
        )


class Validation:
    """Everything that a run is scored by: its held-out data and its benchmarks, if it has any."""

    def __init__(self, run: Run, benchmarks: BenchmarksFactory | None):
        self._run = run
        self._told = (0, 0)  # kinds of faults and bad samples that the log knows of
        self._benchmarks: Benchmarks | None = None
        if run.config.evaluation is not None and benchmarks is not None:
            self._benchmarks = benchmarks(
                run.config.evaluation,
                run.folder / "evaluation",
                model=run.model,
                abstract=run.setup.abstract,
                tokenizer=run.tokenizer,
                mesh=run.mesh,
            )

    def is_due(self, step: int, last: int) -> bool:
        """Returns whether the run is scored after `step`; `last` is the last step of this call."""
        if self._run.validation is None and self._benchmarks is None:
            return False
        return step % self._run.config.eval_every == 0 or step == last

    def __call__(self, step: int, params: FlatParams) -> dict[str, float]:
        """Returns "eval/loss", "eval/exact" and "eval/TASK" after `step` steps."""
        scores = self._held_out(params)
        if self._benchmarks is not None:
            scores |= self._benchmarks(step, params)
        if not scores:
            return scores
        listed = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        logger.info("step %d/%d  %s", step, self._run.steps, listed)
        return scores

    def _held_out(self, params: FlatParams) -> dict[str, float]:
        """Returns the loss per supervised token, and the share of answers that are all arg max."""
        loader, setup = self._run.validation, self._run.setup
        if loader is None:
            return {}
        assert loader.plan.total is not None  # one pass, see open_loaders
        sums = [
            jax.device_get(setup.eval_step(params, to_devices(loaded, setup.mesh)))
            for loaded in loader.steps(0, loader.plan.total)
        ]
        loss, weight, exact, answers = np.sum(sums, axis=0).tolist()
        self._tell_bad_samples(loader)
        if not weight:
            logger.warning(f"validation: none of its samples could be read, see {QUARANTINE_FILES}")
            return {}
        scores = {"eval/loss": loss / weight}
        return scores | ({"eval/exact": exact / answers} if answers else {})

    def _tell_bad_samples(self, loader: Loader) -> None:
        """Says once what is wrong with held-out samples on this process, and again if it grows."""
        found = loader.faults.summary()
        kinds = len(loader.faults.reasons)
        bad = sum(map(len, loader.faults.bad.values()))
        if found and (kinds, bad) != self._told:
            self._told = (kinds, bad)
            logger.warning(f"validation: bad samples ({found}), see {QUARANTINE_FILES}")
