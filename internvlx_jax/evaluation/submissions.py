"""Files that the servers of benchmarks accept (design: evaluation.md 8)."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.files import write_json
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.tables import write_table

# (folder, questions, predictions) -> file written
Submission = Callable[[Path, Sequence[Question], Sequence[str]], Path]

MMBENCH_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
MMBENCH_POSITION = 6


def answers_by(key: str) -> Submission:
    """[{KEY: id, "answer": text}]; the key `image` stands for the name of the image file."""

    def write(folder: Path, questions: Sequence[Question], predictions: Sequence[str]) -> Path:
        path = folder / "submission.json"
        write_json(
            path,
            [
                {
                    key: Path(str(question.images[0])).name if key == "image" else question.id,
                    "answer": prediction,
                }
                for question, prediction in zip(questions, predictions, strict=True)
            ],
        )
        return path

    return write


def mmvet(folder: Path, questions: Sequence[Question], predictions: Sequence[str]) -> Path:
    """{"v1_<id>": text}."""
    path = folder / "submission.json"
    write_json(
        path,
        {
            f"v1_{str(question.id).removeprefix('v1_')}": prediction
            for question, prediction in zip(questions, predictions, strict=True)
        },
    )
    return path


def mmbench(folder: Path, questions: Sequence[Question], predictions: Sequence[str]) -> Path:
    rows = []
    for question, prediction in zip(questions, predictions, strict=True):
        cells = [
            item for item in _numbered(question.fields).items() if item[0] not in MMBENCH_DROPPED
        ]
        cells.insert(MMBENCH_POSITION, ("prediction", prediction))
        rows.append(dict(cells))
    return write_table(folder / "submission", rows)


def vlmevalkit_rows(questions: Sequence[Question], texts: Sequence[str]) -> list[dict[str, Any]]:
    """The columns that VLMEvalKit scores: all of the TSV but the image, or their equivalents, and the model's text."""
    letters = [
        letter for letter in string.ascii_uppercase if any(letter in q.options for q in questions)
    ]
    rows = []
    for i, (question, text) in enumerate(zip(questions, texts, strict=True)):
        columns = _numbered(question.fields)
        if "index" not in columns:
            answer = (
                question.answers[0] if len(question.answers) == 1 else str(list(question.answers))
            )
            columns = {
                "index": i,
                "question": question.text,
                "hint": question.hint,
                **{letter: question.options.get(letter, "") for letter in letters},
                "answer": answer,
            } | columns
        rows.append(
            {
                name: str(value) if isinstance(value, list) else value
                for name, value in columns.items()
                if name != "image" and isinstance(value, (str, int, float, list))
            }
            | {"prediction": text}
        )
    names = list(dict.fromkeys(name for row in rows for name in row if name != "prediction"))
    return [{name: row.get(name, "") for name in (*names, "prediction")} for row in rows]


def _numbered(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns with a numeric index as a number, which VLMEvalKit computes with."""
    index = columns.get("index", "")
    return dict(columns) | {"index": int(index)} if str(index).isdecimal() else columns
