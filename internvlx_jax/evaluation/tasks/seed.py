"""SEED-Bench: choices on images (the reported score) and on video frames."""

import dataclasses

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import plain, vlm_choice
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.sources import Roots, Source, jsonl, read_json, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

QUESTIONS = jsonl("SEED/seed.jsonl", text="text")
KEY = "SEED/SEED-Bench.json"


def _read(roots: Roots) -> list[Question]:
    key = {str(row["question_id"]): row for row in read_json(roots.data / KEY, "questions")}

    def finish(question: Question) -> Question:
        if str(question.id) not in key:
            raise ConfigError(
                f"{question.where}: question_id {question.id} is not in {roots.data / KEY}"
            )
        row = key[str(question.id)]
        return dataclasses.replace(
            question,
            answers=(row["answer"],),
            fields=dict(question.fields) | {"question_type_id": row["question_type_id"]},
        )

    return [finish(question) for question in QUESTIONS.read(roots)]


TASKS = (
    Task(name="seed", title="SEED-Bench, image", samples=17990, views={
        "internvl": internvl(Source(lambda roots: [*QUESTIONS.files(roots), roots.data / KEY], _read), plain,
                             scoring.seed, max_new_tokens=100, dataset="SEEDBench"),
        "vlmevalkit": vlmevalkit(tsv("SEEDBench_IMG"), vlm_choice, scoring.vanilla_choice, dataset="SEEDBench_IMG"),
    }),
)  # fmt: skip
