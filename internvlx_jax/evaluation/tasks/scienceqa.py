"""ScienceQA, test questions with an image."""

import dataclasses

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import LETTER, choice, vlm_choice
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.sources import jsonl, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit


def _letters(question: Question) -> Question:
    """`choices` are texts, `answer` is the index of the right one."""
    options = {chr(ord("A") + i): text for i, text in enumerate(question.fields["choices"])}
    return dataclasses.replace(
        question, options=options, answers=(chr(ord("A") + int(question.answers[0])),)
    )


TASKS = (
    Task(name="scienceqa", title="ScienceQA, test, image", samples=2017, views={
        "vlmevalkit": vlmevalkit(tsv("ScienceQA_TEST"), vlm_choice, scoring.vanilla_choice, dataset="ScienceQA_TEST"),
        "internvl": internvl(jsonl("scienceqa/scienceqa_test_img.jsonl", finish=_letters), choice(LETTER),
                             scoring.exact_letter, max_new_tokens=100, dataset="ScienceQA_TEST"),
    }),
)  # fmt: skip
