"""The log of a run: metrics per window of steps, a line per start (design: training.md 6, 7)."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import read_json_lines
from internvlx_jax.core.line_log import LineLog
from internvlx_jax.core.paths import is_remote
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.pipeline import LoadedStep
from internvlx_jax.training.bad_steps import KINDS, BadSteps, NonFiniteError
from internvlx_jax.training.metrics import (
    COMPILATIONS,
    MetricsWriter,
    Throughput,
    Utilization,
    hbm_peak_gib,
    over_processes,
    peak_flops,
    progress_line,
    window_means,
    with_others,
)
from internvlx_jax.training.optimizer import group_rate
from internvlx_jax.training.run import Run
from internvlx_jax.training.step import Metrics
from internvlx_jax.training.store_costs import StoreMeter, totals

logger = logging.getLogger(__name__)

STARTS = "starts.jsonl"  # in the run folder
LIBRARIES = (
    "internvlx-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
)


class MetricsLogger:
    """Collects the metrics of steps on the devices, and reads them when a line is due.

    Every process does the same and decides alike; the first one writes. Close it, or use `with`.

    Attributes:
        latest: Newest value of every metric.
    """

    def __init__(self, run: Run, throughput: Throughput, first: int, *, executables: int):
        """Opens the log files of a run.

        Args:
            run: The run.
            throughput: Its clocks, which the loop drives.
            first: Steps that are done; what the files say of later ones is dropped.
            executables: How many programs there are of the train step.
        """
        writes = jax.process_index() == 0
        self._run, self._throughput, self._executables = run, throughput, executables
        self._writer = MetricsWriter(run.folder, first) if writes else None
        self._bad_steps = BadSteps(
            run.folder,
            first,
            run.config.stability,
            planned_ids=run.loader.planned_ids,
            writes=writes,
        )
        peak = peak_flops(run.config.compute.peak_tflops)
        self._utilization = Utilization(run.setup, peak)
        self._datasets = [entry.name for entry in run.loader.entries]
        self._window: list[tuple[int, Bucket, Metrics]] = []
        self._in_store = is_remote(run.folder)
        self._store = StoreMeter()
        self.latest: dict[str, float] = {}

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # On a full disk, the error that ends the run says more than those of its last lines.
        with contextlib.suppress(*(() if kind is None else (OSError,))):
            if self._writer:
                self._writer.close()
            self._bad_steps.flush()

    def flush(self) -> None:
        """Brings what an object store has not got yet there; called before a checkpoint."""
        if self._writer:
            self._writer.flush()
        self._bad_steps.flush()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes values of all processes, by the first one."""
        self.latest.update(values)
        if self._writer:
            self._writer.write(step, values)

    def has_scores(self, step: int) -> bool:
        """Returns whether an earlier start has scored this step; all processes call it together."""
        found = self._writer is not None and self._writer.has_scores(step)
        return bool(multihost_utils.broadcast_one_to_all(np.array(found)))

    def add(self, step: int, loaded: LoadedStep, metrics: Metrics) -> None:
        """Takes a step (from 1) into the window; its metrics stay on the devices."""
        self._window.append((step, loaded.bucket, metrics))
        self._throughput.add(loaded.counts)
        self._utilization.add(loaded)

    def log(self, step: int) -> Exception | None:
        """Writes a line about the window and begins a new one; all processes call it together.

        Returns:
            Why the run has to stop, if it has to.
        """
        seen = [(number, bucket, jax.device_get(each)) for number, bucket, each in self._window]
        self._window.clear()
        for line in self._bad_steps.look(seen):
            if self._writer:
                logger.warning(line)
        values = window_means([metrics for *_, metrics in seen], self._datasets)
        values |= self._group_rates(values["learning_rate"]) | self._throughput.take()
        values |= self._utilization.take(len(seen) * values["step_s"])
        fetched = self._run.loader.fetched
        images = [[fetched.hits, fetched.misses], [fetched.bytes >> 20, 0]]
        largest, counts = over_processes(
            {"data_wait_share": values["data_wait_share"]} | hbm_peak_gib(),
            np.concatenate([self._run.loader.faults.totals(), images]),
        )
        faults, images = counts[:-2], counts[-2:]
        values |= largest | {f"{kind}_steps": self._bad_steps.counts[kind] for kind in KINDS}
        values |= {
            "bad_samples": int(faults[:, 1].sum()),
            "executables": self._executables,
            "compile_count": COMPILATIONS.count,
        }
        if images.any():
            names = ("image_cache_hits", "images_fetched", "images_fetched_mib")
            values |= dict(zip(names, images.ravel().tolist(), strict=False))
        if self._in_store:
            values |= with_others(self._store.take())
        logger.info(progress_line(step, self._run.steps, values))
        self.record(step, values)
        try:
            self._run.loader.faults.judge(faults)
        except ConfigError as error:
            return error
        verdict = self._bad_steps.verdict()
        return NonFiniteError(verdict) if verdict else None

    def _group_rates(self, learning_rate: float) -> dict[str, float]:
        optimizer = self._run.config.optimizer
        return {
            f"learning_rate/{group.params}": learning_rate * group_rate(optimizer, group)
            for group in optimizer.groups
        }


def record_start(run: Run, step: int) -> None:
    """Adds a line to RUN/starts.jsonl: what this start runs on and with (design: training.md 10).

    Args:
        run: The run.
        step: Steps that are done.
    """
    costs = with_others(totals()) if is_remote(run.folder) else {}
    if jax.process_index() != 0:
        return
    start = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "mesh": dict(run.mesh.shape),
        "buckets": [
            {**dataclasses.asdict(bucket), "rows": rows}
            for bucket, rows in zip(run.loader.plan.buckets, run.loader.plan.rows, strict=True)
        ],
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "git": _git_state(),
        **costs,
    }
    log = LineLog(run.folder / STARTS)
    log.append([json.dumps(start).encode() + b"\n"])
    log.close()


def read_starts(run: Path) -> list[dict[str, Any]]:
    """Returns the starts of a run folder in order; none for a run without the file."""
    return read_json_lines(run / STARTS, "step", "time")


def _git_state() -> str | None:
    """Returns the commit of this package's checkout, "-dirty" if it is changed, if it is in one."""
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *describe],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
