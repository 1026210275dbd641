"""ChartQAPro: harder questions on charts, some with several answers or as a conversation.

VLMEvalKit's prompts, one per type of question, and its metric: the mean over the items of an answer
of exact matches (years), matches within 5 % (numbers) and ANLS (texts).
"""

import ast
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.metrics import levenshtein
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context, Result, by_group, hits
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit

PROMPTS: Mapping[str, str] = json.loads(
    Path(__file__).with_name("chartqapro_prompts.json").read_text(encoding="utf-8")
)
CONVERSATION = "Conversational"
TOLERANCE = 0.05
COLUMNS = ("answer", "question_type", "year", "paragraph")

_LIST = re.compile(r"^\[(.*)\]$")
_BARE_ITEM = re.compile(r"(?<!['\w])(\w[^,]*?)(?!['\w])")
_FIELD = re.compile(r"\{(\w+)\}")


def prompt(question: Question) -> str:
    """Returns the paragraph of the chart and the instruction with the question in it."""
    texts, answers = question.fields["texts"], question.fields["turn_answers"]
    kind = question.fields["question_type"]
    asked = texts[-1] if kind == CONVERSATION else texts[0]
    earlier = [text for turn in zip(texts[:-1], answers[:-1]) for text in turn]
    values = {"question": asked, "conversation": str(earlier)}
    filled = _FIELD.sub(lambda field: values.get(field[1], field[0]), PROMPTS[kind])
    return f"{question.fields.get('paragraph', '')}\n{filled}"


def correctness(target: str, prediction: str, years: Sequence[str]) -> float:
    """Returns the mean correctness of the items of an answer.

    Items without a counterpart count as wrong.

    Args:
        target: the reference, a text or a list of texts.
        prediction: what the model wrote.
        years: "YES" for items that are years, which must be exact; fewer flags are repeated.
    """
    targets = _items(str(_quoted(target))) or [target]
    predictions = _items(prediction) or [prediction]
    flags = list(years) * (len(targets) if len(years) < len(targets) else 1)
    scores = [
        float(expected.strip().lower() == given.strip().lower())
        if flag.upper() == "YES"
        else _relaxed(expected, given)
        for expected, given, flag in zip(targets, predictions, flags, strict=False)
    ]
    return sum(scores) / max(len(targets), len(predictions))


def _quoted(text: str) -> Any:
    """Reads a list whose items may lack quotation marks; any other text stays."""
    match = _LIST.match(text.strip())
    if not match:
        return text
    try:
        return ast.literal_eval("[" + _BARE_ITEM.sub(r"'\1'", match[1]) + "]")
    except (SyntaxError, ValueError):
        return text


def _items(text: str) -> list[str] | None:
    """Returns the items of a text that is a Python list, else None."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError, TypeError):
        return None
    return [str(item).strip(" '") for item in value] if isinstance(value, list) else None


def _relaxed(target: str, prediction: str) -> float:
    """Returns 1 for a number within 5 %, else 0; for texts the similarity of ANLS."""
    target, prediction = target.strip().strip("%").strip(), prediction.strip().strip("%").strip()
    expected, given = _number(target), _number(prediction)
    if expected is None or given is None:
        return _similarity(target.lower(), prediction.lower())
    if expected == 0:
        return float(given == 0)
    return float(abs(given - expected) / abs(expected) <= TOLERANCE)


def _number(text: str) -> float | None:
    try:
        return float(text.strip().strip("%"))
    except ValueError:
        return None


def _similarity(target: str, prediction: str) -> float:
    """Returns 1 minus the normalized edit distance; 0 from a distance of one half on."""
    target, prediction = " ".join(target.split()), " ".join(prediction.split())
    longest = max(len(target), len(prediction))
    distance = levenshtein(target, prediction) / longest if longest else 0.0
    return 1 - distance if distance < 0.5 else 0.0


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the mean correctness, in total and per type of question."""
    scores = []
    for row in rows:
        fields = row.question.fields
        years = fields["years"]
        if fields["question_type"] == CONVERSATION:
            years = years[-1:]
        target = row.question.answers[0].strip(".").strip("\n")
        scores.append(correctness(target, row.text.strip(".").strip("\n"), years))
    result = hits(rows, scores)
    kinds = [row.question.fields["question_type"] for row in rows]
    parts = by_group(kinds, [value or 0.0 for value in result.scores])
    return dataclasses.replace(result, parts=parts)


def _turns(question: Question) -> Question:
    """Reads the cells that hold Python lists: question, answer and year."""
    row, where = question.fields, question.where
    try:
        texts, answers, years = (
            ast.literal_eval(row[name]) for name in ("question", "answer", "year")
        )
        kind = row["question_type"]
    except (ValueError, SyntaxError) as error:
        raise ConfigError(
            f"{where}: question, answer and year must be Python lists ({error}); correct the row"
        ) from None
    if not all(isinstance(value, list) and value for value in (texts, answers, years)):
        raise ConfigError(f"{where}: question, answer and year must be lists with an item or more")
    if kind not in PROMPTS:
        raise ConfigError(
            f'{where}: question_type "{kind}" is unknown; it is one of {", ".join(PROMPTS)}'
        )
    lists = {"texts": tuple(texts), "turn_answers": tuple(answers), "years": tuple(years)}
    return dataclasses.replace(
        question, text=str(texts[-1]), answers=(str(answers[-1]),), fields=dict(row) | lists
    )


TASKS = (
    Task(
        name="chartqapro",
        title="ChartQAPro",
        samples=1948,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv("ChartQAPro", needs=COLUMNS, finish=_turns), prompt, score, dataset="ChartQAPro"
            )
        },
    ),
)
