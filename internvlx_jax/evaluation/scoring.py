"""The machinery that scores a task, and the scorers that several benchmarks share.

(design: evaluation.md 6) A scorer that one benchmark uses stands in the file of that benchmark. The
score of a task is in the unit in which it is published: points of 100, MME points, or POPE's F1 as
a fraction.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.judge import Judge, JudgeRequest, ask_until, fill
from internvlx_jax.evaluation.metrics import options, text, vqa
from internvlx_jax.evaluation.questions import Question

# Deviations of the published scripts that change a score; `--compat` switches them.
COMPAT = {
    "relaxed_swap": "ChartQA: the prediction is the target of the 5 % (InternVL script)",
    "rgb_after_tiling": "MMMU, MathVista: images are tiled before they are converted to RGB "
    "(InternVL script)",
    "mathvista_text_bug": "MathVista: text and list answers never match (VLMEvalKit)",
    "llavabench_minus1": "LLaVA-Bench: an unreadable judgment is -1 for both and stays in the "
    "means (InternVL script)",
    "mvbench_empty_right": "MVBench: an answer without letters in its first word, such as an empty "
    "one, is right (both references)",
    "videomme_openings": 'Video-MME: "Best option: C" is B, because two commas are missing '
    "(VLMEvalKit)",
}


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
    letters = [options.infer_option(row.text, row.question.options) for row in rows]
    undecided = [i for i, letter in enumerate(letters) if letter is None and not rows[i].error]
    prompts = [_option_prompt(rows[i], judge_prompt) for i in undecided]
    replies = ask_until(context.judge, prompts, str)
    for i, reply in zip(undecided, replies, strict=True):
        if reply is not None:
            letters[i] = options.infer_option(reply, rows[i].question.options)
    unread = replies.count(None)
    note = (
        f"{unread} answers state no option by the rules and count as wrong; a judge would read them"
    )
    return [letter or "" for letter in letters], [note] if unread else []


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
    replies = ask_until(context.judge, prompts, str)
    for i, reply in zip(undecided, replies, strict=True):
        labels[i] = None if reply is None else options.yes_or_no(reply)
    unread = replies.count(None)
    note = f"{unread} answers state neither yes nor no and count as wrong; a judge would read them"
    return [label or "" for label in labels], [note] if unread else []


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
