"""One executable per bucket, all compiled before the first step (design: training.md 5, 12)."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from internvlx_jax.core.chips import GIB
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.training.setup import Setup

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
REMEDIES = (
    "compute.remat=full, which keeps the least; fewer rows per device: a smaller "
    "data.samples_per_step, data.tokens_per_step or data.tiles_per_step, or more "
    "compute.accumulation; more devices along mesh.fsdp or mesh.tensor"
)


def compile_train_steps(
    setup: Setup, buckets: Sequence[Bucket], rows: Sequence[int]
) -> dict[Bucket, jax.stages.Compiled]:
    """Compiles the train step of each bucket, on accelerators side by side.

    Args:
        setup: The run.
        buckets: Its buckets.
        rows: Rows of a step in each bucket.

    Raises:
        ConfigError: A bucket needs more memory than a device has; says what to change.
    """
    memory = device_memory(setup.mesh.local_devices[0])
    compile_bucket = functools.partial(compile_train_step, setup)
    # On a CPU one after the other: XLA divides each of them among the cores, and has crashed when
    # it wrote one into the cache of compiled programs while it compiled another.
    on_cpu = setup.mesh.local_devices[0].platform == "cpu"
    with ThreadPoolExecutor(max_workers=1 if on_cpu else os.cpu_count()) as threads:
        executables = dict(zip(buckets, threads.map(compile_bucket, buckets, rows), strict=True))
    for bucket, count in zip(buckets, rows, strict=True):
        needed = peak_bytes(executables[bucket])
        if memory is not None and needed > memory:
            raise _does_not_fit(
                bucket, count, f"it needs {needed / GIB:.2f} GiB of {memory / GIB:.2f}"
            )
    return executables


def compile_train_step(setup: Setup, bucket: Bucket, rows: int) -> jax.stages.Compiled:
    """Compiles the train step of one bucket.

    Raises:
        ConfigError: The compiler finds that it does not fit the memory of a device; says what to
            change.
    """
    logger.info(
        f"compiling the step for {rows} rows of {bucket.tiles} tiles and {bucket.length} slots"
    )
    try:
        return setup.train_step.lower(setup.state, setup.batch(bucket, rows)).compile()
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        raise _does_not_fit(bucket, rows, str(error)) from error


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes of device memory that a step needs.

    Where the compiler does not state the peak, or leaves the temporaries out of it as that of CPUs
    does, this counts arguments, results that do not alias them, and temporaries as if all of them
    lived at once.
    """
    memory: Any = compiled.memory_analysis()
    (device, *_) = jax.tree.leaves(compiled.input_shardings)[0].device_set
    if memory.peak_memory_in_bytes and device.platform != "cpu":
        return memory.peak_memory_in_bytes
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def device_memory(device: Any) -> int | None:
    """Returns the bytes that programs may use on an attached device, if its platform tells."""
    stats = device.memory_stats()
    return stats and stats.get("bytes_limit")


def _does_not_fit(bucket: Bucket, rows: int, reason: str) -> ConfigError:
    return ConfigError(
        f"a step of {rows} rows with {bucket.tiles} tiles and {bucket.length} slots does not fit "
        f"the memory of a device; change one of: {REMEDIES}\n{reason}"
    )
