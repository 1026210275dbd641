"""The numbers of a run: where they go, and how they are taken (design: training.md 7, 8)."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.monitoring
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from internvlx_jax.core.chips import CHIPS, DEVICE_KINDS
from internvlx_jax.core.disk import named_on_error
from internvlx_jax.core.files import read_json_lines
from internvlx_jax.core.line_log import LineLog
from internvlx_jax.core.paths import is_remote
from internvlx_jax.core.uploads import copy_file
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.pipeline import LoadedStep, StepCounts
from internvlx_jax.models.flops import train_flops
from internvlx_jax.training.setup import Setup
from internvlx_jax.training.step import Metrics
from internvlx_jax.training.store_costs import OTHERS

T = TypeVar("T")

CLOCKS = ("train_s", "compile_s", "checkpoint_s", "evaluation_s")


class MetricsWriter:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard.

    Lines of steps after `start_step` are dropped first, so that a resumed run has each step once,
    however often it was run.
    """

    def __init__(self, run: Path, start_step: int):
        # A run that begins again also repeats its line of step 0.
        first = start_step + 1 if start_step else 0
        self._log = LineLog(run / "metrics.jsonl")
        read_json_lines(run / "metrics.jsonl", "step")  # its error names a line that is none
        self._log.keep(lambda line: json.loads(line)["step"] < first)
        self._scored = {
            row["step"]
            for row in read_json_lines(run / "metrics.jsonl", "step")
            if any(name.startswith("eval/") for name in row)
        }
        self._tensorboard = EventFiles(run / "tensorboard", purge_step=first)

    def has_scores(self, step: int) -> bool:
        """Returns whether the file has scores of this step from an earlier start."""
        return step in self._scored

    def write(self, step: int, values: dict[str, float]) -> None:
        self._log.append([json.dumps({"step": step, **values}).encode() + b"\n"])
        self._tensorboard.write(step, values)

    def flush(self) -> None:
        """Brings everything into an object store; on a disk it is there already."""
        self._log.flush()
        self._tensorboard.flush()

    def close(self) -> None:
        self._log.close()
        self._tensorboard.close()


class EventFiles:
    """Writes TensorBoard event files.

    Events are appended to files, so those of a folder in an object store are written on the disk,
    and each is sent when it is flushed, which begins a new one. They are written here and not in
    the thread of tensorboardX, whose errors would be lost: after one, its queue fills up and the
    run hangs.
    """

    def __init__(self, folder: Path, purge_step: int):
        self._folder = folder
        self._purge_step: int | None = purge_step
        self._scratch = (
            tempfile.TemporaryDirectory(prefix="internvlx-") if is_remote(folder) else None
        )
        self._writer: EventsWriter | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with named_on_error(self._folder):
            if self._writer is None:
                self._writer = self._begun()
            for name, value in values.items():
                self._add(self._writer, step, summary=scalar(name, value))
            self._writer.flush()

    def _begun(self) -> EventsWriter:
        """Begins a file; viewers forget what earlier files hold from `purge_step` on."""
        here = Path(self._scratch.name) if self._scratch else self._folder
        here.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(str(here / "events"))
        if self._purge_step is not None:
            begun = SessionLog(status=SessionLog.START)
            self._add(writer, self._purge_step, file_version="brain.Event:2")
            self._add(writer, self._purge_step, session_log=begun)
            self._purge_step = None
        return writer

    def _add(self, writer: EventsWriter, step: int, **content: Any) -> None:
        writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        """Sends the file of an object store."""
        if self._scratch is None or self._writer is None:
            return
        self._writer.close()
        self._writer = None
        for path in Path(self._scratch.name).iterdir():
            copy_file(path, self._folder / path.name)
            path.unlink()

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            with named_on_error(self._folder):
                self._writer.close()
        if self._scratch is not None:
            self._scratch.cleanup()


class Throughput:
    """Measures rates over the window of a log line, and the clocks of the run.

    Attributes:
        clocks: Seconds of training, and of what does not count as training: compilation,
            checkpoints, evaluation. A resumed run passes those that it has saved.
    """

    def __init__(self, clocks: Mapping[str, float] | None = None) -> None:
        self.clocks = dict.fromkeys(CLOCKS, 0.0) | dict(clocks or {})
        self.start()

    def start(self) -> None:
        """Begins a window here."""
        self._start = self._last = time.perf_counter()
        self._paused, self._waiting = 0.0, 0.0
        self._steps, self._totals = 0, StepCounts(*[0] * len(StepCounts._fields))
        self._step_ms: list[float] = []

    def waited(self, steps: Iterable[T]) -> Iterator[T]:
        """Yields the same steps; the time until each one comes counts as waiting for data."""
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
        """Counts what a step contains."""
        self._steps += 1
        self._totals = StepCounts(*map(sum, zip(self._totals, counts, strict=True)))

    def wait(self, in_flight: deque[jax.Array], leave: int) -> None:
        """Blocks until all but `leave` of the steps on the devices are done.

        Bounds how many batches wait in device memory, and times the steps, while the devices always
        have the next one.

        Args:
            in_flight: One result of each step, the oldest first; finished ones are removed.
            leave: How many steps may still be running.
        """
        while len(in_flight) > leave:
            jax.block_until_ready(in_flight.popleft())
            now = time.perf_counter()
            self._step_ms.append(1000 * (now - self._last))
            self._last = now

    @contextmanager
    def paused(self, clock: str) -> Iterator[None]:
        """Counts the time inside to another clock, such as "evaluation_s"."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.clocks[clock] += seconds
        self._paused += seconds
        self._last += seconds

    def take(self) -> dict[str, float]:
        """Ends the window and begins the next one.

        Returns:
            Per second: token slots, real tokens, supervised tokens, real tiles, images, samples.
            Seconds per step, and percentiles of the milliseconds per step. Shares of slots that are
            real, of tokens and tiles. Rows without a sample. The share of the time that steps
            waited for data. The clocks of the run.
        """
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
    """Counts the programs that XLA has compiled, or found in its cache, for this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, *_: Any, **__: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


