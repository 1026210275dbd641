"""Where a run's numbers go: a progress line, metrics.jsonl and TensorBoard events (spec: training.md 7)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from tensorboardX import SummaryWriter

from internvlx_jax.data.pipeline import StepCounts
from internvlx_jax.files import write_text
from internvlx_jax.training.step import Metrics

T = TypeVar("T")


class MetricsWriter:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard. On resume, lines behind `start_step` are dropped first, so
    that a step is written once however often it was run."""

    def __init__(self, run: Path, start_step: int):
        self._path = run / "metrics.jsonl"
        first = start_step + 1 if start_step else 0  # a run that begins again also repeats its line of step 0
        kept = []
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first]
        write_text(self._path, "".join(kept))
        self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def write(self, step: int, values: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def close(self) -> None:
        self._tensorboard.close()


class Throughput:
    """Rates over the log window. Time spent in compilation, evaluation and saving is taken out with `pause`."""

    def __init__(self) -> None:
        self._reset()

    def waited(self, steps: Iterable[T]) -> Iterator[T]:
        """The same steps; the time until each one comes counts as waiting for data."""
        iterator = iter(steps)
        while True:
            started = time.perf_counter()
            try:
                step = next(iterator)
            except StopIteration:
                return
            self._waiting += time.perf_counter() - started
            yield step

    def add(self, counts: StepCounts) -> None:
        self._steps += 1
        self._totals = StepCounts(*map(sum, zip(self._totals, counts)))

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def take(self) -> dict[str, float]:
        """Rates since the last call: real tokens, tiles and images a second, seconds a step, shares of real tokens and
        tiles, rows without a sample, share of the time that the step waited for data."""
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        rates = {
            "tokens_per_s": self._totals.tokens / seconds,
            "tiles_per_s": self._totals.tiles / seconds,
            "images_per_s": self._totals.images / seconds,
            "step_s": seconds / max(self._steps, 1),
            "token_fill": self._totals.tokens / max(self._totals.slots, 1),
            "tile_fill": self._totals.tiles / max(self._totals.tile_slots, 1),
            "masked_rows": self._totals.masked_rows,
            "data_wait_share": min(1.0, self._waiting / seconds),
        }
        self._reset()
        return rates

    def _reset(self) -> None:
        self._start, self._paused, self._waiting = time.perf_counter(), 0.0, 0.0
        self._steps, self._totals = 0, StepCounts(*[0] * len(StepCounts._fields))


def window_means(window: Sequence[Metrics]) -> dict[str, float]:
    """Mean loss and gradient norm over the steps since the last line; the learning rate is that of the last step."""
    means = {name: float(np.mean([getattr(metrics, name) for metrics in window])) for name in ("loss", "grad_norm")}
    return means | {"learning_rate": float(window[-1].learning_rate)}


def progress_line(step: int, steps: int, values: dict[str, float]) -> str:
    """One line for people."""
    remaining = int((steps - step) * values["step_s"])
    return (f"step {step}/{steps}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"grad {values['grad_norm']:.2f}  {values['tokens_per_s']:,.0f} tokens/s  "
            f"{values['images_per_s']:.1f} images/s  eta {remaining // 60}:{remaining % 60:02d}")
