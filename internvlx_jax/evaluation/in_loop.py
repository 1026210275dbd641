"""Scores a model on benchmarks while it trains, from its parameters in memory.

(design: training.md 9)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.evaluation.job import TrainingStep, generation_spec
from internvlx_jax.evaluation.job_config import Decoding
from internvlx_jax.evaluation.selection import TaskSpec, select
from internvlx_jax.evaluation.task_run import TaskRun
from internvlx_jax.inference.batch_generator import BatchGenerator
from internvlx_jax.models.params import AbstractModel, unflatten

ROWS = 16
HELD_OUT = ("loss", "exact")  # eval/NAME of data.val_meta


class InLoop:
    """The tasks of a selection, scored at several steps of a run.

    Questions are read once and executables are compiled once. The files of step n lie in
    FOLDER/step-n/TASK, in the format of eval.py.
    """

    def __init__(
        self,
        selection: EvaluationConfig,
        folder: Path,
        *,
        model: ModelConfig,
        abstract: AbstractModel,
        tokenizer: Tokenizer,
        mesh: Mesh,
    ):
        self.folder, self.abstract, self.mesh = folder, abstract, mesh
        self.processor = Processor.for_model(model, tokenizer, special_text="escape")
        self.tasks = [
            (spec, *generation_spec(spec, selection, model, model.prompt.tiles, None, Decoding()))
            for spec in select(selection)
        ]
        self.generator: BatchGenerator | None = None

    def __call__(self, step: int, params: dict[str, jax.Array]) -> dict[str, float]:
        """Scores the parameters after `step` updates.

        Args:
            step: number of updates so far.
            params: parameters by path.

        Returns:
            {"eval/TASK": score}, without tasks that wait for a judge. It is empty on all processes
            but the first.
        """
        model = nnx.merge(self.abstract.graphdef, unflatten(params))
        if self.generator is None:
            self.generator = BatchGenerator(model, self.processor, self.mesh, batch_size=ROWS)
        else:
            self.generator.use(model)
        scores = {}
        for spec, generation, settings in self.tasks:
            name = _label(spec)
            stepped = dataclasses.replace(settings, parameters=TrainingStep(step=step))
            folder = self.folder / f"step-{step}" / name
            task_run = TaskRun(spec, folder, f"step-{step}", stepped.to_json())
            summary = task_run.run(self.generator, generation, score=jax.process_index() == 0)
            if summary is not None and summary.score is not None:
                scores[f"eval/{name}"] = summary.score
        return scores


def _label(spec: TaskSpec) -> str:
    """Returns NAME of eval/NAME and of the folder: a question file may be called as a score is."""
    name = spec.task.name
    return f"{name}.data" if name in HELD_OUT else name
