"""Times and memory of a table's rows, for benchmarks/ablation.py.

Each row runs the steps that its training runs: every bucket of its plan, weighted by how often it
occurs. All rows are timed in one process, in turn, round after round, so that a change in the
machine's speed meets all of them; the best round counts. Times are ratios to the baseline.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ablation_tables import Table
from flax import nnx

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.core.json_text import read_json_object
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.models.generation import prefill
from internvlx_jax.models.params import unflatten
from internvlx_jax.training.data import to_devices
from internvlx_jax.training.executables import compile_train_step, peak_bytes
from internvlx_jax.training.run import Run, first_params, new_state, open_run
from internvlx_jax.training.step import TrainState

STEPS = 200  # of the plan, to count how often each bucket occurs


@dataclasses.dataclass
class Job:
    """Holds a compiled program of a row; running it may replace what it runs on.

    Attributes:
        row: Of the table.
        share: How often its bucket occurs.
        run: Runs it once and returns what to wait for.
        peak: Bytes that it needs; None for prefill.
        best: Seconds of the fastest round.
    """

    row: str
    step: str
    share: float
    run: Callable[[], Any]
    peak: int | None
    best: float = float("inf")


def measure(
    table: Table, results: Path, *, variants: Sequence[str] | None, rounds: int
) -> dict[str, Any]:
    """Measures rows and keeps the result.

    Args:
        table: Whose rows; what they need besides weights is made, or found.
        results: Folder of finished cells.
        variants: Rows besides the baseline; None is all.
        rounds: Rounds of timing; none measures memory only and keeps the times.

    Returns:
        What was kept.

    Raises:
        ConfigError: The times that stay are those of other devices.
    """
    file = results / f"{table.name}-{table.preset}" / "measured.json"
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    kept = {} if rounds else read_json_object(file)
    if kept and kept["device"] != device:
        raise ConfigError(
            f"{file} has times of {kept['device']}, here is {device}; delete it or give --rounds"
        )
    table.prepare()
    chosen = {table.baseline, *(variants or table.variants)}
    measured = [row for row in table.variants if row in chosen]
    jobs = []
    for row in measured:
        config = table.timed(table.cell(row, table.seeds[0]))
        # Apart from the cell's run, which may have rows for another number of devices.
        config = dataclasses.replace(config, output_dir=f"{config.output_dir}-measured")
        jobs += _jobs(row, config, timed=rounds > 0)
        print(f"{row}: compiled", flush=True)
    for number in range(rounds):
        for job in jobs:
            started = time.perf_counter()
            jax.block_until_ready(job.run())
            job.best = min(job.best, time.perf_counter() - started)
        print(f"round {number + 1} of {rounds}", flush=True)
    kept = kept or {
        "baseline": table.baseline,
        "rounds": rounds,
        "device": device,
        "software": {"jax": jax.__version__, "python": platform.python_version()},
        "rows": {},
    }
    for row in measured:
        kept["rows"][row] = kept["rows"].get(row, {}) | _row(row, jobs, table.baseline, rounds)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, kept)
    return kept


def _row(row: str, jobs: list[Job], baseline: str, rounds: int) -> dict[str, float]:
    peak = max(job.peak for job in jobs if job.row == row and job.peak is not None)
    found = {"peak_mib": round(peak / 2**20, 1)}
    if not rounds:
        return found

    def seconds(row: str, step: str) -> float:
        return sum(job.share * job.best for job in jobs if (job.row, job.step) == (row, step))

    for step in ("train", "prefill"):
        found[step] = round(seconds(row, step) / seconds(baseline, step), 4)
    return found


def _jobs(row: str, config: TrainConfig, *, timed: bool) -> list[Job]:
    """Compiles the train step of each bucket of a run, and prefill if that is timed."""
    run = open_run(config)
    planned = [run.loader.plan.step(number) for number in range(STEPS)]
    counts = Counter(step.bucket for step in planned)
    first = {step.bucket: step for step in reversed(planned)}
    params, jobs = first_params(run), []
    for bucket, count in counts.items():
        batch = to_devices(run.loader.load(first[bucket]), run.mesh)
        jobs.append(_train_job(row, run, bucket, count / STEPS, batch))
        if timed:
            jobs.append(_prefill_job(row, run, count / STEPS, params, batch))
    return jobs


def _train_job(row: str, run: Run, bucket: Bucket, share: float, batch: Any) -> Job:
    rows = run.loader.plan.rows[run.loader.plan.buckets.index(bucket)]
    program = compile_train_step(run.setup, bucket, rows)
    state = new_state(run, first_params(run))  # the program gives its memory away

    def once() -> TrainState:
        nonlocal state
        state, _ = program(state, batch)
        return state

    return Job(row, "train", share, once, peak_bytes(program))


def _prefill_job(row: str, run: Run, share: float, params: Any, batch: Any) -> Job:
    graphdef = run.setup.abstract.graphdef

    @jax.jit
    def program(params: Any, inputs: Any) -> Any:
        return prefill(nnx.merge(graphdef, unflatten(params)), inputs, 1)

    jax.block_until_ready(program(params, batch.inputs))  # compiles
    return Job(row, "prefill", share, lambda: program(params, batch.inputs), None)
