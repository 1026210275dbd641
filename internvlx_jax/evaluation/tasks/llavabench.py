"""LLaVA-Bench (in the wild): open questions, compared with reference answers by a judge."""

import dataclasses

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import ending
from internvlx_jax.evaluation.questions import Question, read_jsonl
from internvlx_jax.evaluation.sources import Roots, Source, image_path, jsonl, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

FOLDER = "llava-bench-in-the-wild"
QUESTIONS = jsonl(f"{FOLDER}/questions.jsonl", text="text")
CONTEXT, REFERENCE = f"{FOLDER}/context.jsonl", f"{FOLDER}/answers_gpt4.jsonl"


def _read(roots: Roots) -> list[Question]:
    captions = {row["image"]: row["caption"] for _, row in read_jsonl(roots.data / CONTEXT)}
    references = {row["question_id"]: row["text"] for _, row in read_jsonl(roots.data / REFERENCE)}

    def finish(question: Question) -> Question:
        name = question.images[0].rpartition("/")[2]
        if name not in captions or question.id not in references:
            raise ConfigError(
                f"{question.where}: no caption of {name} or no reference answer in {roots.data / FOLDER}"
            )
        return dataclasses.replace(
            question,
            images=(image_path(f"{FOLDER}/images/{name}", roots),),
            answers=(references[question.id],),
            fields=dict(question.fields) | {"caption": captions[name]},
        )

    return [finish(question) for question in QUESTIONS.read(roots)]


def _tsv_reference(question: Question) -> Question:
    return dataclasses.replace(question, answers=(question.fields["gpt4_ans"],))


SOURCE = Source(
    lambda roots: [*QUESTIONS.files(roots), roots.data / CONTEXT, roots.data / REFERENCE], _read
)

TASKS = (
    Task(name="llavabench", title="LLaVA-Bench, relative score", samples=60, views={
        "vlmevalkit": vlmevalkit(tsv("LLaVABench", finish=_tsv_reference), ending("\nAnswer this question in detail."),
                                 scoring.llavabench, dataset="LLaVABench"),
        "internvl": internvl(SOURCE, ending(" Please give a detailed answer."), scoring.llavabench, max_new_tokens=1000,
                             dataset="LLaVABench", acceptance=("llavabench_minus1",)),
    }),
)  # fmt: skip
