"""BLINK, validation: visual perception as multiple choice on one to four images.

VLMEvalKit's prompt and metric; its judge has a prompt of its own for this benchmark.
"""

from collections.abc import Sequence

from internvlx_jax.evaluation.prompts import vlm_choice
from internvlx_jax.evaluation.scoring import Answered, Context, Result, hits, inferred_options
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the accuracy of inferred options, in total and per category."""
    letters, notes = inferred_options(rows, context, judge_prompt="option_blink")
    right = [letter in row.question.answers for letter, row in zip(letters, rows, strict=True)]
    return hits(rows, right, letters, group="category", notes=notes)


TASKS = (
    Task(
        name="blink",
        title="BLINK, validation",
        samples=1901,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv("BLINK", needs=("answer", "A", "B", "category")),
                vlm_choice,
                score,
                dataset="BLINK",
            )
        },
    ),
)
