"""POPE: whether an object is in the photo; random, popular and adversarial objects.

The score of `internvl` is the mean F1 of the three categories, and a "no" before the first full
stop counts. `vlmevalkit` infers yes or no and scores one F1 over all rows; a row of several
categories counts in each.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import read_jsonl
from internvlx_jax.evaluation.prompts import ending, plain
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import (
    Answered,
    Context,
    Result,
    inferred_yes_or_no,
    mean,
    yes_no_hits,
)
from internvlx_jax.evaluation.sources import (
    Roots,
    Source,
    image_name,
    image_path,
    jsonl,
    required,
    tsv,
)
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

QUESTIONS = jsonl("pope/llava_pope_test.jsonl", text="text")
CATEGORIES = ("random", "popular", "adversarial")


def _labels(category: str) -> str:
    return f"pope/coco/coco_pope_{category}.json"


def _read(roots: Roots) -> list[Question]:
    """Pairs the labels of each category with its questions, in the order of both files."""
    members: dict[str, list[Question]] = defaultdict(list)
    for question in QUESTIONS.read(roots):
        images = tuple(
            image_path(f"pope/val2014/{image_name(path)}", roots) for path in question.images
        )
        category = required(question.fields, "category", question.where)
        members[category].append(dataclasses.replace(question, images=images))
    questions = []
    for category in CATEGORIES:
        path = roots.data / _labels(category)
        labels = [required(row, "label", where) for where, row in read_jsonl(path)]
        if len(labels) != len(members[category]):
            raise ConfigError(
                f"{path}: {len(labels)} labels, but {len(members[category])} questions of this "
                "category in llava_pope_test.jsonl; both files must be of one release"
            )
        questions += [
            dataclasses.replace(question, answers=(label,))
            for question, label in zip(members[category], labels, strict=True)
        ]
    return questions


SOURCE = Source(
    lambda roots: [*QUESTIONS.files(roots), *(roots.data / _labels(name) for name in CATEGORIES)],
    _read,
)


def label(text: str) -> str:
    """Returns "no" if a word before the first full stop is No, not or no, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def binary_scores(predicted_yes: Sequence[bool], is_yes: Sequence[bool]) -> dict[str, float]:
    """Returns accuracy, precision, recall, f1 and yes_ratio as fractions, 0 where undefined.

    Args:
        predicted_yes: what each answer says; yes is positive.
        is_yes: what is right.
    """
    pairs = list(zip(predicted_yes, is_yes, strict=True))
    tp, fp = pairs.count((True, True)), pairs.count((True, False))
    fn, tn = pairs.count((False, True)), pairs.count((False, False))
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {
        "accuracy": _ratio(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(tp + fp, len(pairs)),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the mean F1 of the categories; a failed row is predicted against its key."""
    labels = [label(row.text) for row in rows]
    keys = [row.question.answers[0].lower() == "yes" for row in rows]
    said = [
        not key if row.error else text == "yes"
        for text, key, row in zip(labels, keys, rows, strict=True)
    ]
    right = [a == b for a, b in zip(said, keys, strict=True)]
    parts = _parts(rows, said, keys, right)
    headline = mean([part["f1"] for name, part in parts.items() if name != "all"])
    return Result(headline, [float(hit) for hit in right], labels, parts)


def score_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Scores one F1 over all rows; a row counts in each of its categories, joined by commas."""
    labels, notes = inferred_yes_or_no(rows, context)
    right = yes_no_hits(rows, labels, context)
    yes = "Yes" if "yes_no_case" in context.compat else "yes"
    keys = [row.question.answers[0] for row in rows]
    keys = [(key if yes == "Yes" else key.strip().lower()) == yes for key in keys]
    unknown_is_no = "pope_unknown_is_no" in context.compat
    said = [
        label == "Yes" if (label or unknown_is_no) and not row.error else not key
        for label, key, row in zip(labels, keys, rows, strict=True)
    ]
    parts = _parts(rows, said, keys, right)
    return Result(parts["all"]["f1"], [float(hit) for hit in right], labels, parts, notes)


def _parts(
    rows: Sequence[Answered], said: Sequence[bool], keys: Sequence[bool], right: Sequence[bool]
) -> dict[str, dict[str, float]]:
    """Returns the scores of each category and of "all", where a row counts in each category.

    Args:
        rows: the rows; their categories are joined by commas.
        said: whether each answer says yes.
        keys: whether yes is right.
        right: whether each answer counts as right in the accuracy.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        for category in row.question.fields["category"].split(","):
            members[category.strip()].append(i)
    every = [i for indices in members.values() for i in indices]
    return {
        name: binary_scores([said[i] for i in indices], [keys[i] for i in indices])
        | {"accuracy": mean([right[i] for i in indices])}
        for name, indices in [*members.items(), ("all", every)]
    }


TASKS = (
    Task(
        name="pope",
        title="POPE, mean F1",
        samples=8910,
        protocols={
            "internvl": internvl(
                SOURCE,
                ending(" "),
                score,
                max_new_tokens=100,
                dataset="POPE",
                table=lambda question: {"answer": question.answers[0].capitalize()},
            ),
            "vlmevalkit": vlmevalkit(
                tsv("POPE", needs=("answer", "category")),
                plain,
                score_vlm,
                dataset="POPE",
                compat=("pope_unknown_is_no",),
                samples=0,
            ),
        },
    ),
)
