"""Metrics of one answer against its references, one family per file (design: evaluation.md 6).

Nothing here imports jax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from internvlx_jax.evaluation.metrics.text import anls, exact, levenshtein, relaxed
from internvlx_jax.evaluation.metrics.vqa import soft_accuracy

__all__ = ["METRICS", "anls", "exact", "levenshtein", "relaxed", "soft_accuracy"]

# The metrics that `eval.py --data FILE --metric NAME` takes.
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "anls": anls,
    "relaxed": relaxed,
    "vqa": soft_accuracy,
}
