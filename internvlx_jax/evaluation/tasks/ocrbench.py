"""OCRBench: an answer is right if it contains one of the references; the score is of 1000.

VLMEvalKit's prompt and metric. Texts are compared in lower case without line breaks, mathematical
expressions without any spaces but in their case.
"""

import ast
import dataclasses
from collections.abc import Sequence

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context, Result, hits, mean
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit

EXPRESSIONS = "Handwritten Mathematical Expression Recognition"
OWN_LINES = (
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    EXPRESSIONS,
)
RECOGNITION = "Text Recognition"  # stands for the six other categories
FULL = 1000  # questions of the published set, and its best score


def contains(prediction: str, answers: Sequence[str], *, expression: bool) -> bool:
    """Whether an answer stands inside the prediction.

    Args:
        prediction: what the model wrote.
        answers: accepted answers.
        expression: compare without spaces instead of in lower case.
    """

    def clean(text: str) -> str:
        text = text if expression else text.lower()
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if expression else text

    return any(clean(answer) in clean(prediction) for answer in answers)


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the share of right answers as points of 1000, and in the five published groups."""
    right = [
        contains(row.text, row.question.answers, expression=_category(row) == EXPRESSIONS)
        for row in rows
    ]
    result = hits(rows, right)
    groups: dict[str, list[float]] = {}
    for row, hit in zip(rows, result.scores, strict=True):
        name = _category(row) if _category(row) in OWN_LINES else RECOGNITION
        groups.setdefault(name, []).append(hit or 0.0)
    parts = {name: sum(groups[name]) for name in (RECOGNITION, *OWN_LINES) if name in groups}
    known = [hit or 0.0 for hit in result.scores]
    return dataclasses.replace(result, score=FULL * mean(known), parts=parts)


def _category(row: Answered) -> str:
    return row.question.fields["category"]


def _listed(question: Question) -> Question:
    """Reads the cell of the answers, a Python list of texts."""
    cell = question.fields.get("answer", "")
    try:
        answers = ast.literal_eval(cell)
        assert isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
    except (ValueError, SyntaxError, AssertionError):
        raise ConfigError(
            f"{question.where}: answer {cell[:60]!r} is no Python list of texts; correct the cell"
        ) from None
    return dataclasses.replace(question, answers=tuple(answers))


TASKS = (
    Task(
        name="ocrbench",
        title="OCRBench",
        samples=FULL,
        baseline_tiles=24,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv("OCRBench", needs=("answer", "category"), finish=_listed),
                ending(f"\n{BASE}"),
                score,
                dataset="OCRBench",
            )
        },
    ),
)
