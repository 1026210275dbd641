"""The machinery that scores a task, and the scorers that several benchmarks share.

(design: evaluation.md 6) A scorer that one benchmark uses stands in the file of that benchmark. The
score of a task is in the unit in which it is published: points of 100, MME points, or POPE's F1 as
a fraction.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.judge import Judge, JudgeRequest, ask_each, ask_until, fill
from internvlx_jax.evaluation.metrics import options, text, vqa
from internvlx_jax.evaluation.questions import Question

# Deviations of the published scripts that change a score; `--compat` switches them.
COMPAT = {
    "relaxed_swap": "ChartQA: the prediction is the target of the 5 % (InternVL script)",
    "gqa_blank": "GQA: a blank before the final full stop makes an answer wrong (InternVL script)",
    "scienceqa_parentheses": 'ScienceQA: "(B)" is read as B (InternVL script, not the release)',
    "rgb_after_tiling": "MMMU, MathVista: images are tiled before they are converted to RGB "
    "(InternVL script)",
    "mmmu_empty_tail": "MMMU: an empty text behind an indicator counts as the shortest "
    "(InternVL script)",
    "mme_tab": "MME: an answer with a tab is left out of the accuracy (InternVL script)",
    "mme_cjk": "MME: characters from U+9FA6 on stay in the answer (InternVL script)",
    "mathvista_float_bug": "MathVista: float answers never match (InternVL-X release)",
    "llavabench_minus1": "LLaVA-Bench: the judge is asked once, and a judgment other than two "
    "numbers with one blank between them is -1 for both and stays in the means",
    "pandas_cells": "cells of TSV files are what pandas reads: None, N/A and the like are missing, "
    "columns of numbers are numbers",
    "pandas_predictions": "predictions are what pandas reads back from an xlsx file (VLMEvalKit)",
    "option_word_start": 'a word after "answer is" stands for its first letter (VLMEvalKit)',
    "random_option": "where the judge names no option three times, one is drawn (VLMEvalKit)",
    "yes_no_case": 'keys other than "Yes" and "No", such as "yes", never match (VLMEvalKit)',
    "pope_unknown_is_no": "POPE: an answer without yes or no is a no in F1 (VLMEvalKit)",
    "mmmu_letter_key": "MMMU: an open question whose answer is one capital letter is never right "
    "(VLMEvalKit)",
    "mathvista_text_bug": "MathVista: text and list answers never match (VLMEvalKit)",
    "mathvista_prefetch": "MathVista: a number is taken without a judge only if it is right and "
    "not 0 (VLMEvalKit)",
    "mathvision_names": 'MathVision: an "a" in an answer stands for the value of the key, so "A" '
    "is right for any number (VLMEvalKit)",
    "mvbench_empty_right": "MVBench: an answer without letters in its first word, such as an empty "
    "one, is right (both references)",
    "videomme_openings": 'Video-MME: "Best option: C" is B, because two commas are missing '
    "(VLMEvalKit)",
}


class ScoringError(RuntimeError):
    """A scorer failed; the answers are in predictions.jsonl."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question with the answer of the model.

    Attributes:
        question: the question and its references.
        text: what the model wrote.
        error: why there is no answer; the question then counts as wrong.
    """

    question: Question
    text: str
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """Holds what scoring depends on besides the answers.

    Attributes:
        judge: answers what rules cannot decide.
        compat: deviations in force, names of `COMPAT`.
    """

    judge: Judge
    compat: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Result:
    """The score of a task.

    Attributes:
        score: the headline; None without references, or while a judge is missing (`pending`).
        scores: the score of each row, in order; None where the headline would be None.
        predictions: what was read from the text of each row.
        parts: sub-scores by name.
        notes: what a reader has to know about the score.
        pending: whether a judge has to complete the score.
    """

    score: float | None
    scores: Sequence[float | None]
    predictions: Sequence[str]
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    pending: bool = False


# Temperatures of the tries until a reply can be read, as in VLMEvalKit.
OPTION_TRIES = (0.0,) * 3
RISING = (0.0, 0.5, 1.0, 1.5, 2.0)

Scorer = Callable[[Sequence[Answered], Context], Result]
Metric = Callable[[str, Sequence[str]], float]


def mean(values: Sequence[float]) -> float:
    """Returns the arithmetic mean of one or more values."""
    return sum(values) / len(values)


def by_group(
    groups: Sequence[Hashable], values: Sequence[float], scale: float = 100
) -> dict[str, float]:
    """Returns `scale` times the mean of each group, sorted by the name of the group."""
    members: dict[str, list[float]] = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        members[str(group)].append(value)
    return {group: scale * mean(members[group]) for group in sorted(members)}


def hits(
    rows: Sequence[Answered],
    right: Sequence[float],
    predictions: Sequence[str] | None = None,
    *,
    group: str | None = None,
    notes: Sequence[str] = (),
) -> Result:
    """Scores rows that are right or wrong: 100 times the mean.

    Args:
        rows: the answered questions; those with an error count as wrong.
        right: 1 or 0 for each row.
        predictions: what was read from each row; the raw text by default.
        group: the field of a question whose values each get a sub-score.
        notes: notes of the result.
    """
    scores = [0.0 if row.error else float(value) for row, value in zip(rows, right, strict=True)]
    parts = by_group([row.question.fields.get(group, "") for row in rows], scores) if group else {}
    return Result(
        100 * mean(scores), scores, predictions or [row.text for row in rows], parts, notes
    )


# --- texts ----------------------------------------------------------------------------------------


def mean_of(metric: Metric, scale: float = 100) -> Scorer:
    """Returns a scorer: `scale` times the mean of a metric of single answers."""

    def score(rows: Sequence[Answered], context: Context) -> Result:
        scores = [0.0 if row.error else _measure(metric, row) for row in rows]
        return Result(scale * mean(scores), scores, [row.text for row in rows])

    return score


def _measure(metric: Metric, row: Answered) -> float:
    if not row.question.answers:
        raise ConfigError(f"{row.question.where}: no answer to compare with; this metric needs one")
    try:
        return metric(row.text, row.question.answers)
    except ValueError as error:
        raise ConfigError(f"{row.question.where}: {error}") from None


vqa_soft = mean_of(vqa.soft_accuracy)
vqa_soft_vlm = mean_of(
    lambda prediction, answers: vqa.soft_accuracy(prediction, answers, vlmevalkit=True)
)
anls = mean_of(text.anls)


def server(rows: Sequence[Answered], context: Context) -> Result:
    """Scores nothing: the references are not public, and a server reads the submission file."""
    return Result(
        None,
        [None] * len(rows),
        [row.text for row in rows],
        notes=["scored by the benchmark's server from the submission file"],
    )


# --- options --------------------------------------------------------------------------------------


def first_options(rows: Sequence[Answered]) -> list[str]:
    """Returns what InternVL reads from each text: a letter, or the text where it finds none."""
    return [options.first_option(row.text, row.question.options) for row in rows]


def read_option(text: str, question: Question, context: Context) -> str | None:
    """Returns the option that VLMEvalKit's rules read from a text; None where a judge has to."""
    word_start = "option_word_start" in context.compat
    return options.infer_option(text, question.options, word_start=word_start)


