"""Train steps for benchmarks/gpu.py: 2B with three LVTC presets, and 8B with LoRA."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from gpu_shared import (
    Packed,
    Report,
    Size,
    datasheet,
    median_seconds,
    packed,
    random_params,
    share,
)

from internvlx_jax.core.chips import GIB
from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.core.run_config import ComputeConfig, FreezeConfig, MeshConfig, TrainConfig
from internvlx_jax.data.plan import Bucket
from internvlx_jax.models.flops import train_flops
from internvlx_jax.models.sharding import batch_sharding, make_mesh
from internvlx_jax.training.executables import compile_train_step, device_memory, peak_bytes
from internvlx_jax.training.setup import Setup, prepare
from internvlx_jax.training.step import TrainState

TOWER_FROZEN, ADAPTERS_ONLY = FreezeConfig(vit=True), FreezeConfig(train_lora_only=True)
LORA = LoraConfig(part="decoder", rank=16, alpha=32.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """Describes one train step.

    Attributes:
        name: Of its row in the report.
        model: The model.
        compute: Its remat policy, and the parts that it is computed in.
        freeze: What is trained.
        lora: Adapters.
    """

    name: str
    model: ModelConfig
    compute: ComputeConfig
    freeze: FreezeConfig = TOWER_FROZEN
    lora: tuple[LoraConfig, ...] = ()


def train(report: Report, size: Size) -> None:
    """Times the 2B step: tower frozen, projector and decoder trained."""
    cases = [
        Case(f"2B, LVTC {preset}, remat {remat}", size.small(preset), ComputeConfig(remat=remat))
        for preset, remat in size.train_cases
    ]
    train_steps(report, size, "train", cases)


def lora(report: Report, size: Size) -> None:
    """Times the 8B step that trains adapters on the decoder alone."""
    cases = [
        Case(
            f"8B LoRA, LVTC {preset}, remat {remat}" + (f", {parts} parts" if parts > 1 else ""),
            size.large(preset),
            ComputeConfig(remat=remat, accumulation=parts),
            ADAPTERS_ONLY,
            (LORA,),
        )
        for preset, remat, parts in size.lora_cases
    ]
    train_steps(report, size, "lora", cases)


def train_steps(report: Report, size: Size, part: str, cases: Sequence[Case]) -> None:
    """Times train steps one after the other, while the next ones compile.

    Args:
        report: Where rows are added.
        size: Of the measurement.
        part: Name of the part.
        cases: The steps, in rising order of the memory that they need.
    """
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1], rows=size.rows)
    with ThreadPoolExecutor(max_workers=len(cases)) as threads:
        jobs = []
        for case in cases:
            config = TrainConfig(
                output_dir="",
                model=case.model,
                data=DataConfig(meta="", batch_mode="pack"),
                freeze=case.freeze,
                lora=case.lora,
                compute=case.compute,
                mesh=MeshConfig(data=1),
            )
            setup = prepare(config, case.model, mesh, steps=1000)
            rows = packed(case.model, size.segments, size.rows)
            jobs.append((setup, rows, threads.submit(_compiled, setup, rows.bucket, size.rows)))
        for case, job in zip(cases, jobs, strict=True):
            measure = functools.partial(_measure, size, *job)
            report.attempt(part, case.name, size.seconds[part], measure)


def _compiled(setup: Setup, bucket: Bucket, rows: int) -> tuple[jax.stages.Compiled, float]:
    """Returns the program and the seconds that its compilation took."""
    begun = time.perf_counter()
    return compile_train_step(setup, bucket, rows), time.perf_counter() - begun


def _random_state(setup: Setup) -> TrainState:
    """Makes the state of a run before its first step, with random parameters."""
    places = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    inits = setup.abstract.inits
    trainable = random_params(setup.partition.trained, inits, places.trainable)
    frozen = random_params(setup.partition.frozen, inits, places.frozen)
    opt_state = jax.jit(setup.optimizer.init, out_shardings=places.opt_state)(trainable)
    return TrainState(trainable, frozen, opt_state, jax.device_put(np.int32(0), places.step))


def _peak_in_use() -> int:
    """Returns the most bytes in use since this process began, 0 where the platform tells none."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _measure(
    size: Size, setup: Setup, rows: Packed, compiling: Future[tuple[jax.stages.Compiled, float]]
) -> dict[str, Any]:
    program, compile_seconds = compiling.result()
    predicted, peak_before = peak_bytes(program), _peak_in_use()
    memory = device_memory(jax.devices()[0])
    if memory is not None and predicted > memory:
        return {"skipped": f"it needs {predicted / GIB:.1f} GiB of {memory / GIB:.1f}"}
    state = _random_state(setup)
    batch = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(setup.mesh)), rows.batch)
    losses = []

    def step() -> TrainState:
        nonlocal state
        state, metrics = program(state, batch)
        losses.append(metrics.loss)
        return state

    seconds = median_seconds(step, size.steps)
    measured = _peak_in_use()
    measured = measured if measured > peak_before else None  # an earlier row needed more
    trained = {path: leaf.shape for path, leaf in setup.partition.trained.items()}
    flops = train_flops(setup.model, trained, **rows.content).total
    bucket = rows.bucket
    return {
        "ms": 1e3 * seconds,
        "rows": size.rows,
        "slots": bucket.length,
        "short_slots": bucket.short_length,
        "rows_per_s": size.rows / seconds,
        "tokens_per_s": size.rows * bucket.length / seconds,
        "tflop": flops / 1e12,
        "mfu": share(flops / seconds, datasheet()[0]),
        "loss": float(losses[-1]),
        "compile_s": compile_seconds,
        "predicted_gib": predicted / GIB,
        "measured_gib": measured and measured / GIB,
        "measured_over_predicted": measured and measured / predicted,
    }
