"""SEED-Bench-2-Plus: multiple choice on charts, maps and web pages with much text.

VLMEvalKit's prompt and metric: the option is inferred, and the score is the accuracy.
"""

from internvlx_jax.evaluation.prompts import vlm_choice
from internvlx_jax.evaluation.scoring import vanilla_choice
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit

TASKS = (
    Task(
        name="seed2plus",
        title="SEED-Bench-2-Plus",
        samples=2277,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv("SEEDBench2_Plus", needs=("answer", "A", "B", "category")),
                vlm_choice,
                vanilla_choice,
                dataset="SEEDBench2_Plus",
            )
        },
    ),
)
