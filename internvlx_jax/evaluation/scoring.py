"""From the answers of a task to its score: one function a way of scoring (design: evaluation.md 6).

Scores of a task are in the unit in which it is published: points of 100, MME points, POPE's F1 as a fraction.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.judge import PROMPTS, Judge, ask_until, fill
from internvlx_jax.evaluation.metrics import mathvista, mmmu, options, text, vqa, yes_no
from internvlx_jax.evaluation.questions import Question

TRIES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
)  # temperatures at which MMVet's judge is asked until it gives a number

# Deviations of the published scripts that change a score; `--compat` switches them.
COMPAT = {
    "relaxed_swap": "ChartQA: the prediction is the target of the 5 % (InternVL script)",
    "rgb_after_tiling": "MMMU, MathVista: tiles are cut before the conversion to RGB (InternVL script)",
    "mathvista_text_bug": "MathVista: text and list answers never match (VLMEvalKit)",
    "llavabench_minus1": "LLaVABench: an unreadable judgement is -1 for both and stays in the means (InternVL script)",
}


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question with the model's text; `error` says why there is none, and then it counts as wrong."""

    question: Question
    text: str
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What scoring depends on besides the answers."""

    judge: Judge
    compat: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Result:
    """Attributes:
    score: headline, None without references or while a judge is missing (`pending`).
    scores: of each row, in order; None like the headline. predictions: what was read from each text.
    parts: sub-scores. notes: what a reader has to know about the score.
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
    return sum(values) / len(values)


def by_group(
    groups: Sequence[Hashable], values: Sequence[float], scale: float = 100
) -> dict[str, float]:
    """Mean of each group, sorted by name."""
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
    """100 * mean, and the same for each value of the field `group`."""
    scores = [0.0 if row.error else float(value) for row, value in zip(rows, right, strict=True)]
    parts = by_group([row.question.fields.get(group, "") for row in rows], scores) if group else {}
    return Result(
        100 * mean(scores), scores, predictions or [row.text for row in rows], parts, notes
    )


# --- texts ----------------------------------------------------------------------------------------------------------


def mean_of(metric: Metric, scale: float = 100) -> Scorer:
    """The mean of a metric of single answers."""

    def score(rows: Sequence[Answered], context: Context) -> Result:
        scores = [0.0 if row.error else _measured(metric, row) for row in rows]
        return Result(scale * mean(scores), scores, [row.text for row in rows])

    return score


def _measured(metric: Metric, row: Answered) -> float:
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
exact = mean_of(text.exact)
gqa = mean_of(text.exact_without_stops)


def relaxed(rows: Sequence[Answered], context: Context) -> Result:
    swap = "relaxed_swap" in context.compat
    return mean_of(lambda prediction, answers: text.relaxed(prediction, answers, swap=swap))(
        rows, context
    )


def server(rows: Sequence[Answered], context: Context) -> Result:
    """The references are not public: a server scores the submission file."""
    return Result(
        None,
        [None] * len(rows),
        [row.text for row in rows],
        notes=["scored by the benchmark's server from the submission file"],
    )


# --- options --------------------------------------------------------------------------------------------------------


def first_options(rows: Sequence[Answered]) -> list[str]:
    """What InternVL reads from each text."""
    return [options.first_option(row.text, row.question.options) for row in rows]


def inferred_option(rows: Sequence[Answered], context: Context) -> tuple[list[str], list[str]]:
    """What VLMEvalKit reads from each text, the judge where the rules do not decide -> (letters or "", notes)."""
    letters = [options.infer_option(row.text, row.question.options) for row in rows]
    open_ = [i for i, letter in enumerate(letters) if letter is None and not rows[i].error]
    prompts = []
    for i in open_:
        question = rows[i].question
        listed = "There are several options: \n" + "".join(
            f"{k}. {v}\n" for k, v in question.options.items()
        )
        name = "option_cn" if re.search(r"[\u4e00-\u9fff]", question.text) else "option"
        prompts.append(fill(name, question=question.text, options=listed, prediction=rows[i].text))

    def read(i: int, reply: str) -> str | None:
        return options.infer_option(reply, rows[i].question.options)

    replies = ask_until(context.judge, prompts, str)
    for i, reply in zip(open_, replies):
        letters[i] = None if reply is None else read(i, reply)
    return [letter or "" for letter in letters], _unmatched(open_, replies)


def _unmatched(open_: Sequence[int], replies: Sequence[Any]) -> list[str]:
    without = sum(reply is None for reply in replies)
    note = f"{without} answers state no option by the rules and count as wrong; a judge would read them"
    return [note] if without else []


