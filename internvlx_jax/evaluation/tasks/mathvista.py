"""MathVista, testmini: mathematics on images; a judge extracts the answer where rules do not."""

import dataclasses
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import parquet, scoring
from internvlx_jax.evaluation.metrics.mathvista import Key
from internvlx_jax.evaluation.prompts import plain
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.sources import Roots, Source, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit
from internvlx_jax.evaluation.tsv import list_cell


def _tsv_key(question: Question) -> Question:
    row = question.fields
    choices = list_cell(row.get("choices", ""), question.where) if row.get("choices") else ()
    key = Key(
        row["question_type"],
        row["answer_type"],
        row["answer"],
        choices,
        row.get("answer_option", ""),
    )
    return dataclasses.replace(question, fields=dict(row) | {"key": key})


def _files(roots: Roots) -> list[Path]:
    found = sorted((roots.data / "MathVista").glob("**/testmini*.parquet"))
    return found or [roots.data / "MathVista" / "data" / "testmini-00000-of-00001.parquet"]


def _read(roots: Roots) -> list[Question]:
    questions = []
    for file in _files(roots):
        for where, row in parquet.rows(file):
            try:
                choices = tuple(row["choices"] or ())
                letter = (
                    "ABCDEFGH"[choices.index(row["answer"])] if row["answer"] in choices else ""
                )
                key = Key(
                    row["question_type"],
                    row["answer_type"],
                    row["answer"],
                    choices,
                    letter,
                    int(row["precision"] or 0),
                )
                questions.append(
                    Question(
                        where,
                        row["pid"],
                        (parquet.image(where, "image", row["decoded_image"]),),
                        row["query"],
                        (row["answer"],),
                        fields={"key": key},
                    )
                )
            except KeyError as error:
                raise ConfigError(
                    f"{where}: no column {error}; this is not MathVista's testmini"
                ) from None
    return questions


TASKS = (
    Task(name="mathvista", title="MathVista, testmini", samples=1000, views={
        "vlmevalkit": vlmevalkit(tsv("MathVista_MINI", finish=_tsv_key), plain, scoring.mathvista_vlm,
                                 dataset="MathVista_MINI", compat=("mathvista_text_bug",)),
        "internvl": internvl(Source(_files, _read), plain, scoring.mathvista_internvl, max_new_tokens=1000,
                             dataset="MathVista_MINI"),
    }),
)  # fmt: skip
