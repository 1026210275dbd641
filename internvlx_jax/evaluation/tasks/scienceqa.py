"""ScienceQA, test split, questions with an image: multiple choice, scored by accuracy.

`vlmevalkit`, the default, infers the option; `internvl` reads a leading letter.
"""

import dataclasses
from collections.abc import Sequence

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.metrics.options import first_option, first_option_or_parentheses
from internvlx_jax.evaluation.prompts import LETTER, choice, vlm_choice
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import (
    Answered,
    Context,
    Result,
    hits,
    vanilla_choice,
)
from internvlx_jax.evaluation.sources import jsonl, required, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit


def _letters(question: Question) -> Question:
    """Turns the texts of `choices` into options and the index `answer` into its letter."""
    choices = required(question.fields, "choices", question.where)
    options = {chr(ord("A") + i): text for i, text in enumerate(choices)}
    try:
        answer = [*options][int(question.answers[0])]
    except (IndexError, ValueError):
        raise ConfigError(
            f'{question.where}: "answer" is not the number of a choice, counted from 0; download '
            "the file again"
        ) from None
    return dataclasses.replace(question, options=options, answers=(answer,))


def exact_letter(rows: Sequence[Answered], context: Context) -> Result:
    """Scores InternVL's reading of the letter; `scienceqa_parentheses` is about "(B)"."""
    read = (
        first_option_or_parentheses if "scienceqa_parentheses" in context.compat else first_option
    )
    letters = [read(row.text, row.question.options) for row in rows]
    right = [letter in row.question.answers for letter, row in zip(letters, rows, strict=True)]
    return hits(rows, right, letters)


TASKS = (
    Task(
        name="scienceqa",
        title="ScienceQA, test, image",
        samples=2017,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv("ScienceQA_TEST", needs=("answer", "A", "B")),
                vlm_choice,
                vanilla_choice,
                dataset="ScienceQA_TEST",
            ),
            "internvl": internvl(
                jsonl("scienceqa/scienceqa_test_img.jsonl", finish=_letters),
                choice(LETTER),
                exact_letter,
                max_new_tokens=100,
                compat=("scienceqa_parentheses",),
                release=(),
            ),
        },
    ),
)