def exact_letter(rows: Sequence[Answered], context: Context) -> Result:
    """InternVL's reading of the letter, compared with the key."""
    letters = first_options(rows)
    return hits(
        rows, [letter in row.question.answers for letter, row in zip(letters, rows)], letters
    )


def vanilla_choice(rows: Sequence[Answered], context: Context) -> Result:
    """VLMEvalKit's accuracy of inferred options, also per category."""
    letters, notes = inferred_option(rows, context)
    return hits(
        rows,
        [letter in row.question.answers for letter, row in zip(letters, rows)],
        letters,
        group="category",
        notes=notes,
    )


def circular(rows: Sequence[Answered], context: Context) -> Result:
    """MMBench as InternVL scores it: a question is right if all rotations of its options are."""
    return _circular(rows, first_options(rows))


def circular_vlm(rows: Sequence[Answered], context: Context) -> Result:
    letters, notes = inferred_option(rows, context)
    return _circular(rows, letters, notes)


def _circular(
    rows: Sequence[Answered], letters: Sequence[str], notes: Sequence[str] = ()
) -> Result:
    right = [not row.error and letter in row.question.answers for letter, row in zip(letters, rows)]
    indices = [int(row.question.id) for row in rows]
    whole = options.circular(indices, right)
    fields = {int(row.question.id): row.question.fields for row in rows}
    parts = {"questions": len(whole), "one_rotation": 100 * mean(right)}
    for column in ("l2-category", "category"):
        parts[column] = by_group(
            [fields[index].get(column, "") for index in whole], list(whole.values())
        )
    return Result(
        100 * mean(list(whole.values())), [float(hit) for hit in right], letters, parts, notes
    )


def server_choice(rows: Sequence[Answered], context: Context) -> Result:
    return dataclasses.replace(server(rows, context), predictions=first_options(rows))


def seed(rows: Sequence[Answered], context: Context) -> Result:
    """First character; types 1 to 9 are images (the reported score), 10 to 12 video frames."""
    right = [float(not row.error and row.text[:1] in row.question.answers) for row in rows]
    image = [
        hit for hit, row in zip(right, rows) if int(row.question.fields["question_type_id"]) <= 9
    ]
    video = [
        hit for hit, row in zip(right, rows) if int(row.question.fields["question_type_id"]) > 9
    ]
    parts = {
        name: 100 * mean(part)
        for name, part in (("image", image), ("video", video), ("total", right))
        if part
    }
    kinds = by_group([int(row.question.fields["question_type_id"]) for row in rows], right)
    return Result(parts.get("image"), right, [row.text for row in rows], parts | {"by_type": kinds})


def mmmu_score(rows: Sequence[Answered], context: Context) -> Result:
    """Choices as MMBench, open questions by what the text states; by subject and domain."""
    predictions, right = [], []
    for row in rows:
        question = row.question
        if question.fields["question_type"] == "multiple-choice":
            predictions.append(options.first_option(row.text, question.options))
            right.append(predictions[-1] in question.answers)
        else:
            predictions.append(row.text)
            right.append(mmmu.open_matches(row.text, question.answers))
    return _by_domain(hits(rows, right, predictions, group="subject"))


