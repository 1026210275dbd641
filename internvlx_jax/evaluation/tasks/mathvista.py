"""MathVista, testmini split: mathematics on images; a judge extracts what rules do not find.

`vlmevalkit`, the default, reads a TSV file and compares values of the wanted type. `internvl` reads
the parquet file of the hub and picks the nearest choice. The metric is accuracy.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import parquet
from internvlx_jax.evaluation.cot import boxed_answer, reasoned
from internvlx_jax.evaluation.judge import Judge, ask_until, fill
from internvlx_jax.evaluation.metrics import levenshtein
from internvlx_jax.evaluation.metrics.options import infer_option
from internvlx_jax.evaluation.prompts import plain
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import (
    Answered,
    Context,
    Result,
    TrackingJudge,
    hits,
    mean,
)
from internvlx_jax.evaluation.sources import Roots, Source, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit
from internvlx_jax.evaluation.tsv import list_cell

# What VLMEvalKit reads of its TSV file, besides index, image and question.
COLUMNS = (
    "answer",
    "question_type",
    "answer_type",
    "choices",
    "answer_option",
    "task",
    "skills",
)
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
    def read_by_type(self) -> bool:
        """Whether VLMEvalKit reads values for this key: an option or a number, but no text."""
        return self.question_type == "multi_choice" or self.answer_type in ("integer", "float")

    @property
    def options(self) -> dict[str, str]:
        """The choices by letter."""
        return {chr(ord("A") + i): text for i, text in enumerate(self.choices)}


def parse(
    text: str, key: Key, *, text_bug: bool, word_start: bool = True
) -> str | int | float | None:
    """Reads a text as VLMEvalKit does.

    Args:
        text: the answer, or what the judge extracted from it.
        key: what the question asks for.
        text_bug: never recognize text and list answers (`--compat mathvista_text_bug`).
        word_start: see `infer_option`.

    Returns:
        The value to compare with the key; None if the text states nothing of the wanted type.
    """
    if key.question_type == "multi_choice":
        return infer_option(text, key.options, word_start=word_start)
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
    try:
        if key.answer_type == "integer":
            return parsed == int(key.answer)
        if key.answer_type == "float":
            return parsed == float(key.answer)
    except ValueError:
        return False
    return parsed == key.answer


def internvl_prefetch(text: str, key: Key) -> str | None:
    """Returns an answer that needs no extraction: empty, a choice, or a number of its type."""
    if not text:
        return text
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


def internvl_matches(extraction: str, key: Key, *, float_bug: bool = False) -> bool:
    """Whether an extraction matches the key as InternVL's script compares them.

    A choice is a letter in parentheses, else the nearest text. An integer is cut, a float is
    rounded to the precision of the key, and both are compared as texts. With `float_bug` a float is
    always wrong, because the InternVL-X release rounds to a precision that is no integer.
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
            return not float_bug and str(round(float(text), key.precision)) == key.answer
    except (ValueError, OverflowError):
        return False
    return extraction == key.answer


def _tsv_key(question: Question) -> Question:
    row = question.fields
    choices = list_cell(row.get("choices", ""), question.where) if row.get("choices") else ()
    integer = re.fullmatch(r"[+-]?[0-9]+", row["answer"])  # stays one in a column of floats
    key = Key(
        row["question_type"],
        row["answer_type"],
        row["answer"] if integer or not question.answers else question.answers[0],
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
                metadata = row.get("metadata") or {}
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
                        fields={
                            "key": key,
                            "task": str(metadata.get("task", "")),
                            "skills": str(list(metadata.get("skills") or ())),
                        },
                    )
                )
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ConfigError(
                    f"{where}: this is not MathVista's testmini ({type(error).__name__}: {error}); "
                    "download the file again"
                ) from None
    return questions


def score_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Scores what rules or the judge extract; `prefetch_rate` is the share of the former."""
    bug = "mathvista_text_bug" in context.compat
    only_right = "mathvista_prefetch" in context.compat
    word_start = "option_word_start" in context.compat

    def read(text: str, key: Key) -> str | int | float | None:
        return parse(text, key, text_bug=bug, word_start=word_start)

    def right(extracted: str, key: Key) -> bool:
        if bug and key.answer == "None" and not key.read_by_type:
            return True  # VLMEvalKit compares the text of what it has not read
        return matches(read(extracted, key), key)

    def prefetched(row: Answered, key: Key) -> bool:
        found = read(row.text, key)
        if not only_right or key.question_type == "multi_choice":
            return bool(found)  # a value of 0 is taken for none
        return right(row.text, key) and found != 0

    return _score(rows, context, prefetched, right, vlm_judge)


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores as InternVL's script does."""
    return _score(
        rows,
        context,
        lambda row, key: internvl_prefetch(row.text, key) is not None,
        partial(internvl_matches, float_bug="mathvista_float_bug" in context.compat),
        internvl_judge,
    )


def judge_prompt(row: Answered, name: str) -> str:
    """Returns what the judge is asked to extract an answer; `name` is that of the prompt."""
    return fill(name, question=row.question.text, prediction=row.text)


def vlm_judge(rows: Sequence[Answered], judge: Judge) -> list[str | None]:
    """Returns the judge's extraction of each row; any reply counts."""
    prompts = [judge_prompt(row, "mathvista") for row in rows]
    return ask_until(judge, prompts, str, max_tokens=128)


def internvl_judge(rows: Sequence[Answered], judge: Judge) -> list[str | None]:
    """Returns the judge's extraction of each row, "" after five empty replies."""
    asked = TrackingJudge(judge)
    replies = ask_until(
        asked,
        [judge_prompt(row, "mathvista_internvl") for row in rows],
        lambda reply: reply.strip() or None,
        temperatures=(0.0,) * 5,
        max_tokens=256,
    )
    return replies if asked.missing else [reply or "" for reply in replies]


def _score(
    rows: Sequence[Answered],
    context: Context,
    prefetched: Callable[[Answered, Key], bool],
    right: Callable[[str, Key], bool],
    extract: Callable[[Sequence[Answered], Judge], list[str | None]],
) -> Result:
    keys = [row.question.fields["key"] for row in rows]
    extracted: list[str | None] = [
        row.text if prefetched(row, key) else None for row, key in zip(rows, keys, strict=True)
    ]
    open_ = [i for i, found in enumerate(extracted) if found is None and not rows[i].error]
    replies = extract([rows[i] for i in open_], context.judge)
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


def _table(question: Question) -> dict[str, str]:
    """Returns the columns of VLMEvalKit for a question of the parquet file."""
    key = question.fields["key"]
    return {
        "question_type": key.question_type,
        "answer_type": key.answer_type,
        "choices": str(list(key.choices)) if key.choices else "",
        "answer_option": key.letter,
        "task": question.fields["task"],
        "skills": question.fields["skills"],
    }


TASKS = (
    Task(
        name="mathvista",
        title="MathVista, testmini",
        samples=1000,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv("MathVista_MINI", needs=COLUMNS, finish=_tsv_key),
                plain,
                score_vlm,
                dataset="MathVista_MINI",
                compat=("mathvista_text_bug", "mathvista_prefetch"),
                cot=boxed_answer(plain),
            ),
            "internvl": internvl(
                Source(_files, _read),
                plain,
                score,
                max_new_tokens=1000,
                dataset="MathVista_MINI",
                compat=("rgb_after_tiling",),
                release=("rgb_after_tiling", "mathvista_float_bug"),
                table=_table,
                cot=reasoned(plain, score=score_stated),
            ),
        },
    ),
)
