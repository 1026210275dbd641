"""The training loop, top to bottom: mesh, model, data, state, steps (design: training.md)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internvlx_jax.aot.compile_report import check_fits, compile_report, table
from internvlx_jax.aot.topologies import local_topology
from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.checkpoints.run_folder import saved_metadata
from internvlx_jax.checkpoints.run_writer import (
    CheckpointWriter,
    check_run_folder,
    write_run_folder,
)
from internvlx_jax.checkpoints.transfer import check_same_model, transfer
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.pipeline import LoadedStep
from internvlx_jax.data.plan import Bucket
from internvlx_jax.evaluation.in_loop import InLoop
from internvlx_jax.models.flops import forward_flops
from internvlx_jax.models.params import init_adapters, init_params, without_adapters
from internvlx_jax.models.sharding import batch_sharding, make_mesh, placed
from internvlx_jax.training.data import open_loaders, open_tokenizer
from internvlx_jax.training.executables import compile_train_steps
from internvlx_jax.training.freeze import describe
from internvlx_jax.training.metrics import Throughput
from internvlx_jax.training.mfu import Utilization, peak_flops
from internvlx_jax.training.preemption import Preempted, Preemption
from internvlx_jax.training.profiler import Profiler, Window
from internvlx_jax.training.setup import prepare
from internvlx_jax.training.starts import record_start
from internvlx_jax.training.step import TrainState
from internvlx_jax.training.watch import Watch

QUARANTINE = "quarantine-{}.jsonl"  # in the run folder, by process


def train(
    config: TrainConfig,
    *,
    stop_after: int | None = None,
    profile: Window | None = None,
    dry_run: bool = False,
) -> dict[str, float]:
    """Run, or resume, the run in config.output_dir; returns the last validation (or training) metrics.

    stop_after: end after this many steps of this call, with a checkpoint; the same command goes on from there.
    profile: steps to trace, to RUN/profile.
    dry_run: compile the step of every bucket, say what it takes, and end; no parameter is made, nothing is written.

    Raises ConfigError, CheckpointError or SampleError for input that cannot be used; Preempted after SIGTERM and
    NonFiniteError after too many bad steps, both with the run saved.
    """
    run = Path(config.output_dir).absolute()  # orbax wants absolute paths
    # Flushed: a line about a compilation is of use while it lasts, also behind a pipe.
    speak = (
        functools.partial(print, flush=True) if jax.process_index() == 0 else lambda *_, **__: None
    )

    # --- mesh -----------------------------------------------------------------------------------------------------
    mesh = make_mesh(config.mesh, rows=config.micro_batch)

    # --- model ----------------------------------------------------------------------------------------------------
    source = None if config.init_from is None else open_checkpoint(config.init_from)
    model_config = source.config if config.model is None else config.model
    if source is not None and config.model is not None:
        check_same_model(config.model, source.config, source.path)

    # --- data -----------------------------------------------------------------------------------------------------
    tokenizer, saved = open_tokenizer(config, source, model_config), saved_metadata(run)
    loader, validation = open_loaders(config, model_config, tokenizer, mesh, saved.get("data"))
    steps = config.steps or loader.plan.total
    speak(
        f"{len(loader.table.length):,} samples, {loader.plan.first_step(1):,} steps in the first epoch, {steps:,} steps, "
        f"{len(loader.plan.buckets)} buckets:"
    )
    for bucket, rows in zip(loader.plan.buckets, loader.plan.rows):
        speak(_describe_bucket(model_config, bucket, rows))
    if loader.index_faults.reasons:
        speak(
            f"left out, see {QUARANTINE.format(0)} in the run folder: {loader.index_faults.summary()}"
        )

    # --- structure, optimiser, steps: no arrays yet -----------------------------------------------------------------
    setup = prepare(config, model_config, mesh, steps, len(loader.entries))
    abstract, shardings = setup.abstract, setup.shardings
    speak(describe(setup.division))
    benchmarks = None
    if config.evaluation is not None:
        benchmarks = InLoop(
            config.evaluation,
            run / "evaluation",
            model=model_config,
            abstract=abstract,
            tokenizer=tokenizer,
            mesh=mesh,
        )

    if dry_run:
        where = local_topology()
        reports = compile_report(setup, loader.plan.buckets, loader.plan.rows, where)
        speak(table(reports, where, mesh))
        check_fits(reports, where)
        return {}

    # --- one executable a bucket, run folder: what does not fit the devices leaves none ----------------------------
    settings = {"train": to_dict(config), "model": to_dict(model_config)}
    resuming = check_run_folder(run, settings)
    throughput = Throughput(saved.get("clocks"))
    with throughput.paused("compile_s"):
        executables = compile_train_steps(setup, loader.plan.buckets, loader.plan.rows, speak)
    write_run_folder(run, settings, tokenizer, source)
    for each in filter(None, (loader, validation)):
        each.list_bad_samples(run / QUARANTINE.format(jax.process_index()))
    speak(
        f"compiled the step of {len(executables)} buckets; {throughput.clocks['compile_s']:.0f} s in this run until now"
    )

    # --- state: resume, or start from a checkpoint, or from scratch -----------------------------------------------
    checkpoints = CheckpointWriter(run, config.keep_last)
    if resuming:
        first = checkpoints.latest_step
        params, opt_state = checkpoints.load(
            first, placed(abstract.shapes, shardings), setup.state.opt_state, loader.state(first)
        )
        speak(f"resuming {run} at step {first}")
    elif source is not None:
        first, transferred = (
            0,
            transfer(source, model_config, without_adapters(abstract), mesh, seed=config.seed),
        )
        params = transferred.params
        speak(*transferred.report, sep="\n")
    else:
        first, params = (
            0,
            init_params(
                model_config,
                config.seed,
                shardings=shardings,
                paths=without_adapters(abstract).shapes,
            ),
        )
    if not resuming:
        params |= init_adapters(abstract, config.seed, shardings)
    places = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    trainable, frozen = jax.device_put(
        setup.division.split(params), (places.trainable, places.frozen)
    )
    if not resuming:
        opt_state = jax.jit(setup.optimizer.init, out_shardings=places.opt_state)(trainable)
    state = TrainState(trainable, frozen, opt_state, jax.device_put(np.int32(first), places.step))

    # --- loop -----------------------------------------------------------------------------------------------------
    def put(step: LoadedStep) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), step.batch
        )

    def validate(params) -> dict[str, float]:
        sums = np.sum(
            [
                jax.device_get(setup.eval_step(params, put(loaded)))
                for loaded in validation.steps(0, validation.plan.total)
            ],
            axis=0,
        )
        loss, weight, exact, answers = sums.tolist()
        return {"eval/loss": loss / weight, "eval/exact": exact / answers}

    def save(step: int, state: TrainState) -> None:
        checkpoints.save(
            step,
            state.params(),
            state.opt_state,
            {
                **settings,
                "lora": to_dict(config.lora),
                "data": loader.state(step),
                "clocks": throughput.clocks,
            },
        )

    def report_validation(step: int) -> None:
        with throughput.paused("evaluation_s"):
            scores = {} if validation is None else validate(state.params())
            if benchmarks is not None:
                scores |= benchmarks(step, state.params())
        speak(
            f"step {step}/{steps}  "
            + "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        )
        watch.record(step, scores)

    last = steps if stop_after is None else min(steps, first + stop_after)
    watch = Watch(
        run,
        config,
        loader,
        throughput,
        first=first,
        steps=steps,
        executables=len(executables),
        utilization=Utilization(setup, peak_flops(config.compute.peak_tflops)),
        speak=speak,
    )
    if jax.process_index() == 0:
        record_start(run, first, mesh, dict(zip(loader.plan.buckets, loader.plan.rows)))
    evaluates = validation is not None or benchmarks is not None
    if evaluates and first == 0:
        report_validation(0)
    # A checkpoint taken after step n holds the parameters after n steps and asks the data for step n next.
    with (
        checkpoints,
        watch,
        Preemption() as preemption,
        Profiler(run / "profile", profile) as profiler,
    ):
        for step, loaded, batch in _ahead(throughput.waited(loader.steps(first, last)), put, first):
            done = step + 1
            profiler.before(done)
            with jax.transfer_guard_host_to_device(
                "disallow"
            ):  # the batch is there, and nothing else comes
                state, metrics = executables[loaded.bucket](state, batch)
            watch.add(done, loaded, metrics)
            profiler.after(done, metrics.loss)
            preempted = preemption.reached(done)
            saves = done % config.save_every == 0 or done == last or preempted
            ending = None
            if saves or done % config.log_every == 0:  # what is saved has been looked at
                ending = watch.log(done)
            if (
                evaluates
                and (done % config.eval_every == 0 or done == last)
                and not (ending or preempted)
            ):
                report_validation(done)
            if saves or ending:
                with throughput.paused("checkpoint_s"):
                    save(done, state)
            if ending:
                raise ending
            if preempted and done < last:
                raise Preempted(
                    f"told to end by SIGTERM: saved at step {done}, the same command goes on from there"
                )
    if loader.faults.reasons:
        speak(f"bad samples in this process: {loader.faults.summary()}")
    return watch.latest


def _ahead(steps: Iterator[LoadedStep], put, first: int) -> Iterator[tuple[int, LoadedStep, Any]]:
    """(step number, host step, device batch), with the next batch on its way to the device."""
    waiting = None
    for number, loaded in enumerate(steps, start=first):
        coming = (number, loaded, put(loaded))
        if waiting is not None:
            yield waiting
        waiting = coming
    if waiting is not None:
        yield waiting


def _describe_bucket(config: ModelConfig, bucket: Bucket, rows: int) -> str:
    """Its shape, and the work of its forward pass."""
    short = f" ({bucket.short_length} in the short layout)" if config.lvtc else ""
    flops = forward_flops(
        config,
        tiles=rows * bucket.tiles,
        lengths=[bucket.length] * rows,
        short_lengths=[bucket.short_length] * rows,
    )
    return (
        f"  {rows} rows of {bucket.tiles} tiles and {bucket.length} slots{short}: forward "
        f"{flops.total / 1e12:.3g} TFLOP"
    )
