"""Bad steps: written down with their samples, and when they stop a run (design: training.md 4, 6).

The step itself skips the update, on the devices (training/step.py). The host looks at its metrics
when it reads a window of them, so a run stops at most `log_every` steps after the limit; the bad
ones among these are skipped as well.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.files import read_json_lines
from internvlx_jax.core.json_text import decode_json, encode_line
from internvlx_jax.core.line_log import LineLog
from internvlx_jax.core.run_config import StabilityConfig
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.training.step import Metrics

FILE = "bad_steps.jsonl"  # in the run folder
KINDS = ("nonfinite", "unsupervised", "spike")
MEDIAN_OVER = 100  # losses that a spike is held against
MEDIAN_FROM = 20  # losses seen before there can be a spike
SPREADS = 6  # robust standard deviations that a spike lies above the median, of the logarithms
TINY, LARGEST_LOG = 1e-12, 700.0  # what keeps logarithms of losses, and their way back, finite
DEVIATION = 1.4826  # standard deviations in a median absolute deviation, of normal numbers


class NonFiniteError(RuntimeError):
    """Too many steps had a loss or gradient that is not finite; the run has been saved."""


class BadSteps:
    """Counts and records non-finite steps, steps with nothing supervised, and loss spikes.

    Every process looks at the same numbers and decides alike; the first one writes.

    Attributes:
        counts: Steps of the whole run per kind: "nonfinite", "unsupervised", "spike".
    """

    def __init__(
        self,
        run: Path,
        first: int,
        config: StabilityConfig,
        *,
        planned_ids: Callable[[int], list[list[str]]],
        writes: bool,
    ):
        """Goes on from the record of an earlier start; only the running median begins anew.

        Args:
            run: Run folder.
            first: Steps that are done; records of later ones are dropped.
            config: The limits.
            planned_ids: Maps a step (from 0) to the samples of each row.
            writes: Whether this process writes the record.
        """
        self._path, self._config = run / FILE, config
        self._planned_ids, self._writes = planned_ids, writes
        kept = [line for line in read_bad_steps(run) if line["step"] <= first]
        self.counts = Counter(line["kind"] for line in kept)
        self._consecutive = 0
        self._losses: deque[float] = deque(maxlen=MEDIAN_OVER)
        self._log = LineLog(self._path)
        if writes and self._path.exists():
            self._log.keep(lambda line: decode_json(line)["step"] <= first)

    def look(self, window: Sequence[tuple[int, Bucket, Metrics]]) -> list[str]:
        """Records the bad ones among some steps.

        Args:
            window: Per step: its number from 1, its bucket, its metrics on the host.

        Returns:
            A message per bad step.
        """
        messages = []
        for step, bucket, metrics in window:
            found = self._judge(metrics)
            if found:
                kind, words = found
                self.counts[kind] += 1
                self._write(step, kind, bucket, metrics)
                messages.append(f"step {step}: {words}; samples in {FILE}")
        return messages

    def _judge(self, metrics: Metrics) -> tuple[str, str] | None:
        """Returns the kind of a bad step and words for it; counts every step."""
        loss = float(metrics.loss)
        finite = math.isfinite(loss) and math.isfinite(metrics.grad_norm)
        self._consecutive = 0 if finite else self._consecutive + 1
        if not finite:
            return "nonfinite", "loss or gradient norm is not finite, update skipped"
        if not metrics.applied:
            return "unsupervised", "nothing is supervised, update skipped"
        earlier = list(self._losses)
        self._losses.append(loss)
        if len(earlier) < MEDIAN_FROM:
            return None
        median, factor = statistics.median(earlier), self._config.spike_factor
        if loss <= factor * median or loss <= usual_bound(earlier):
            return None
        return "spike", f"loss {loss:.4f} is over {factor:g} x the median {median:.4f}"

    def verdict(self) -> str | None:
        """Returns why the run has to stop, if it has to."""
        limits = self._config
        if self._consecutive >= limits.max_consecutive_nonfinite:
            broken = (
                f"{self._consecutive} steps in a row (max_consecutive_nonfinite = "
                f"{limits.max_consecutive_nonfinite})"
            )
        elif self.counts["nonfinite"] >= limits.max_total_nonfinite:
            broken = (
                f"{self.counts['nonfinite']} steps in all (max_total_nonfinite = "
                f"{limits.max_total_nonfinite})"
            )
        else:
            return None
        return (
            f"loss or gradient norm was not finite in {broken}. The run is saved; {self._path} "
            "names the samples, and `internvlx replay` runs one of the steps again"
        )

    def _write(self, step: int, kind: str, bucket: Bucket, metrics: Metrics) -> None:
        if not self._writes:
            return
        norms = {"all": metrics.grad_norm, **metrics.grad_norms}
        line = {
            "step": step,
            "kind": kind,
            "loss": number(metrics.loss),
            "grad_norm": {name: number(norm) for name, norm in norms.items()},
            "bucket": {
                "tiles": bucket.tiles,
                "length": bucket.length,
                "short_length": bucket.short_length,
            },
            "samples": self._planned_ids(step - 1),
        }
        self._log.append([encode_line(line)])

    def flush(self) -> None:
        """Brings the record into an object store; on a disk it is there already."""
        self._log.flush()


def usual_bound(losses: Sequence[float]) -> float:
    """Returns the loss above which none is to be expected: SPREADS deviations over the median.

    The scale is logarithmic. Batches of few answers have losses that differ by factors once most
    answers are right, so that a multiple of the median alone calls ordinary ones spikes; losses
    that hardly vary leave the multiple to decide.
    """
    logs = [math.log(max(loss, TINY)) for loss in losses]
    middle = statistics.median(logs)
    spread = DEVIATION * statistics.median(abs(value - middle) for value in logs)
    return math.exp(min(middle + SPREADS * spread, LARGEST_LOG))


def read_bad_steps(run: Path) -> list[dict[str, Any]]:
    """Returns the record of a run folder; raises ConfigError for a line that cannot be read."""
    return read_json_lines(run / FILE, "step", "kind", "samples")


def number(value: Any) -> float | str:
    """Returns a float, or "nan" or "inf", for which JSON has no numbers."""
    return float(value) if math.isfinite(value) else str(float(value))
