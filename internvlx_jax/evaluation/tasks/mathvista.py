"""MathVista, testmini split: mathematics on images; a judge extracts what rules do not find.

`vlmevalkit`, the default, reads a TSV file and compares values of the wanted type. `internvl` reads
the parquet file of the hub and picks the nearest choice. The metric is accuracy.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import parquet
from internvlx_jax.evaluation.cot import boxed_answer, reasoned
from internvlx_jax.evaluation.judge import ask_until, fill
from internvlx_jax.evaluation.metrics import levenshtein
from internvlx_jax.evaluation.metrics.options import infer_option
from internvlx_jax.evaluation.prompts import plain
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context, Result, hits, mean
from internvlx_jax.evaluation.sources import Roots, Source, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit
from internvlx_jax.evaluation.tsv import list_cell

_LETTER = re.compile(r"\(([a-zA-Z])\)")


@dataclasses.dataclass(frozen=True)
class Key:
    """What a question asks for.

    Attributes:
        question_type: multi_choice or free_form.
        answer_type: text, integer, float or list.
        answer: the answer as written in the file; for a choice, its text.
        choices: texts of the choices, in order.
        letter: letter of the right choice; empty for a free question.
        precision: decimals of a float answer.
    """

    question_type: str
    answer_type: str
    answer: str
    choices: tuple[str, ...] = ()
    letter: str = ""
    precision: int = 0

    @property
    def options(self) -> dict[str, str]:
        """The choices by letter."""
        return {chr(ord("A") + i): text for i, text in enumerate(self.choices)}


def parse(text: str, key: Key, *, text_bug: bool) -> str | int | float | None:
    """Reads a text as VLMEvalKit does.

    Args:
        text: the answer, or what the judge extracted from it.
        key: what the question asks for.
        text_bug: never recognize text and list answers (`--compat mathvista_text_bug`).

    Returns:
        The value to compare with the key; None if the text states nothing of the wanted type.
    """
    if key.question_type == "multi_choice":
        return infer_option(text, key.options)
    try:
        if key.answer_type == "integer":
            return int(text)
        if key.answer_type == "float":
            return float(text)
    except ValueError:
        return None
    return None if text_bug else text.strip()


def matches(parsed: str | int | float | None, key: Key) -> bool:
    """Whether a value equals the key, compared in the type that the key states."""
    if parsed is None:
        return False
    if key.question_type == "multi_choice":
        return parsed == key.letter
    if key.answer_type == "integer":
        return parsed == int(key.answer)
    if key.answer_type == "float":
        return parsed == float(key.answer)
    return parsed == key.answer


def internvl_prefetch(text: str, key: Key) -> str | None:
    """Returns an answer that needs no extraction: a choice, or a number of the wanted type."""
    if key.question_type == "multi_choice":
        return text if text in key.choices else None
    try:
        if key.answer_type == "integer":
            return str(int(text))
        if key.answer_type == "float":
            return str(float(text))
    except ValueError:
        pass
    return None


def internvl_matches(extraction: str, key: Key) -> bool:
    """Whether an extraction matches the key as InternVL's script compares them.

    A choice is a letter in parentheses, else the nearest text. An integer is cut, a float is
    rounded to the precision of the key, and both are compared as texts.
    """
    text = extraction.strip()
    if key.question_type == "multi_choice":
        letter = _LETTER.search(text)
        text = letter[1].upper() if letter else text
        if text not in key.options:
            return min(key.choices, key=lambda choice: levenshtein(text, choice)) == key.answer
        return key.options[text] == key.answer
    try:
        if key.answer_type == "integer":
            return str(int(float(text))) == key.answer
        if key.answer_type == "float":
            return str(round(float(text), key.precision)) == key.answer
    except (ValueError, OverflowError):
        return False
    return text == key.answer


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


def score_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Scores what rules or the judge extract; `prefetch_rate` is the share of the former."""
    bug = "mathvista_text_bug" in context.compat

    def prefetched(row: Answered, key: Key) -> bool:
        return bool(parse(row.text, key, text_bug=bug))  # VLMEvalKit takes a value of 0 for none

    def right(extracted: str, key: Key) -> bool:
        return matches(parse(extracted, key, text_bug=bug), key)

    return _score(rows, context, prefetched, right)


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores as InternVL's script does."""
    return _score(
        rows,
        context,
        lambda row, key: internvl_prefetch(row.text, key) is not None,
        internvl_matches,
    )


def _score(
    rows: Sequence[Answered],
    context: Context,
    prefetched: Callable[[Answered, Key], bool],
    right: Callable[[str, Key], bool],
) -> Result:
    keys = [row.question.fields["key"] for row in rows]
    extracted: list[str | None] = [
        row.text if prefetched(row, key) else None for row, key in zip(rows, keys, strict=True)
    ]
    open_ = [i for i, found in enumerate(extracted) if found is None and not rows[i].error]
    prompts = [
        fill("mathvista", question=rows[i].question.text, prediction=rows[i].text) for i in open_
    ]
    replies = ask_until(context.judge, prompts, str, max_tokens=128)
    for i, reply in zip(open_, replies, strict=True):
        extracted[i] = reply
    waiting = any(reply is None for reply in replies)
    scores = [
        0.0 if row.error else None if found is None else float(right(found, key))
        for row, found, key in zip(rows, extracted, keys, strict=True)
    ]
    known = [score or 0.0 for score in scores]
    return Result(
        None if waiting else 100 * mean(known),
        scores,
        [found or "" for found in extracted],
        {"prefetch_rate": 1 - len(open_) / len(rows), "without_judge": 100 * mean(known)},
        pending=waiting,
    )


def score_stated(rows: Sequence[Answered], context: Context) -> Result:
    """Scores final answers of a chain of thought as InternVL's script does, without a judge."""
    keys = [row.question.fields["key"] for row in rows]
    right = [internvl_matches(row.text, key) for row, key in zip(rows, keys, strict=True)]
    return hits(rows, right)


TASKS = (
    Task(
        name="mathvista",
        title="MathVista, testmini",
        samples=1000,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv("MathVista_MINI", finish=_tsv_key),
                plain,
                score_vlm,
                dataset="MathVista_MINI",
                compat=("mathvista_text_bug",),
                cot=boxed_answer(plain),
            ),
            "internvl": internvl(
                Source(_files, _read),
                plain,
                score,
                max_new_tokens=1000,
                dataset="MathVista_MINI",
                cot=reasoned(plain, score=score_stated),
            ),
        },
    ),
)
