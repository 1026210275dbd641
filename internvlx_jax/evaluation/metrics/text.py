"""Equality, edit distance and numbers within five per cent (design: evaluation.md 6: exact, ANLS, relaxed, GQA)."""

from __future__ import annotations

from collections.abc import Sequence

RELAXED_TOLERANCE = 0.05


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals an answer, both stripped and in lower case."""
    return float(any(prediction.strip().lower() == answer.strip().lower() for answer in answers))


def exact_without_stops(prediction: str, answers: Sequence[str]) -> float:
    """GQA: as `exact`, the prediction without trailing full stops."""
    return exact(prediction.strip().rstrip("."), answers)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """1 - normalised edit distance to the nearest answer; 0 below 0.5.

    Distances are between stripped, lower-case texts with single spaces; lengths are those of the raw texts.
    """

    def distance(answer: str) -> float:
        longest = max(len(answer.upper()), len(prediction.upper()))
        return levenshtein(_clean(answer), _clean(prediction)) / longest if longest else 0.0

    score = 1 - min(map(distance, answers))
    return score if score >= 0.5 else 0.0


def relaxed(prediction: str, answers: Sequence[str], *, swap: bool = False) -> float:
    """1 if an answer is a number and the prediction within 5 % of it, or if both are the same text in any case.

    swap: take the prediction as the target, as the InternVL script does (`--compat relaxed_swap`).
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
    """Least number of insertions, deletions and substitutions that turn a into b."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def _clean(text: str) -> str:
    return " ".join(text.lower().split())
