"""HallusionBench: yes-or-no questions on images that mislead, under `vlmevalkit` only.

The score is the mean of the accuracy over questions (aAcc), over figures with every question right
(fAcc), and over questions right on every figure (qAcc).
"""

from collections.abc import Hashable, Sequence

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import (
    Answered,
    Context,
    Result,
    inferred_yes_or_no,
    mean,
    yes_no_hits,
)
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the mean of aAcc (rows), fAcc (figures) and qAcc (questions).

    Fields 3, 4 and 5 of an index (from 0) are set, figure and question.
    """
    labels, notes = inferred_yes_or_no(rows, context)
    right = yes_no_hits(rows, labels, context)
    places = [
        (row.question.fields["l2-category"], *str(row.question.id).split("_")[3:6]) for row in rows
    ]
    parts = {
        "aAcc": 100 * mean(right),
        "fAcc": all_right([(kind, group, figure) for kind, group, figure, _ in places], right),
        "qAcc": all_right([(kind, group, question) for kind, group, _, question in places], right),
    }
    return Result(mean(list(parts.values())), [float(hit) for hit in right], labels, parts, notes)


def all_right(groups: Sequence[Hashable], right: Sequence[bool]) -> float:
    """Returns the share of groups, in points, in which every row is right."""
    together: dict[Hashable, bool] = {}
    for group, hit in zip(groups, right, strict=True):
        together[group] = together.get(group, True) and hit
    return 100 * sum(together.values()) / len(together)


def _with_place(question: Question) -> Question:
    """Returns the question itself.

    Raises:
        ConfigError: its index does not tell set, figure and question.
    """
    if len(str(question.id).split("_")) < 6:
        raise ConfigError(
            f"{question.where}: index {question.id} has no set, figure and question in it, as in "
            "image_VD_illusion_0_1_2; download the published file again"
        )
    return question


TASKS = (
    Task(
        name="hallusionbench",
        title="HallusionBench, mean of aAcc, fAcc, qAcc",
        samples=951,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv(
                    "HallusionBench",
                    needs=("answer", "category", "l2-category"),
                    finish=_with_place,
                ),
                ending(f" Please answer yes or no. {BASE}"),
                score,
                dataset="HallusionBench",
            ),
        },
    ),
)
