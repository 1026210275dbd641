"""AI2D, test split: multiple-choice questions on diagrams, with and without masked labels.

Under `internvl` the questions of VLMEvalKit's export include options and instruction and answers
are compared as text; under `vlmevalkit` the option is inferred from the TSV file. Without masks the
labels that the options name can be read in the diagram.
"""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.metrics import exact
from internvlx_jax.evaluation.prompts import plain, vlm_choice
from internvlx_jax.evaluation.sources import jsonl, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

TASKS = (
    Task(
        name="ai2d_test",
        title="AI2D, test",
        samples=3088,
        protocols={
            # The questions of this file include options and instruction.
            "internvl": internvl(
                jsonl("ai2diagram/test_vlmevalkit.jsonl"),
                plain,
                scoring.mean_of(exact),
                max_new_tokens=10,
            ),
            "vlmevalkit": vlmevalkit(
                tsv("AI2D_TEST", needs=("answer", "A", "B")),
                vlm_choice,
                scoring.vanilla_choice,
                dataset="AI2D_TEST",
            ),
        },
    ),
    Task(
        name="ai2d_no_mask",
        title="AI2D without masks, test",
        samples=3088,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv("AI2D_TEST_NO_MASK", needs=("answer", "A", "B")),
                vlm_choice,
                scoring.vanilla_choice,
                dataset="AI2D_TEST_NO_MASK",
            ),
        },
    ),
)