def inferred_options(
    rows: Sequence[Answered], context: Context, *, judge_prompt: str | None = None
) -> tuple[list[str], list[str]]:
    """Reads options as VLMEvalKit does, with the judge where the rules do not decide.

    Args:
        rows: the answered questions.
        context: judge and deviations.
        judge_prompt: the judge's prompt; None takes that of the language of the question.

    Returns:
        (the letter of each row, "" where there is none; notes).
    """
    letters = [read_option(row.text, row.question, context) for row in rows]
    undecided = [i for i, letter in enumerate(letters) if letter is None and not rows[i].error]
    judged, notes = judged_options([rows[i] for i in undecided], context, judge_prompt)
    for i, letter in zip(undecided, judged, strict=True):
        letters[i] = letter
    return [letter or "" for letter in letters], notes


def judged_options(
    rows: Sequence[Answered], context: Context, judge_prompt: str | None = None
) -> tuple[list[str | None], list[str]]:
    """Asks the judge which option each row means, up to three times per row.

    Args:
        rows: the answered questions.
        context: judge and deviations.
        judge_prompt: the judge's prompt; None takes that of the language of the question.

    Returns:
        (the letter of each row, None where there is none; notes).
    """
    judge = TrackingJudge(context.judge)
    readers = [partial(read_option, question=row.question, context=context) for row in rows]
    prompts = [_option_prompt(row, judge_prompt) for row in rows]
    letters = ask_each(judge, prompts, readers, temperatures=OPTION_TRIES)
    unread = [i for i, letter in enumerate(letters) if letter is None]
    if not unread:
        return letters, []
    if judge.missing:
        return letters, [
            f"{len(unread)} answers state no option by the rules and count as wrong; a judge would "
            "read them"
        ]
    if "random_option" not in context.compat:
        return letters, [f"the judge named no option for {len(unread)} answers; they count wrong"]
    for i in unread:
        letters[i] = _drawn_option(rows[i].question)
    return letters, [f"the judge named no option for {len(unread)} answers; one was drawn for each"]


