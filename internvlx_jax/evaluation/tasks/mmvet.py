"""MM-Vet: open questions, graded by a judge."""

import dataclasses

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import scoring, submissions
from internvlx_jax.evaluation.prompts import ending, plain
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.sources import Roots, Source, image_path, jsonl, read_json, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

QUESTIONS = jsonl("mm-vet/llava-mm-vet.jsonl", text="text")
KEY = "mm-vet/mm-vet.json"


def _read(roots: Roots) -> list[Question]:
    key = read_json(roots.data / KEY)

    def finish(question: Question) -> Question:
        try:
            entry = key[f"v1_{str(question.id).removeprefix('v1_')}"]
        except KeyError:
            raise ConfigError(
                f"{question.where}: question_id {question.id} is not in {roots.data / KEY}"
            ) from None
        # The file names images without their folder.
        images = tuple(
            image_path(f"mm-vet/images/{path.rpartition('/')[2]}", roots)
            for path in question.images
        )
        return dataclasses.replace(
            question,
            images=images,
            answers=(entry["answer"],),
            fields=dict(question.fields) | {"capability": ",".join(entry["capability"])},
        )

    return [finish(question) for question in QUESTIONS.read(roots)]


SOURCE = Source(lambda roots: [*QUESTIONS.files(roots), roots.data / KEY], _read)

TASKS = (
    Task(name="mmvet", title="MM-Vet", samples=218, views={
        "internvl": internvl(SOURCE, ending(" "), scoring.mmvet, max_new_tokens=1000, dataset="MMVet",
                             submission=submissions.mmvet),
        "vlmevalkit": vlmevalkit(tsv("MMVet"), plain, scoring.mmvet, dataset="MMVet", submission=submissions.mmvet),
    }),
)  # fmt: skip