def mmmu_score_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Option inference; the options of an open question are its answer and `Other Answers`."""

    def closed(row: Answered) -> Answered:
        if row.question.options:
            return row
        pair = {"A": row.question.answers[0], "B": "Other Answers"}
        return dataclasses.replace(
            row, question=dataclasses.replace(row.question, options=pair, answers=("A",))
        )

    rows = [closed(row) for row in rows]
    letters, notes = inferred_option(rows, context)
    right = [letter in row.question.answers for letter, row in zip(letters, rows)]
    return _by_domain(hits(rows, right, letters, group="category", notes=notes))


def _by_domain(result: Result) -> Result:
    """The share of each domain is that of its subjects, each of which has 30 questions."""
    spelled = {subject.replace(" ", "_"): score for subject, score in result.parts.items()}
    domains = {
        domain: mean([spelled[subject] for subject in subjects if subject in spelled])
        for domain, subjects in mmmu.DOMAINS.items()
        if any(subject in spelled for subject in subjects)
    }
    return dataclasses.replace(result, parts={"subjects": result.parts, "domains": domains})


# --- yes or no ------------------------------------------------------------------------------------------------------


def mme(rows: Sequence[Answered], context: Context) -> Result:
    return _mme(rows, [yes_no.mme_label(row.text) for row in rows])


def mme_vlm(rows: Sequence[Answered], context: Context) -> Result:
    labels, notes = _yes_or_no(rows, context)
    return _mme(rows, [label.lower() for label in labels], notes)


def _mme(rows: Sequence[Answered], labels: Sequence[str], notes: Sequence[str] = ()) -> Result:
    right = [
        not row.error and label == row.question.answers[0].lower()
        for label, row in zip(labels, rows)
    ]
    parts = yes_no.mme_scores([row.question.fields["category"] for row in rows], right)
    total = parts.get("perception", 0.0) + parts.get("cognition", 0.0)
    return Result(total, [float(hit) for hit in right], labels, parts, notes)


def pope(rows: Sequence[Answered], context: Context) -> Result:
    return _pope(rows, [yes_no.pope_label(row.text) for row in rows])


def pope_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """A row may stand in several categories (joined by commas) and counts in each; F1 over all of these."""
    labels, notes = _yes_or_no(rows, context)
    result = _pope(rows, [label.lower() for label in labels], notes)
    return dataclasses.replace(result, score=result.parts["all"]["f1"])


def _pope(rows: Sequence[Answered], labels: Sequence[str], notes: Sequence[str] = ()) -> Result:
    """Mean F1 of the categories. A failed row is predicted as the opposite of its key; so is one without yes or no."""
    keys = [row.question.answers[0].lower() == "yes" for row in rows]
    said = [
        (label == "yes") if label in ("yes", "no") and not row.error else not key
        for label, key, row in zip(labels, keys, rows)
    ]
    members: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        for category in row.question.fields["category"].split(","):
            members[category.strip()].append(i)
    parts = {
        category: yes_no.binary_scores([said[i] for i in indices], [keys[i] for i in indices])
        for category, indices in members.items()
    }
    every = [i for indices in members.values() for i in indices]
    headline = mean([part["f1"] for part in parts.values()])
    parts["all"] = yes_no.binary_scores([said[i] for i in every], [keys[i] for i in every])
    return Result(headline, [float(a == b) for a, b in zip(said, keys)], labels, parts, notes)


def hallusionbench(rows: Sequence[Answered], context: Context) -> Result:
    """Mean of aAcc (rows), fAcc (figures) and qAcc (questions); the last three fields of an index are set, figure and
    question."""
    labels, notes = _yes_or_no(rows, context)
    right = [
        not row.error and label.lower() == row.question.answers[0].lower()
        for label, row in zip(labels, rows)
    ]
    parts: dict[str, Any] = {"aAcc": 100 * mean(right)}
    places = [
        (row.question.fields["l2-category"], *str(row.question.id).split("_")[-3:]) for row in rows
    ]
    parts["fAcc"] = yes_no.all_right(
        [(kind, group, figure) for kind, group, figure, _ in places], right
    )
    parts["qAcc"] = yes_no.all_right(
        [(kind, group, question) for kind, group, _, question in places], right
    )
    headline = mean(list(parts.values()))
    return Result(headline, [float(hit) for hit in right], labels, parts, notes)


def _yes_or_no(rows: Sequence[Answered], context: Context) -> tuple[list[str], list[str]]:
    """ "Yes", "No", or what the judge says where both or none of the words occur -> (labels or "", notes)."""
    labels = [yes_no.yes_or_no(row.text) for row in rows]
    open_ = [i for i, label in enumerate(labels) if label is None and not rows[i].error]
    replies = ask_until(
        context.judge,
        [fill("yes_no", question=rows[i].question.text, prediction=rows[i].text) for i in open_],
        str,
    )
    for i, reply in zip(open_, replies):
        labels[i] = None if reply is None else yes_no.yes_or_no(reply)
    without = sum(reply is None for reply in replies)
    notes = [
        f"{without} answers state neither yes nor no and count as wrong; a judge would read them"
    ] * bool(without)
    return [label or "" for label in labels], notes


# --- judged ---------------------------------------------------------------------------------------------------------


def mathvista_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Rules where they find a value, else the judge's extraction; the share of the former is `prefetch_rate`."""
    bug = "mathvista_text_bug" in context.compat

    def prefetch(row: Answered, key: mathvista.Key) -> bool:
        return bool(mathvista.parse(row.text, key, text_bug=bug))  # a value of 0 counts as none

    def right(extracted: str, key: mathvista.Key) -> bool:
        return mathvista.matches(mathvista.parse(extracted, key, text_bug=bug), key)

    return _mathvista(rows, context, prefetch, right)


def mathvista_internvl(rows: Sequence[Answered], context: Context) -> Result:
    return _mathvista(
        rows,
        context,
        lambda row, key: mathvista.internvl_prefetch(row.text, key) is not None,
        mathvista.internvl_matches,
    )