def _drawn_option(question: Question) -> str:
    """Draws an option or Z, which is none, always the same one for a question."""
    return random.Random(str(question.id)).choice([*question.options, options.NONE_OF_THEM])


def _option_prompt(row: Answered, name: str | None) -> str:
    question = row.question
    listed = "".join(f"{letter}. {text}\n" for letter, text in question.options.items())
    chinese = re.search(r"[\u4e00-\u9fff]", question.text)
    return fill(
        name or ("option_cn" if chinese else "option"),
        question=question.text,
        options=f"There are several options: \n{listed}",
        prediction=row.text,
    )


def vanilla_choice(rows: Sequence[Answered], context: Context) -> Result:
    """Scores VLMEvalKit's accuracy of inferred options, in total and per category."""
    letters, notes = inferred_options(rows, context)
    right = [letter in row.question.answers for letter, row in zip(letters, rows, strict=True)]
    return hits(rows, right, letters, group="category", notes=notes)


# --- yes or no ------------------------------------------------------------------------------------


def inferred_yes_or_no(rows: Sequence[Answered], context: Context) -> tuple[list[str], list[str]]:
    """Reads "Yes" or "No" as VLMEvalKit does, with the judge where both or none of them occur.

    Returns:
        (the label of each row, "" where there is none; notes).
    """
    labels = [options.yes_or_no(row.text) for row in rows]
    undecided = [i for i, label in enumerate(labels) if label is None and not rows[i].error]
    prompts = [
        fill("yes_no", question=rows[i].question.text, prediction=rows[i].text) for i in undecided
    ]
    judge = TrackingJudge(context.judge)
    replies = ask_until(judge, prompts, options.yes_or_no, temperatures=RISING)
    for i, label in zip(undecided, replies, strict=True):
        labels[i] = label
    unread = replies.count(None)
    note = f"{unread} answers state neither yes nor no and count as wrong"
    notes = [note + ("; a judge would read them" if judge.missing else ", as the judge says")]
    return [label or "" for label in labels], notes if unread else []


def yes_no_hits(rows: Sequence[Answered], labels: Sequence[str], context: Context) -> list[bool]:
    """Returns whether each label equals its key; keys such as "yes" count without `yes_no_case`."""
    exact = "yes_no_case" in context.compat
    pairs = zip(labels, rows, strict=True)
    return [
        not row.error
        and (
            label == row.question.answers[0]
            if exact
            else label.lower() == row.question.answers[0].strip().lower()
        )
        for label, row in pairs
    ]


# --- judged ---------------------------------------------------------------------------------------


class TrackingJudge:
    """Passes requests on to a judge and remembers whether a reply was missing.

    Attributes:
        judge: the judge that is asked.
        missing: whether any request so far got no reply.
    """

    def __init__(self, judge: Judge):
        self.judge, self.missing = judge, False

    def ask(self, requests: Sequence[JudgeRequest]) -> Sequence[str | None]:
        """Returns the replies of the judge."""
        replies = self.judge.ask(requests)
        self.missing |= any(reply is None for reply in replies)
        return replies

    def describe(self) -> dict[str, Any] | None:
        """Returns what the judge says about itself."""
        return self.judge.describe()


def pending(rows: Sequence[Answered]) -> Result:
    """Returns the result of a task that waits for a judge."""
    return Result(None, [None] * len(rows), [row.text for row in rows], pending=True)
