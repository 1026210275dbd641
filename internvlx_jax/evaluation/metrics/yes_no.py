"""Yes or no questions: MME, POPE and HallusionBench (design: evaluation.md 6)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

from internvlx_jax.evaluation.metrics.vqa import strip_punctuation

MME_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                  "OCR")  # fmt: skip
MME_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
_CJK = re.compile(r"[\u4e00-\u9fff]+")


def mme_label(text: str) -> str:
    """ "yes", "no" or "other", from the first four characters of the cleaned answer."""
    text = (
        text.replace("\n", "")
        .replace("不是", "No")
        .replace("是", "Yes")
        .replace("否", "No")
        .lower()
    )
    start = _CJK.sub("", text.replace("true", "yes").replace("false", "no"))[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_scores(tasks: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    """100 * accuracy + 100 * share of pairs with both right, per task; their sums `perception` and `cognition`.

    Rows of a task stand in the order of its file; two neighbours are one image. A last one without its neighbour, as
    --limit may leave it, counts in the accuracy alone.
    """
    rows: dict[str, list[bool]] = defaultdict(list)
    for task, hit in zip(tasks, right, strict=True):
        rows[task].append(hit)
    scores = {}
    for task, hits in rows.items():
        pairs = [all(hits[i : i + 2]) for i in range(0, len(hits) - 1, 2)]
        scores[task] = 100 * sum(hits) / len(hits) + 100 * _ratio(sum(pairs), len(pairs))
    for name, group in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        if any(task in scores for task in group):
            scores[name] = sum(scores.get(task, 0.0) for task in group)
    return scores


def pope_label(text: str) -> str:
    """ "no" if a word before the first full stop is No, not or no, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def binary_scores(predicted_yes: Sequence[bool], is_yes: Sequence[bool]) -> dict[str, float]:
    """accuracy, precision, recall, f1 (yes is positive) and yes_ratio, as fractions; 0 where undefined."""
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


def yes_or_no(text: str) -> str | None:
    """ "Yes" or "No" if only one of the two words occurs, else None (design: evaluation.md 6; HallusionBench)."""
    words = strip_punctuation(text.lower(), vlmevalkit=True).split()
    yes, no = "yes" in words, "no" in words
    return None if yes == no else "Yes" if yes else "No"


def all_right(groups: Sequence[Hashable], right: Sequence[bool]) -> float:
    """Share of groups, in points, in which every row is right."""
    together: dict[Hashable, bool] = {}
    for group, hit in zip(groups, right, strict=True):
        together[group] = together.get(group, True) and hit
    return 100 * sum(together.values()) / len(together)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
