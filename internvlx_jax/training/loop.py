"""The training loop, top to bottom: mesh, model, data, state, steps (spec: training.md)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from internvlx_jax.config import to_dict
from internvlx_jax.convert.source import open_checkpoint
from internvlx_jax.convert.transfer import check_same_model, transfer
from internvlx_jax.data.pipeline import LoadedStep, Loader
from internvlx_jax.data.plan import Bucket
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.errors import ConfigError
from internvlx_jax.evaluation.in_loop import InLoop
from internvlx_jax.models.config import ModelConfig
from internvlx_jax.models.flops import forward_flops
from internvlx_jax.models.params import init_params
from internvlx_jax.training.checkpoint import CheckpointWriter, prepare_run_folder, saved_position
from internvlx_jax.training.config import TrainConfig
from internvlx_jax.training.executables import compile_train_steps
from internvlx_jax.training.freeze import describe
from internvlx_jax.training.metrics import MetricsWriter, Throughput, progress_line, window_means
from internvlx_jax.training.setup import prepare
from internvlx_jax.training.sharding import batch_sharding, data_parallel_size, make_mesh, placed, row_share
from internvlx_jax.training.step import TrainState

QUARANTINE = "quarantine-{}.jsonl"  # in the run folder, by process


def train(config: TrainConfig, *, stop_after: int | None = None) -> dict[str, float]:
    """Run, or resume, the run in config.output_dir; returns the last validation (or training) metrics.

    stop_after: end after this many steps of this call, with a checkpoint; the same command goes on from there.
    """
    run = Path(config.output_dir).absolute()  # orbax wants absolute paths
    speak = print if jax.process_index() == 0 else lambda *_: None

    # --- mesh -----------------------------------------------------------------------------------------------------
    mesh = make_mesh(config.mesh, rows=config.micro_batch)

    # --- model ----------------------------------------------------------------------------------------------------
    source = None if config.init_from is None else open_checkpoint(config.init_from)
    model_config = source.config if config.model is None else config.model
    if source is not None and config.model is not None:
        check_same_model(config.model, source.config, source.path)

    # --- data -----------------------------------------------------------------------------------------------------
    tokenizer = _tokenizer(config, source, model_config)
    loader, validation = _loaders(config, model_config, tokenizer, mesh, saved_position(run))
    steps = config.steps or loader.plan.total
    speak(f"{len(loader.table.length):,} samples, {loader.plan.first_step(1):,} steps in the first epoch, {steps:,} steps, "
          f"{len(loader.plan.buckets)} buckets:")
    for bucket, rows in zip(loader.plan.buckets, loader.plan.rows):
        speak(_describe_bucket(model_config, bucket, rows))
    if loader.index_faults.reasons:
        speak(f"left out, see {QUARANTINE.format(0)} in the run folder: {loader.index_faults.summary()}")

    # --- structure, optimiser, steps: no arrays yet -----------------------------------------------------------------
    setup = prepare(config, model_config, mesh, steps)
    abstract, shardings = setup.abstract, setup.shardings
    speak(describe(setup.division))
    benchmarks = None
    if config.evaluation is not None:
        benchmarks = InLoop(config.evaluation, run / "evaluation", model=model_config, abstract=abstract,
                            tokenizer=tokenizer, mesh=mesh)

    # --- run folder, one executable a bucket ----------------------------------------------------------------------
    settings = {"train": to_dict(config), "model": to_dict(model_config)}
    resuming = prepare_run_folder(run, settings, tokenizer)
    for each in filter(None, (loader, validation)):
        each.list_bad_samples(run / QUARANTINE.format(jax.process_index()))
    started = time.perf_counter()
    executables = compile_train_steps(setup, loader.plan.buckets, loader.plan.rows)
    speak(f"compiled the step of {len(executables)} buckets in {time.perf_counter() - started:.0f} s")

    # --- state: resume, or start from a checkpoint, or from scratch -----------------------------------------------
    checkpoints = CheckpointWriter(run, config.keep_last)
    if resuming:
        first = checkpoints.latest_step
        params, opt_state = checkpoints.load(first, placed(abstract.shapes, shardings), setup.state.opt_state,
                                             loader.state(first))
        speak(f"resuming {run} at step {first}")
    elif source is not None:
        first, transferred = 0, transfer(source, model_config, abstract, mesh, seed=config.seed)
        params = transferred.params
        speak(*transferred.report, sep="\n")
    else:
        first, params = 0, init_params(model_config, config.seed, shardings=shardings)
    places = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    trainable, frozen = jax.device_put(setup.division.split(params), (places.trainable, places.frozen))
    if not resuming:
        opt_state = jax.jit(setup.optimizer.init, out_shardings=places.opt_state)(trainable)
    state = TrainState(trainable, frozen, opt_state, jax.device_put(np.int32(first), places.step))

    # --- loop -----------------------------------------------------------------------------------------------------
    def put(step: LoadedStep) -> Any:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), step.batch)

    def validate(params) -> dict[str, float]:
        sums = np.sum([jax.device_get(setup.eval_step(params, put(loaded)))
                       for loaded in validation.steps(0, validation.plan.total)], axis=0)
        loss, weight, exact, answers = sums.tolist()
        return {"eval/loss": loss / weight, "eval/exact": exact / answers}

    def save(step: int, state: TrainState) -> None:
        checkpoints.save(step, state.params(), state.opt_state, {**settings, "data": loader.state(step)})

    last = steps if stop_after is None else min(steps, first + stop_after)
    writer = MetricsWriter(run, first) if jax.process_index() == 0 else None
    latest: dict[str, float] = {}

    def record(step: int, values: dict[str, float]) -> None:
        latest.update(values)
        if writer:
            writer.write(step, values)

    def report_validation(step: int) -> None:
        scores = {} if validation is None else validate(state.params())
        if benchmarks is not None:
            scores |= benchmarks(step, state.params())
        speak(f"step {step}/{steps}  " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        record(step, scores)

    evaluates = validation is not None or benchmarks is not None
    if evaluates and first == 0:
        report_validation(0)
    throughput, window = Throughput(), []
    # A checkpoint taken after step n holds the parameters after n updates and asks the data for step n next.
    with checkpoints:
        for step, loaded, batch in _ahead(throughput.waited(loader.steps(first, last)), put, first):
            state, metrics = executables[loaded.bucket](state, batch)
            throughput.add(loaded.counts)
            window.append(metrics)
            done = step + 1
            if done % config.log_every == 0 or done == last:
                faults = _of_all_processes(loader.faults.totals())
                loader.faults.judge(faults)  # by all processes alike, so that they stop together
                values = window_means(jax.device_get(window)) | throughput.take()
                values["bad_samples"] = int(faults[:, 1].sum())
                values["executables"] = len(executables)
                window.clear()
                speak(progress_line(done, steps, values))
                record(done, values)
            paused = time.perf_counter()
            if evaluates and (done % config.eval_every == 0 or done == last):
                report_validation(done)
            if done % config.save_every == 0 or done == last:
                save(done, state)
            throughput.pause(time.perf_counter() - paused)
    if writer:
        writer.close()
    if loader.faults.reasons:
        speak(f"bad samples in this process: {loader.faults.summary()}")
    return latest


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


def _loaders(config: TrainConfig, model_config: ModelConfig, tokenizer: Tokenizer, mesh: Mesh,
             position: Mapping[str, Any] | None) -> tuple[Loader, Loader | None]:
    """Training and validation data; process 0 makes the indexes, the others find them. Raises ConfigError, on all
    processes, when the processes see different data or when the rows of a saved position do not fit the devices."""
    data, prompt = config.data, model_config.prompt
    processor = Processor(tokenizer, get_template(prompt.template), prompt.system_message, prompt.tiles,
                          model_config.tokens_per_tile, data.special_text, model_config.lvtc, data.images)
    shards = data_parallel_size(mesh) * config.compute.accumulation
    row_quantum = (position or {}).get("row_quantum") or data.row_quantum or shards
    if row_quantum % shards:
        raise ConfigError(f"the rows of a step come in multiples of {row_quantum} (data.row_quantum), which {shards} parts "
                          "(data-parallel devices * compute.accumulation) do not divide; use fewer devices, or begin the "
                          "run with a larger data.row_quantum")
    index, count = row_share(mesh)

    def make() -> tuple[Loader, Loader | None]:
        common = dict(process_index=index, process_count=count, progress=jax.process_index() == 0)
        training = Loader(data.meta, data, processor, row_quantum=row_quantum, seed=config.seed, state=position,
                          epochs=config.epochs if config.steps is None else None, **common)
        if data.val_meta is None:
            return training, None
        return training, Loader(data.val_meta, data, processor, row_quantum=shards, seed=0, epochs=1, **common)

    try:
        made = make() if jax.process_index() == 0 else None
    finally:
        multihost_utils.sync_global_devices("index made")
    loaders = made or make()
    plans = np.array([int(loader.plan_hash[:7], 16) for loader in loaders if loader], np.int32)
    if (multihost_utils.process_allgather(plans) != plans).any():
        raise ConfigError("the processes see different training data, so their steps would differ; give all of them the "
                          f"same files, tokenizer and versions of NumPy (this one: {loaders[0].plan_hash})")
    return loaders


def _describe_bucket(config: ModelConfig, bucket: Bucket, rows: int) -> str:
    """Its shape, and the work of its forward pass."""
    short = f" ({bucket.short_length} in the short frame)" if config.lvtc else ""
    flops = forward_flops(config, tiles=rows * bucket.tiles, lengths=[bucket.length] * rows,
                          short_lengths=[bucket.short_length] * rows)
    return (f"  {rows} rows of {bucket.tiles} tiles and {bucket.length} slots{short}: forward "
            f"{flops.total / 1e12:.3g} TFLOP")


def _of_all_processes(counts: np.ndarray) -> np.ndarray:
    return np.sum(multihost_utils.process_allgather(counts.astype(np.int32)), axis=0)


def _tokenizer(config: TrainConfig, source, model_config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer.load(config.data.tokenizer) if config.data.tokenizer else source and source.tokenizer()
    if tokenizer is None:
        raise ConfigError("data.tokenizer is not set and init_from brings no tokenizer files; set data.tokenizer to a "
                          "folder with tokenizer.model")
    if tokenizer.vocab_size > model_config.decoder.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, model.decoder.vocab_size is "
                          f"{model_config.decoder.vocab_size}; give the model a row for each")
    return tokenizer
