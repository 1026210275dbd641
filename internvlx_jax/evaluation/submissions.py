"""Files that servers of benchmarks and VLMEvalKit accept (design: evaluation.md 8)."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.files import write_json
from internvlx_jax.evaluation.questions import Question

# Maps (folder, questions, predictions) to the file that it writes into the folder.
Submission = Callable[[Path, Sequence[Question], Sequence[str]], Path]


def answers_by(key: str) -> Submission:
    """Returns a writer of submission.json: [{KEY: id, "answer": text}].

    The key "image" stands for the name of the image file.
    """

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


def vlmevalkit_rows(
    questions: Sequence[Question],
    texts: Sequence[str],
    table: Callable[[Question], Mapping[str, Any]] = lambda question: {},
) -> list[dict[str, Any]]:
    """Returns the rows that VLMEvalKit scores.

    They have all columns of the TSV file but the image, or their equivalents, and the model's text
    as `prediction`.

    Args:
        questions: the questions.
        texts: what the model wrote, in the same order.
        table: further columns of a question, and those to be replaced.
    """
    letters = [
        letter for letter in string.ascii_uppercase if any(letter in q.options for q in questions)
    ]
    rows = []
    for i, (question, text) in enumerate(zip(questions, texts, strict=True)):
        columns = numeric_index(question.fields)
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
        columns = {**columns, **table(question)}
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


def numeric_index(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns with a numeric index as a number, which VLMEvalKit computes with."""
    index = columns.get("index", "")
    numeric = {"index": int(index)} if str(index).isdecimal() else {}
    return dict(columns) | numeric
