"""MathVision: competition mathematics on images; a judge extracts what rules do not find.

VLMEvalKit's prompt and metric, on all questions and on its small set. A choice is inferred; any
other answer counts without a judge only if it states the right value.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.cot import boxed_answer
from internvlx_jax.evaluation.judge import ask_until, fill
from internvlx_jax.evaluation.metrics.expressions import latex_reader, same_value
from internvlx_jax.evaluation.prompts import plain
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context, Result, by_group, mean, read_option
from internvlx_jax.evaluation.sources import Roots, Source, tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit
from internvlx_jax.evaluation.tsv import list_cell

JUDGE_TOKENS = 128


def read_answer(text: str, question: Question, context: Context) -> str | None:
    """Returns the option that a text means; for a question without options the text itself."""
    return read_option(text, question, context) if question.options else text


def prefetch(text: str, question: Question, context: Context) -> str | None:
    """Returns what needs no judge: an option, right or wrong, or the right value."""
    found = read_answer(text, question, context)
    if question.options:
        return found
    return found if found and right(found, question, context) else None


def right(text: str, question: Question, context: Context) -> bool:
    """Whether a text means the right option, or states the right value."""
    found = read_answer(text, question, context)
    names = "mathvision_names" in context.compat
    return found is not None and same_value(found, question.answers[0], names=names)


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores what rules or the judge extract; `prefetch_rate` is the share of the former."""
    extracted = [prefetch(row.text, row.question, context) for row in rows]
    open_ = [i for i, found in enumerate(extracted) if found is None and not rows[i].error]
    prompts = [
        fill("mathvision", question=rows[i].question.text, prediction=rows[i].text) for i in open_
    ]
    replies = ask_until(context.judge, prompts, str, max_tokens=JUDGE_TOKENS)
    for i, reply in zip(open_, replies, strict=True):
        extracted[i] = reply
    waiting = any(reply is None for reply in replies)
    scores = [
        0.0 if row.error else None if found is None else float(right(found, row.question, context))
        for row, found in zip(rows, extracted, strict=True)
    ]
    known = [value or 0.0 for value in scores]
    subjects = [row.question.fields.get("category", "") for row in rows]
    parts = {"prefetch_rate": 1 - len(open_) / len(rows), "without_judge": 100 * mean(known)}
    return Result(
        None if waiting else 100 * mean(known),
        scores,
        [found or "" for found in extracted],
        parts | ({} if waiting else {"subjects": by_group(subjects, known)}),
        pending=waiting,
    )


def _with_options(question: Question) -> Question:
    """Reads the cell of the choices, a Python list that may be empty."""
    row, where = question.fields, question.where
    if not question.answers:
        raise ConfigError(f"{where}: no answer to compare with; download the file again")
    choices = list_cell(row["choices"] or "[]", where)
    options = {chr(ord("A") + i): text for i, text in enumerate(choices)}
    return dataclasses.replace(question, options=options)


def _source(name: str) -> Source:
    """Returns a TSV file; what compares LaTeX must be installed before questions are asked."""
    source = tsv(name, needs=("answer", "choices", "category"), finish=_with_options)

    def files(roots: Roots) -> list[Path]:
        return source.files(roots)

    def read(roots: Roots) -> list[Question]:
        latex_reader()
        return source.read(roots)

    return Source(files, read)


def _task(name: str, title: str, dataset: str, samples: int) -> Task:
    spec = vlmevalkit(
        _source(dataset),
        plain,
        score,
        dataset=dataset,
        cot=boxed_answer(plain),
        compat=("mathvision_names",),
    )
    return Task(name=name, title=title, samples=samples, protocols={"vlmevalkit": spec})


TASKS = (
    _task("mathvision", "MathVision", "MathVision", 3040),
    _task("mathvision_mini", "MathVision, small set", "MathVision_MINI", 304),
)
