"""MMStar: multiple choice that cannot be answered without the image, in eighteen categories.

VLMEvalKit's prompt and metric: the option is inferred, and the score is the accuracy.
"""

from internvlx_jax.evaluation.prompts import vlm_choice
from internvlx_jax.evaluation.scoring import vanilla_choice
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit

TASKS = (
    Task(
        name="mmstar",
        title="MMStar",
        samples=1500,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv("MMStar", needs=("answer", "A", "B", "category")),
                vlm_choice,
                vanilla_choice,
                dataset="MMStar",
            )
        },
    ),
)
