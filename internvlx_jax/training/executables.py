"""One executable a bucket, all compiled before the first step (design: training.md 5, 12)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.plan import Bucket
from internvlx_jax.training.setup import Setup

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
REMEDIES = (
    "compute.remat=full, which keeps the least; fewer rows a device: a smaller data.samples_per_step, "
    "data.tokens_per_step or data.tiles_per_step, or more compute.accumulation; more devices along mesh.fsdp or "
    "mesh.tensor"
)


def compile_train_steps(
    setup: Setup,
    buckets: Sequence[Bucket],
    rows: Sequence[int],
    speak: Callable[[str], object] = print,
) -> dict[Bucket, jax.stages.Compiled]:
    """Compile the train step of each bucket, side by side for attached devices.

    speak: is told about each bucket before its compilation, which takes minutes at full size.
    Raises ConfigError, with what to change, for a bucket that needs more memory than they have.
    """
    memory = device_memory(setup.mesh.local_devices[0])

    def compiling(bucket: Bucket, count: int) -> jax.stages.Compiled:
        speak(
            f"compiling the step of {count} rows of {bucket.tiles} tiles x {bucket.length} slots ..."
        )
        return compile_train_step(setup, bucket, count)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        compiled = dict(zip(buckets, threads.map(compiling, buckets, rows), strict=True))
    for bucket, count in zip(buckets, rows):
        needed = peak_bytes(compiled[bucket])
        if memory is not None and needed > memory:
            raise _does_not_fit(
                bucket, count, f"it needs {needed / 2**30:.2f} GiB of {memory / 2**30:.2f}"
            )
    return compiled


def compile_train_step(setup: Setup, bucket: Bucket, rows: int) -> jax.stages.Compiled:
    """Raises ConfigError, with what to change, when the compiler finds that it does not fit the memory of a device."""
    try:
        return setup.train_step.lower(setup.state, setup.batch(bucket, rows)).compile()
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        raise _does_not_fit(bucket, rows, str(error)) from error


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory of a device that a step needs. Where the compiler does not state the peak: arguments, results that do not
    alias them, and temporaries as if all lived at once."""
    memory = compiled.memory_analysis()
    return memory.peak_memory_in_bytes or (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def device_memory(device: jax.Device) -> int | None:
    """Bytes that programs may use on an attached device, where it tells."""
    stats = device.memory_stats()
    return stats and stats.get("bytes_limit")


def _does_not_fit(bucket: Bucket, rows: int, reason: str) -> ConfigError:
    return ConfigError(
        f"a step of {rows} rows with {bucket.tiles} tiles and {bucket.length} slots does not fit the memory "
        f"of a device; change one of: {REMEDIES}\n{reason}"
    )
