"""Metrics of texts and numbers (design: evaluation.md 6: exact match, ANLS, relaxed accuracy)."""

from __future__ import annotations

from collections.abc import Sequence

RELAXED_TOLERANCE = 0.05


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if the prediction equals an answer, both stripped and in lower case, else 0."""
    return float(any(prediction.strip().lower() == answer.strip().lower() for answer in answers))


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 minus the normalized edit distance to the nearest answer; 0 below 0.5.

    Distances are between stripped, lower-case texts with single spaces. They are divided by the
    length of the longer raw text.
    """

    def distance(answer: str) -> float:
        longest = max(len(answer.upper()), len(prediction.upper()))
        return levenshtein(_clean(answer), _clean(prediction)) / longest if longest else 0.0

    score = 1 - min(map(distance, answers))
    return score if score >= 0.5 else 0.0


def relaxed(prediction: str, answers: Sequence[str], *, swap: bool = False) -> float:
    """Returns 1 if the prediction is within 5 % of an answer, or the same text in any case.

    Args:
        prediction: the model's text.
        answers: accepted answers, numbers or texts.
        swap: take 5 % of the prediction instead, as the InternVL script does
            (`--compat relaxed_swap`).
    """
    prediction = prediction.strip()
    return float(
        any(
            _relaxed(prediction, answer) if swap else _relaxed(answer, prediction)
            for answer in answers
        )
    )


def _relaxed(target: str, prediction: str) -> bool:
    expected, given = _number(target), _number(prediction)
    if expected and given is not None:
        return abs(given - expected) / abs(expected) <= RELAXED_TOLERANCE
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def levenshtein(a: str, b: str) -> int:
    """Returns the least number of insertions, deletions and substitutions that turn a into b."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def _clean(text: str) -> str:
    return " ".join(text.lower().split())
