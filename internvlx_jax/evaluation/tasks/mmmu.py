"""MMMU, validation: college questions with several images, in thirty subjects."""

import ast
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import parquet, scoring
from internvlx_jax.evaluation.image_policies import FIRST_ONLY, MMMU_GRID
from internvlx_jax.evaluation.metrics.mmmu import DOMAINS
from internvlx_jax.evaluation.prompts import BASE, LETTER, option_lines, vlm_choice
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.sources import Roots, Source, read_json, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

SUBJECTS = [subject for domain in DOMAINS.values() for subject in domain]
IMAGES = [f"image_{i}" for i in range(1, 8)]
KEY = "MMMU/answer_dict_val.json"  # {id: {question_type, ground_truth}}; without it the answers of the files


def _files(roots: Roots) -> list[Path]:
    files = []
    for subject in sorted(SUBJECTS):
        found = sorted((roots.data / "MMMU" / subject).glob("validation*.parquet"))
        files += found or [roots.data / "MMMU" / subject / "validation-00000-of-00001.parquet"]
    return files


def _read(roots: Roots) -> list[Question]:
    key = read_json(roots.data / KEY) if (roots.data / KEY).is_file() else {}
    questions = []
    for file in _files(roots):
        for where, row in parquet.rows(file):
            try:
                texts = ast.literal_eval(row["options"])
                entry = key.get(
                    row["id"],
                    {"question_type": row["question_type"], "ground_truth": row["answer"]},
                )
                images = tuple(
                    parquet.image(where, name, row[name]) for name in IMAGES if row.get(name)
                )
            except (KeyError, ValueError, SyntaxError) as error:
                raise ConfigError(
                    f"{where}: not a question of MMMU ({type(error).__name__}: {error})"
                ) from None
            truth = entry["ground_truth"]
            questions.append(
                Question(
                    where,
                    row["id"],
                    images,
                    row["question"],
                    tuple(map(str, truth if isinstance(truth, list) else [truth])),
                    options={chr(ord("A") + i): str(text) for i, text in enumerate(texts)},
                    fields={"question_type": entry["question_type"], "subject": file.parent.name},
                )
            )
    return questions


def prompt(question: Question) -> str:
    if question.fields["question_type"] == "multiple-choice":
        return f"{question.text}{option_lines(question.options)}\n{LETTER}".strip()
    return f"{question.text}\n{BASE}".strip()


TASKS = (
    Task(name="mmmu_val", title="MMMU, validation", samples=900, views={
        "internvl": internvl(Source(_files, _read), prompt, scoring.mmmu_score, max_new_tokens=10, dataset="MMMU_VAL",
                             images=lambda dynamic: MMMU_GRID if dynamic else FIRST_ONLY),
        "vlmevalkit": vlmevalkit(tsv("MMMU_DEV_VAL", keep=lambda row: row.get("split") == "validation"), vlm_choice,
                                 scoring.mmmu_score_vlm, dataset="MMMU_DEV_VAL"),
    }),
)  # fmt: skip
