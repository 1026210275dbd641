"""ChartQA, test split: questions on charts, written by people and by a program.

The metric is relaxed accuracy (within 5 %), and the mean of both halves is reported as well. The
protocols differ in white space of the prompt; InternVL's script takes 5 % of the prediction.
"""

from collections.abc import Sequence
from functools import partial

from internvlx_jax.evaluation.metrics import relaxed
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.scoring import Answered, Context, Result, mean_of
from internvlx_jax.evaluation.sources import jsonl, listed_answers, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit


def relaxed_accuracy(rows: Sequence[Answered], context: Context) -> Result:
    """Scores relaxed accuracy; `relaxed_swap` takes 5 % of the prediction."""
    swap = "relaxed_swap" in context.compat
    return mean_of(partial(relaxed, swap=swap))(rows, context)


def _task(name: str, title: str, split: str) -> Task:
    return Task(
        name=name,
        title=title,
        samples=1250,
        baseline_tiles=12,
        protocols={
            "internvl": internvl(
                jsonl(f"chartqa/{split}.jsonl"),
                ending(f" {BASE}"),
                relaxed_accuracy,
                max_new_tokens=100,
                dataset="ChartQA_TEST",
                compat=("relaxed_swap",),
                table=lambda question: {"split": split},
                joined=True,
            ),
            "vlmevalkit": vlmevalkit(
                tsv(
                    "ChartQA_TEST",
                    needs=("answer", "split"),
                    keep=lambda row: row.get("split") == split,
                    finish=listed_answers,
                ),
                ending(f"\n{BASE}"),
                relaxed_accuracy,
                dataset="ChartQA_TEST",
                joined=True,
            ),
        },
    )


TASKS = (
    _task("chartqa_human", "ChartQA, test, human", "test_human"),
    _task("chartqa_aug", "ChartQA, test, augmented", "test_augmented"),
)
