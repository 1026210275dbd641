"""Where a run's numbers go: a progress line, metrics.jsonl and TensorBoard events (design: training.md 7)."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.monitoring
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter

from internvlx_jax.core.files import write_text
from internvlx_jax.data.pipeline import StepCounts
from internvlx_jax.training.step import Metrics

T = TypeVar("T")

CLOCKS = ("train_s", "compile_s", "checkpoint_s", "evaluation_s")


class MetricsWriter:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard. On resume, lines behind `start_step` are dropped first, so
    that a step is written once however often it was run."""

    def __init__(self, run: Path, start_step: int):
        self._path = run / "metrics.jsonl"
        first = (
            start_step + 1 if start_step else 0
        )  # a run that begins again also repeats its line of step 0
        kept = []
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [
                line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first
            ]
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
    """Rates over the log window, and the clocks of the run.

    clocks: those of the run until now, when it is resumed. Attributes:
        clocks: seconds of training, and of what is not counted as training: compilation, checkpoints, evaluation.
    """

    def __init__(self, clocks: Mapping[str, float] | None = None) -> None:
        self.clocks = dict.fromkeys(CLOCKS, 0.0) | dict(clocks or {})
        self.start()

    def start(self) -> None:
        """Begin a window here."""
        self._start = self._last = time.perf_counter()
        self._paused, self._waiting = 0.0, 0.0
        self._steps, self._totals = 0, StepCounts(*[0] * len(StepCounts._fields))
        self._step_ms: list[float] = []

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

    def wait(self, in_flight: deque[jax.Array], leave: int) -> None:
        """Until at most `leave` of the steps that are on the devices are not done: one result of each, the oldest first.

        Bounds how many batches wait in device memory, and tells how long a step takes, while the devices always have the
        next one.
        """
        while len(in_flight) > leave:
            jax.block_until_ready(in_flight.popleft())
            now = time.perf_counter()
            self._step_ms.append(1000 * (now - self._last))
            self._last = now

    @contextmanager
    def paused(self, clock: str) -> Iterator[None]:
        """Time that belongs to another clock, such as "evaluation_s"."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.clocks[clock] += seconds
        self._paused += seconds
        self._last += seconds

    def take(self) -> dict[str, float]:
        """Rates since the last call; token slots a second, real and supervised ones; real tiles, images and samples;
        seconds a step, and milliseconds as they come; shares of real tokens and tiles; rows without a sample; share of the
        time that the step waited for data; the clocks."""
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        self.clocks["train_s"] += seconds
        totals = self._totals
        rates = {
            "tokens_per_s": totals.slots / seconds,
            "useful_tokens_per_s": totals.tokens / seconds,
            "supervised_tokens_per_s": totals.supervised / seconds,
            "tiles_per_s": totals.tiles / seconds,
            "images_per_s": totals.images / seconds,
            "samples_per_s": totals.samples / seconds,
            "step_s": seconds / max(self._steps, 1),
            "token_fill": totals.tokens / max(totals.slots, 1),
            "tile_fill": totals.tiles / max(totals.tile_slots, 1),
            "masked_rows": totals.masked_rows,
            "data_wait_share": min(1.0, self._waiting / seconds),
        }
        if self._step_ms:
            rates |= {f"step_ms_p{p}": float(np.percentile(self._step_ms, p)) for p in (50, 95)}
        self.start()
        return rates | self.clocks


class Compilations:
    """How many programs XLA has compiled, or found in the persistent cache, for this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, *_: Any, **__: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


COMPILATIONS = Compilations()  # one listener a process


def hbm_peak_gib() -> dict[str, float]:
    """{"hbm_peak_gib": of the fullest device of this process}; empty where the platform does not tell."""
    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    return {"hbm_peak_gib": max(peaks) / 2**30} if peaks and None not in peaks else {}


def over_processes(
    values: Mapping[str, float], sums: np.ndarray
) -> tuple[dict[str, float], np.ndarray]:
    """The largest of each value, and the sum of the counts, over all processes."""
    every, counts = multihost_utils.process_allgather(
        (np.array(list(values.values()), np.float32), sums.astype(np.int32))
    )
    return dict(zip(values, np.max(every, axis=0).tolist())), np.sum(counts, axis=0)


def window_means(window: Sequence[Metrics], datasets: Sequence[str]) -> dict[str, float]:
    """Of the steps since the last line that made an update: the loss of all their tokens together, and of each dataset
    that had some; mean norms, and the last learning rate. Without such a step, only the learning rate."""
    rate = {"learning_rate": float(window[-1].learning_rate)}
    window = [metrics for metrics in window if metrics.applied]
    if not window:
        return rate

    def mean(name: str) -> float:
        return float(np.mean([getattr(metrics, name) for metrics in window]))

    sums, parts = (
        np.sum([getattr(metrics, name) for metrics in window], axis=0, dtype=np.float64)
        for name in ("loss_sums", "weight_sums")
    )
    return {
        "loss": float(sums.sum() / parts.sum()),
        **{
            f"loss_by_dataset/{name}": float(total / part)
            for name, total, part in zip(datasets, sums, parts)
            if part > 0
        },
        "grad_norm": mean("grad_norm"),
        **{
            f"grad_norm/{module}": float(
                np.mean([metrics.grad_norms[module] for metrics in window])
            )
            for module in window[-1].grad_norms
        },
        "param_norm": float(window[-1].param_norm),
        "update_ratio": mean("update_norm") / float(window[-1].param_norm),
        **rate,
    }


def progress_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """One line for people."""
    remaining = int((steps - step) * values["step_s"])
    return (
        f"step {step}/{steps}  loss {values.get('loss', math.nan):.4f}  lr {values['learning_rate']:.2e}  "
        f"grad {values.get('grad_norm', math.nan):.2f}  {values['useful_tokens_per_s']:,.0f} tokens/s  "
        f"{values['images_per_s']:.1f} images/s  eta {remaining // 60}:{remaining % 60:02d}"
    )
