"""RealWorldQA: multiple-choice questions on photos, many from vehicles.

The metric is the accuracy of inferred options, under `vlmevalkit` only.
"""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import vlm_choice
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit

TASKS = (
    Task(
        name="realworldqa",
        title="RealWorldQA",
        samples=765,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv("RealWorldQA", needs=("answer", "A", "B")),
                vlm_choice,
                scoring.vanilla_choice,
                dataset="RealWorldQA",
            ),
        },
    ),
)
