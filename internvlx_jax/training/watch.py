"""Watching a run: a window of steps becomes a line of metrics, and may end the run (design: training.md 6, 7)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.pipeline import LoadedStep, Loader
from internvlx_jax.data.plan import Bucket
from internvlx_jax.training.bad_steps import KINDS, BadSteps, NonFiniteError
from internvlx_jax.training.metrics import (
    COMPILATIONS,
    MetricsWriter,
    Throughput,
    hbm_peak_gib,
    over_processes,
    progress_line,
    window_means,
)
from internvlx_jax.training.mfu import Utilization
from internvlx_jax.training.optimizer import group_rate
from internvlx_jax.training.step import Metrics

IN_FLIGHT = 2  # steps that the host may be ahead of the devices


class Watch:
    """Takes the metrics of every step as they are on the devices, and reads them when a line is due.

    first, steps: steps done at this start, and of the whole run. executables: how many there are of the step. speak:
    prints, on one process. Close it (or use `with`).

    Attributes:
        latest: the newest value of every metric.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        loader: Loader,
        throughput: Throughput,
        *,
        first: int,
        steps: int,
        executables: int,
        utilization: Utilization,
        speak: Callable[..., None],
    ):
        alone = jax.process_index() == 0
        self._writer = MetricsWriter(run, first) if alone else None
        self._bad_steps = BadSteps(
            run, first, config.stability, planned_ids=loader.planned_ids, writes=alone
        )
        self._loader, self._throughput, self._speak = loader, throughput, speak
        self._steps, self._executables, self._utilization = steps, executables, utilization
        self._optimizer = config.optimizer
        self._datasets = [entry.name for entry in loader.entries]
        self._window: list[tuple[int, Bucket, Metrics]] = []
        self._in_flight: deque[jax.Array] = deque()
        self.latest: dict[str, float] = {}

    def __enter__(self) -> Watch:
        self._throughput.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer:
            self._writer.close()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Of all processes; the first one writes."""
        self.latest.update(values)
        if self._writer:
            self._writer.write(step, values)

    def add(self, step: int, loaded: LoadedStep, metrics: Metrics) -> None:
        """step: from 1. Waits until the devices are only a few steps behind; nothing is copied from them."""
        self._window.append((step, loaded.bucket, metrics))
        self._in_flight.append(metrics.loss)
        self._throughput.add(loaded.counts)
        self._utilization.add(loaded)
        self._throughput.wait(self._in_flight, leave=IN_FLIGHT)

    def log(self, step: int) -> Exception | None:
        """A line about the steps since the last one, by all processes together -> why the run has to end, if so."""
        self._throughput.wait(self._in_flight, leave=0)
        seen = [
            (number, bucket, jax.device_get(metrics)) for number, bucket, metrics in self._window
        ]
        self._window.clear()
        for line in self._bad_steps.look(seen):
            self._speak(line)
        values = (
            window_means([metrics for *_, metrics in seen], self._datasets)
            | self._throughput.take()
        )
        values |= {
            f"learning_rate/{group.params}": values["learning_rate"]
            * group_rate(self._optimizer, group)
            for group in self._optimizer.groups
        }
        values |= self._utilization.take(len(seen) * values["step_s"])
        largest, faults = over_processes(
            {"data_wait_share": values["data_wait_share"]} | hbm_peak_gib(),
            self._loader.faults.totals(),
        )
        values |= largest | {f"{kind}_steps": self._bad_steps.counts[kind] for kind in KINDS}
        values |= {
            "bad_samples": int(faults[:, 1].sum()),
            "executables": self._executables,
            "compile_count": COMPILATIONS.count,
        }
        self._speak(progress_line(step, self._steps, values))
        self.record(step, values)
        try:
            self._loader.faults.judge(faults)
        except ConfigError as error:
            return error
        verdict = self._bad_steps.verdict()
        return NonFiniteError(verdict) if verdict else None