COMPILATIONS = Compilations()  # jax keeps listeners for good, so there is one per process


def hbm_peak_gib() -> dict[str, float]:
    """Returns {"hbm_peak_gib": ...} of this process's fullest device, if the platform tells."""
    peaks: list[Any] = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    return {"hbm_peak_gib": max(peaks) / 2**30} if peaks and None not in peaks else {}


def over_processes(
    values: Mapping[str, float], sums: np.ndarray
) -> tuple[dict[str, float], np.ndarray]:
    """Returns the largest of each value, and the sum of the counts, over all processes."""
    every, counts = multihost_utils.process_allgather(
        (np.array(list(values.values()), np.float32), sums.astype(np.int32))
    )
    largest = dict(zip(values, np.max(every, axis=0).tolist(), strict=True))
    return largest, np.sum(counts, axis=0)


def with_others(counts: Mapping[str, int]) -> dict[str, float]:
    """Returns the counts of process 0 and, if there are others, the largest of theirs."""
    if jax.process_count() == 1:
        return dict(counts)
    every = multihost_utils.process_allgather(np.array(list(counts.values()), np.float32))
    first, others = every[0].tolist(), every[1:].max(axis=0).tolist()
    largest = {name + OTHERS: value for name, value in zip(counts, others, strict=True)}
    return dict(zip(counts, first, strict=True)) | largest


def window_means(window: Sequence[Metrics], datasets: Sequence[str]) -> dict[str, float]:
    """Aggregates the applied steps of a window.

    Returns:
        Token-weighted loss, overall and per dataset with tokens in the window; mean norms; the
        latest learning rate. Only the learning rate if no step was applied.
    """
    rate = {"learning_rate": float(window[-1].learning_rate)}
    window = [metrics for metrics in window if metrics.applied]
    if not window:
        return rate

    def mean(name: str) -> float:
        return float(np.mean([getattr(metrics, name) for metrics in window]))

    sums, parts = (
        np.asarray([getattr(metrics, name) for metrics in window], np.float64).sum(axis=0)
        for name in ("loss_sums", "weight_sums")
    )
    return {
        "loss": float(sums.sum() / parts.sum()),
        **{
            f"loss_by_dataset/{name}": float(total / part)
            for name, total, part in zip(datasets, sums, parts, strict=True)
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
    """Returns one line for people."""
    remaining = int((steps - step) * values["step_s"])
    return (
        f"step {step}/{steps}  loss {values.get('loss', math.nan):.4f}  "
        f"lr {values['learning_rate']:.2e}  grad {values.get('grad_norm', math.nan):.2f}  "
        f"{values['useful_tokens_per_s']:,.0f} tokens/s  {values['images_per_s']:.1f} images/s  "
        f"eta {remaining // 60}:{remaining % 60:02d}"
    )


def peak_flops(stated_tflops: float | None) -> float | None:
    """Returns the bfloat16 FLOP/s of one device, or None for an unknown kind.

    Args:
        stated_tflops: `compute.peak_tflops`, which comes before what is known of the kind.
    """
    if stated_tflops is not None:
        return stated_tflops * 1e12
    kind = DEVICE_KINDS.get(jax.devices()[0].device_kind)
    return CHIPS[kind].peak_flops if kind else None


class Utilization:
    """Counts the model FLOPs of a window, by the project's own count (design: training.md 8).

    It counts all slots as they are computed, and real tokens and tiles alone.
    """

    def __init__(self, setup: Setup, peak: float | None):
        """Takes the model and devices of `setup`; `peak` is FLOP/s of a device, if known."""
        self._model, self._devices = setup.model, setup.mesh.size
        self._trained = {path: leaf.shape for path, leaf in setup.partition.trained.items()}
        self._saved_per_tile = setup.model.lvtc.saved_per_tile if setup.model.lvtc else 0
        self._peak = peak
        self._padded = self._useful = 0.0
        self._bucket_flops = cache(self._count_bucket)

    def add(self, loaded: LoadedStep) -> None:
        """Counts the FLOPs of a step."""
        if self._peak is None:
            return
        self._padded += self._bucket_flops(
            loaded.bucket, loaded.counts.slots // loaded.bucket.length
        )
        lengths, tiles = loaded.shapes[:, 0], loaded.shapes[:, 1]
        short_lengths = lengths - tiles * self._saved_per_tile
        self._useful += train_flops(
            self._model,
            self._trained,
            tiles=int(tiles.sum()),
            lengths=lengths.tolist(),
            short_lengths=short_lengths.tolist(),
        ).total

    def _count_bucket(self, bucket: Bucket, rows: int) -> float:
        return train_flops(
            self._model,
            self._trained,
            tiles=rows * bucket.tiles,
            lengths=[bucket.length] * rows,
            short_lengths=[bucket.short_length] * rows,
        ).total

    def take(self, seconds: float) -> dict[str, float]:
        """Returns shares of the peak over `seconds`, and begins anew; empty for an unknown peak."""
        if self._peak is None:
            return {}
        possible = self._peak * self._devices * seconds
        shares = {"mfu_padded": self._padded / possible, "mfu_useful": self._useful / possible}
        self._padded = self._useful = 0.0
        return shares
