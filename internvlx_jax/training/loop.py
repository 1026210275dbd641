"""The training loop, top to bottom (design: training.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import deque
from collections.abc import Generator, Mapping

import jax

from internvlx_jax.checkpoints.run_lock import RunLock
from internvlx_jax.checkpoints.run_writer import (
    CheckpointWriter,
    changed_data,
    check_run_folder,
    write_run_folder,
)
from internvlx_jax.checkpoints.staging import CheckpointCopies
from internvlx_jax.core.disk import check_space, check_writable
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.paths import is_remote
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.batch import Batch
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.pipeline import LoadedStep
from internvlx_jax.models.compile_cache import keep_compiled
from internvlx_jax.training.data import to_devices
from internvlx_jax.training.executables import compile_train_steps
from internvlx_jax.training.metrics import Throughput
from internvlx_jax.training.metrics_logger import MetricsLogger, record_start
from internvlx_jax.training.preemption import Preempted, Preemption
from internvlx_jax.training.profiler import Profiler, Window
from internvlx_jax.training.run import QUARANTINE, Run, first_state, open_run, run_folder
from internvlx_jax.training.step import TrainState
from internvlx_jax.training.validation import BenchmarksFactory, Validation, check_benchmarks

logger = logging.getLogger(__name__)

IN_FLIGHT = 2  # steps that the host may be ahead of the devices
SMALLEST_SHARE = 0.7  # of its arrays, that a compressed checkpoint takes at least


def train(
    config: TrainConfig,
    *,
    stop_after: int | None = None,
    profile: Window | None = None,
    benchmarks: BenchmarksFactory | None = None,
) -> dict[str, float]:
    """Runs, or resumes, the run in `config.output_dir`.

    Args:
        config: The run.
        stop_after: Stops after this many steps of this call, with a checkpoint; the same call goes
            on from there.
        profile: Steps to trace, to profile/ of the run folder.
        benchmarks: Prepares the benchmarks of `config.evaluation`.

    Returns:
        The newest value of every metric, those of the last validation included.

    Raises:
        ConfigError, CheckpointError, SampleError: The input cannot be used.
        Preempted: SIGTERM or Ctrl-C was received; the run has been saved.
        NonFiniteError: Too many steps were not finite; the run has been saved.
    """
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"stop_after is {stop_after}, it must be at least 1")
    check_benchmarks(config, benchmarks)
    keep_compiled()
    with RunLock(run_folder(config)) as lock:
        run = open_run(config)
        validation = Validation(run, benchmarks)

        throughput = Throughput(run.saved.get("clocks"))
        # The folder is written after compilation, so that a run that does not fit its devices
        # leaves none behind, and can be tried again with other settings.
        resuming = check_run_folder(run.folder, run.settings, run.checkpoints)
        _check_folder(run)
        if resuming:
            _check_data(run)
        executables = _compile(run, throughput)

        copies = CheckpointCopies(run.stage, run.folder, config.keep_last)
        with copies, _opened(run) as checkpoints:
            first, state = first_state(run, checkpoints, resuming=resuming)
            last = run.steps if stop_after is None else min(run.steps, first + stop_after)
            with MetricsLogger(run, throughput, first, executables=len(executables)) as metrics:
                session = _Session(
                    run, executables, validation, throughput, checkpoints, copies, metrics, lock
                )
                record_start(run, first)
                if validation.is_due(first, run.steps) and not metrics.has_scores(first):
                    session.validate(first, state)
                with Profiler(run.folder / "profile", profile) as profiler:
                    _run_steps(session, profiler, state, first, last)
    if run.loader.faults.reasons:
        logger.info(f"bad samples in this process: {run.loader.faults.summary()}")
    return metrics.latest


def _check_folder(run: Run) -> None:
    """Refuses an output_dir that cannot be written to, or has no room for one checkpoint."""
    if not is_remote(run.folder):  # the lock that is in an object store shows it there
        check_writable(run.folder, "output_dir")
    arrays = jax.tree.leaves(run.setup.state)
    nbytes = sum(array.size * array.dtype.itemsize for array in arrays)
    check_space(run.checkpoints, SMALLEST_SHARE * nbytes, "one checkpoint of this run")


def _check_data(run: Run) -> None:
    """Refuses data that have changed since the newest checkpoint, before anything is compiled."""
    problems = changed_data(run.saved.get("data"), run.loader.state(0))
    if problems:
        raise CheckpointError(str(run.folder), problems)


def _opened(run: Run) -> CheckpointWriter:
    """Writes what a run folder holds before its first step, and opens its checkpoints."""
    write_run_folder(run.folder, run.settings, run.tokenizer, run.source)
    for loader in filter(None, (run.loader, run.validation)):
        loader.list_bad_samples(run.folder / QUARANTINE.format(jax.process_index()))
    return CheckpointWriter(run.checkpoints, run.config.keep_last)


@dataclasses.dataclass(frozen=True)
class _Session:
    """The parts of a run that work together while it is under way."""

    run: Run
    executables: Mapping[Bucket, jax.stages.Compiled]
    validation: Validation
    throughput: Throughput
    checkpoints: CheckpointWriter
    copies: CheckpointCopies
    metrics: MetricsLogger
    lock: RunLock

    def validate(self, step: int, state: TrainState) -> None:
        """Scores the parameters after `step` steps, and records the scores."""
        with self.throughput.paused("evaluation_s"):
            scores = self.validation(step, state.params())
        self.metrics.record(step, scores)

    def save(self, step: int, state: TrainState) -> None:
        """Saves a checkpoint: parameters after `step` steps, and data that go on with that step."""
        metadata = {
            **self.run.settings,
            "lora": to_dict(self.run.config.lora),
            "data": self.run.loader.state(step),
            "clocks": self.throughput.clocks,
        }
        self.lock.check()
        self.metrics.flush()  # a run that goes on from this step has the lines before it
        with self.throughput.paused("checkpoint_s"):
            self.checkpoints.save(step, state.params(), state.opt_state, metadata)


def _run_steps(
    session: _Session, profiler: Profiler, state: TrainState, first: int, last: int
) -> None:
    """Runs the steps after `first` up to `last`: step, metrics, validation, checkpoint."""
    config, throughput, metrics = session.run.config, session.throughput, session.metrics
    in_flight: deque[jax.Array] = deque()
    throughput.start()
    batches = _batches(session.run, throughput, first, last)
    with Preemption() as preemption, contextlib.closing(batches):
        for done, loaded, batch in batches:
            profiler.before(done)
            # The batch is on the devices already; anything else that goes there is a mistake.
            with jax.transfer_guard_host_to_device("disallow"):
                state, step_metrics = session.executables[loaded.bucket](state, batch)
            metrics.add(done, loaded, step_metrics)

            # The host blocks here, and nowhere else: until the devices are IN_FLIGHT steps behind,
            # which bounds the batches in their memory, or are done with all that is logged.
            in_flight.append(step_metrics.loss)
            throughput.wait(in_flight, leave=IN_FLIGHT)
            profiler.after(done, step_metrics.loss)
            session.checkpoints.check()
            session.copies.check()
            preempted = preemption.reached()
            saves = done % config.save_every == 0 or done == last or preempted
            ending = None
            if saves or done % config.log_every == 0:  # no step is saved before it is looked at
                throughput.wait(in_flight, leave=0)
                ending = metrics.log(done)

            # Saved before it is scored: whatever a validation meets, no step is lost.
            if saves or ending:
                session.save(done, state)
            if session.validation.is_due(done, last) and not (ending or preempted):
                session.validate(done, state)
            if ending:
                raise ending
            if preempted and done < last:
                raise Preempted(
                    f"stopped by {preemption.signal}: saved at step {done}, the same command goes "
                    "on from there"
                )


def _batches(
    run: Run, throughput: Throughput, first: int, last: int
) -> Generator[tuple[int, LoadedStep, Batch], None, None]:
    """Yields (step from 1, step on the host, batch on the devices), one batch ahead of its use."""
    waiting, steps = None, run.loader.steps(first, last)
    with contextlib.closing(steps):  # a run that stops early ends its workers
        for step, loaded in enumerate(throughput.waited(steps), start=first + 1):
            coming = (step, loaded, to_devices(loaded, run.mesh))
            if waiting is not None:
                yield waiting
            waiting = coming
        if waiting is not None:
            yield waiting


def _compile(run: Run, throughput: Throughput) -> dict[Bucket, jax.stages.Compiled]:
    """Compiles the step of every bucket, on the run's clock of compilation."""
    plan = run.loader.plan
    with throughput.paused("compile_s"):
        executables = compile_train_steps(run.setup, plan.buckets, plan.rows)
    logger.info(
        f"compiled the step of {len(executables)} buckets; compilation has taken "
        f"{throughput.clocks['compile_s']:.0f} s of this run"
    )
    return executables
