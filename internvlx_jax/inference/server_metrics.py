"""Counts the calls of a server, and writes them as Prometheus reads them."""

from __future__ import annotations

import threading
from collections import Counter

from internvlx_jax.inference.engine import EngineState

PREFIX = "internvlx_"
GAUGES = {
    "slots": "requests that are answered at a time",
    "busy": "slots in the middle of an answer",
    "waiting": "requests that wait for a slot",
}
COUNTERS = {
    "answered": "requests that ended with an answer",
    "cancelled": "requests whose client has left",
    "failed": "requests that ended with an error",
    "prompt_tokens": "tokens of prompts",
    "new_tokens": "tokens of answers",
    "compiles": "programs compiled after the start",
}
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class _Histogram:
    def __init__(self):
        self.counts, self.total, self.number = [0] * len(BUCKETS), 0.0, 0

    def add(self, seconds: float) -> None:
        self.counts = [n + (seconds <= at) for n, at in zip(self.counts, BUCKETS, strict=True)]
        self.total, self.number = self.total + seconds, self.number + 1

    def lines(self, name: str, text: str) -> list[str]:
        name = PREFIX + name
        return [
            f"# HELP {name} {text}",
            f"# TYPE {name} histogram",
            *(
                f'{name}_bucket{{le="{at}"}} {n}'
                for at, n in zip(BUCKETS, self.counts, strict=True)
            ),
            f'{name}_bucket{{le="+Inf"}} {self.number}',
            f"{name}_sum {self.total}",
            f"{name}_count {self.number}",
        ]


class Metrics:
    """Counts calls by their status, and times them."""

    def __init__(self):
        self._lock = threading.Lock()
        self._statuses: Counter[int] = Counter()
        self._first, self._whole = _Histogram(), _Histogram()

    def count(self, status: int, first_seconds: float | None, seconds: float) -> None:
        """Adds one call of the completions."""
        with self._lock:
            self._statuses[status] += 1
            if first_seconds is not None:
                self._first.add(first_seconds)
                self._whole.add(seconds)

    def text(self, state: EngineState | None) -> str:
        """Returns all counts; those of the engine once it is ready."""
        lines = [f"# HELP {PREFIX}ready whether the model answers", f"# TYPE {PREFIX}ready gauge"]
        lines.append(f"{PREFIX}ready {int(state is not None)}")
        if state is not None:
            for kind, names in (("gauge", GAUGES), ("counter", COUNTERS)):
                for field, text in names.items():
                    name = PREFIX + field + "_total" * (kind == "counter")
                    lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
                    lines.append(f"{name} {getattr(state, field)}")
        name = f"{PREFIX}calls_total"
        lines += [f"# HELP {name} completions by HTTP status", f"# TYPE {name} counter"]
        with self._lock:
            lines += [f'{name}{{status="{s}"}} {n}' for s, n in sorted(self._statuses.items())]
            lines += self._first.lines("first_token_seconds", "time to the first token")
            lines += self._whole.lines("call_seconds", "time of a whole call")
        return "\n".join(lines) + "\n"
