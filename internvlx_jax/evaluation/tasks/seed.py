"""SEED-Bench: multiple choice on images, which is the reported score, and on video frames.

`internvl` reads the original files and compares the first character; `vlmevalkit` asks the images
of its TSV file and infers the option.
"""

import dataclasses
from collections.abc import Sequence

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.prompts import plain, vlm_choice
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import (
    Answered,
    Context,
    Result,
    by_group,
    mean,
    vanilla_choice,
)
from internvlx_jax.evaluation.sources import Roots, Source, jsonl, read_json, required, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

QUESTIONS = jsonl("SEED/seed.jsonl", text="text")
KEY = "SEED/SEED-Bench.json"
IMAGE_TYPES = 9  # question types 1 to 9 are images, 10 to 12 video frames


def _read(roots: Roots) -> list[Question]:
    path = roots.data / KEY
    key = {str(required(row, "question_id", path)): row for row in read_json(path, "questions")}

    def finish(question: Question) -> Question:
        if str(question.id) not in key:
            raise ConfigError(f"{question.where}: question_id {question.id} is not in {path}")
        row = key[str(question.id)]
        return dataclasses.replace(
            question,
            answers=(required(row, "answer", path),),
            fields=dict(question.fields)
            | {"question_type_id": required(row, "question_type_id", path)},
        )

    return [finish(question) for question in QUESTIONS.read(roots)]


def first_character(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the first character of the answers to images; video and total are sub-scores."""
    right = [float(not row.error and row.text[:1] in row.question.answers) for row in rows]
    types = [int(row.question.fields["question_type_id"]) for row in rows]
    image = [hit for hit, kind in zip(right, types, strict=True) if kind <= IMAGE_TYPES]
    video = [hit for hit, kind in zip(right, types, strict=True) if kind > IMAGE_TYPES]
    parts = {
        name: 100 * mean(part)
        for name, part in (("image", image), ("video", video), ("total", right))
        if part
    }
    texts = [row.text for row in rows]
    return Result(parts.get("image"), right, texts, parts | {"by_type": by_group(types, right)})


TASKS = (
    Task(
        name="seed",
        title="SEED-Bench, image",
        samples=17990,
        protocols={
            "internvl": internvl(
                Source(lambda roots: [*QUESTIONS.files(roots), roots.data / KEY], _read),
                plain,
                first_character,
                max_new_tokens=100,
            ),
            "vlmevalkit": vlmevalkit(
                tsv("SEEDBench_IMG", needs=("answer", "A", "B")),
                vlm_choice,
                vanilla_choice,
                dataset="SEEDBench_IMG",
                samples=0,
            ),
        },
    ),
)
