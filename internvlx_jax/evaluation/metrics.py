"""Scores of one answer against its references (spec: evaluation.md 6). No import of jax."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals an answer, both stripped and in lower case."""
    return float(any(prediction.strip().lower() == answer.strip().lower() for answer in answers))


def anls(prediction: str, answers: Sequence[str]) -> float:
    """1 - normalised edit distance to the nearest answer; 0 below 0.5.

    Distances are between stripped, lower-case texts with single spaces; lengths are those of the raw texts.
    """

    def distance(answer: str) -> float:
        longest = max(len(answer.upper()), len(prediction.upper()))
        return levenshtein(_clean(answer), _clean(prediction)) / longest if longest else 0.0

    score = 1 - min(map(distance, answers))
    return score if score >= 0.5 else 0.0


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


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"exact": exact, "anls": anls}
