"""Scores of answers against their references, one family a file (design: evaluation.md 6). No import of jax."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from internvlx_jax.evaluation.metrics.text import anls, exact, levenshtein, relaxed
from internvlx_jax.evaluation.metrics.vqa import soft_accuracy

__all__ = ["METRICS", "anls", "exact", "levenshtein", "relaxed", "soft_accuracy"]

# Those of one answer on its own, for `eval.py --data FILE --metric NAME`.
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact, "anls": anls, "relaxed": relaxed, "vqa": soft_accuracy,
}  # fmt: skip
