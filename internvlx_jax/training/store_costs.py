"""What a run costs in an object store: requests and bytes (design: platform.md 8).

They are those of process 0, and under names that end in OTHERS the largest of the other processes.
Imports no jax.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from internvlx_jax.core.remote import TRAFFIC

# In metrics.jsonl, of each window of steps, and in starts.jsonl, up to the first step.
NAMES = ("store_requests", "store_failed", "store_received_bytes", "store_sent_bytes")
OTHERS = "_others"
HTTP, KVSTORE = "/tensorstore/http/", "/tensorstore/kvstore/gcs/"


def totals() -> dict[str, int]:
    """Returns what this process has sent and received so far, arrays of checkpoints included."""
    arrays = _tensorstore_counts()
    return {
        "store_requests": TRAFFIC.requests + arrays.get(HTTP + "request_completed", 0),
        "store_failed": TRAFFIC.failed + arrays.get(KVSTORE + "retries", 0),
        "store_received_bytes": TRAFFIC.received + arrays.get(KVSTORE + "bytes_read", 0),
        "store_sent_bytes": TRAFFIC.sent + arrays.get(KVSTORE + "bytes_written", 0),
    }


class StoreMeter:
    """Counts from one call to the next."""

    def __init__(self) -> None:
        self._before = totals()

    def take(self) -> dict[str, int]:
        """Returns what was added since the last call."""
        now = totals()
        added = {name: now[name] - self._before[name] for name in NAMES}
        self._before = now
        return added


def costs(
    series: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    starts: Sequence[Mapping[str, Any]],
    save_every: int,
) -> dict[str, dict[str, float]]:
    """Returns the costs of a step, a checkpoint and a start, each by the names of NAMES.

    Most windows hold no save, so a step costs their median; what is above it is of checkpoints.

    Those of the other processes follow, such as "step_others", if there are some.

    Args:
        series: Metric -> (steps, values), as report.read_metrics gives them.
        starts: The lines of starts.jsonl.
        save_every: Of the run's config.
    """
    found: dict[str, dict[str, float]] = {}
    for end in ("", OTHERS):
        if NAMES[0] + end not in series:
            continue
        ends = list(series[NAMES[0] + end][0])
        lengths = [max(last - before, 1) for before, last in zip([0, *ends], ends, strict=False)]
        saves = max(ends[-1] // save_every, 1)
        parts = found["step" + end], found["checkpoint" + end], found["start" + end] = {}, {}, {}
        step, checkpoint, start = parts
        for name in NAMES:
            values = list(series[name + end][1])
            per_step = [value / length for value, length in zip(values, lengths, strict=True)]
            step[name] = statistics.median(per_step)
            checkpoint[name] = max(sum(values) - step[name] * sum(lengths), 0) / saves
            counted = [line[name + end] for line in starts if name + end in line]
            start[name] = statistics.mean(counted) if counted else 0
    return found


def _tensorstore_counts() -> dict[str, int]:
    """Returns the counters of tensorstore's driver of gs://, if it is in use."""
    if "tensorstore" not in sys.modules:
        return {}
    found = [
        metric
        for prefix in (HTTP + "request_completed", KVSTORE)
        for metric in sys.modules["tensorstore"].experimental_collect_matching_metrics(prefix)
    ]
    return {metric["name"]: metric["values"][0].get("value", 0) for metric in found}