def _mathvista(
    rows: Sequence[Answered],
    context: Context,
    prefetch: Callable[[Answered, mathvista.Key], bool],
    right: Callable[[str, mathvista.Key], bool],
) -> Result:
    keys = [row.question.fields["key"] for row in rows]
    extracted: list[str | None] = [
        row.text if prefetch(row, key) else None for row, key in zip(rows, keys)
    ]
    open_ = [i for i, found in enumerate(extracted) if found is None and not rows[i].error]
    prompts = [
        fill("mathvista", question=rows[i].question.text, prediction=rows[i].text) for i in open_
    ]
    for i, reply in zip(open_, ask_until(context.judge, prompts, str, max_tokens=128)):
        extracted[i] = reply
    pending = any(extracted[i] is None for i in open_)
    scores = [
        None if found is None and not row.error else float(not row.error and right(found, key))
        for row, found, key in zip(rows, extracted, keys)
    ]
    known = [score or 0.0 for score in scores]
    parts: dict[str, Any] = {
        "prefetch_rate": 1 - len(open_) / len(rows),
        "without_judge": 100 * mean(known),
    }
    return Result(
        None if pending else 100 * mean(known),
        scores,
        [found or "" for found in extracted],
        parts,
        pending=pending,
    )


def mmvet(rows: Sequence[Answered], context: Context) -> Result:
    """100 * mean of the judge's 0 to 1; 0 if it gives no number in five tries. Also per capability."""

    def number(reply: str) -> float | None:
        try:
            value = float(reply.strip())
        except ValueError:
            return None
        return value if 0 <= value <= 1 else None

    asked = [i for i, row in enumerate(rows) if not row.error]
    prompts = [
        fill(
            "mmvet",
            question=rows[i].question.text,
            prediction=rows[i].text,
            answer=rows[i]
            .question.answers[0]
            .replace("<AND>", " <AND> ")
            .replace("<OR>", " <OR> "),
        )
        for i in asked
    ]
    judge = _Watched(context.judge)
    grades = dict(zip(asked, ask_until(judge, prompts, number, temperatures=TRIES)))
    if judge.missing:
        return _pending(rows)
    scores = [grades.get(i) or 0.0 for i in range(len(rows))]
    capabilities: dict[str, list[float]] = defaultdict(list)
    for row, score in zip(rows, scores):
        for capability in row.question.fields["capability"].split(","):
            capabilities[capability.strip()].append(score)
    ungraded = sum(grades[i] is None for i in asked)
    notes = [f"the judge gave no number for {ungraded} answers; they count 0"] * bool(ungraded)
    return Result(
        100 * mean(scores),
        scores,
        [row.text for row in rows],
        {name: 100 * mean(capabilities[name]) for name in sorted(capabilities)},
        notes,
    )


def llavabench(rows: Sequence[Answered], context: Context) -> Result:
    """100 * mean(model) / mean(reference) of the judge's 1 to 10, also per category."""
    keep_unreadable = "llavabench_minus1" in context.compat

    def pair(reply: str) -> tuple[float, float] | None:
        try:
            reference, model = map(float, reply.split("\n")[0].replace(",", " ").split())
        except ValueError:
            return (-1.0, -1.0) if keep_unreadable else None
        return reference, model

    prompts = [
        fill(
            "llavabench",
            caption=row.question.fields["caption"],
            question=row.question.text,
            reference=row.question.answers[0],
            prediction=row.text,
        )
        for row in rows
    ]
    judge = _Watched(context.judge)
    grades = ask_until(
        judge, prompts, pair, temperatures=(0.2,) * 3, system=PROMPTS["llavabench_system"]
    )
    if judge.missing:
        return _pending(rows)
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row, grade in zip(rows, grades):
        if grade is not None:
            groups["all"].append(grade)
            groups[row.question.fields["category"]].append(grade)
    parts = {}
    for name in sorted(groups):
        reference, model = (mean(column) for column in zip(*groups[name]))
        parts[name] = {
            "relative": 100 * model / reference if reference else 0.0,
            "reference": 10 * reference,
            "model": 10 * model,
        }
    unread = grades.count(None)
    notes = [f"{unread} judgements could not be read; these questions are left out"] * bool(unread)
    return Result(
        parts["all"]["relative"] if parts else None,
        [grade and grade[1] for grade in grades],
        [row.text for row in rows],
        parts,
        notes,
    )


class _Watched:
    """A judge that remembers whether it had no answer."""

    def __init__(self, judge: Judge):
        self.judge, self.missing = judge, False

    def ask(self, requests):
        replies = self.judge.ask(requests)
        self.missing |= any(reply is None for reply in replies)
        return replies

    def describe(self) -> dict[str, Any] | None:
        return self.judge.describe()


def _pending(rows: Sequence[Answered]) -> Result:
    return Result(None, [None] * len(rows), [row.text for row in rows], pending=True)
