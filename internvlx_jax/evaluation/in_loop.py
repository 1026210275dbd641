"""Benchmarks while a model trains, on its parameters in memory (spec: training.md 9)."""

from __future__ import annotations

from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.evaluation.job import TaskRun
from internvlx_jax.evaluation.selection import Decoding, generation_spec, select
from internvlx_jax.inference.batch_generator import BatchGenerator
from internvlx_jax.models.params import AbstractModel, unflatten

ROWS = 16


class InLoop:
    """The tasks of a selection, asked again and again; questions are read and executables compiled once.

    Files of step n lie in FOLDER/step-n/TASK, as eval.py writes them.
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
        self.units = [
            (unit, *generation_spec(unit, selection, model, model.prompt.tiles, None, Decoding()))
            for unit in select(selection)
        ]
        self.answerer: BatchGenerator | None = None

    def __call__(self, step: int, params: dict[str, jax.Array]) -> dict[str, float]:
        """{"eval/TASK": score} after `step` updates, without tasks that wait for a judge; empty on other processes than
        the first."""
        model = nnx.merge(self.abstract.graphdef, unflatten(params))
        if self.answerer is None:
            self.answerer = BatchGenerator(model, self.processor, self.mesh, batch_size=ROWS)
        else:
            self.answerer.use(model)
        scores = {}
        for unit, asking, settings in self.units:
            folder = self.folder / f"step-{step}" / unit.task.name
            desk = TaskRun(unit, folder, f"step-{step}", settings | {"step": step}, asking)
            desk.answer(self.answerer)
            if jax.process_index() == 0:
                score = desk.finish()["score"]
                if score is not None:
                    scores[f"eval/{unit.task.name}"] = score
        return scores
