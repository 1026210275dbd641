"""One executable a bucket, all compiled before the first step (spec: training.md 5, 12)."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from internvlx_jax.data.plan import Bucket
from internvlx_jax.errors import ConfigError
from internvlx_jax.training.setup import Setup

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
REMEDIES = ("compute.remat=full, which keeps the least; fewer rows a device: a smaller data.samples_per_step, "
            "data.tokens_per_step or data.tiles_per_step, or more compute.accumulation; more devices along mesh.fsdp or "
            "mesh.tensor")


def compile_train_steps(setup: Setup, buckets: Sequence[Bucket], rows: Sequence[int]) -> dict[Bucket, jax.stages.Compiled]:
    """The train step of each bucket, compiled side by side; see compile_train_step."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        compiled = threads.map(functools.partial(compile_train_step, setup), buckets, rows)
        return dict(zip(buckets, compiled, strict=True))


def compile_train_step(setup: Setup, bucket: Bucket, rows: int) -> jax.stages.Compiled:
    """Raises ConfigError, with what to change, when the compiler finds that it does not fit the memory of a device."""
    try:
        return setup.train_step.lower(setup.state, setup.batch(bucket, rows)).compile()
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        raise ConfigError(f"a step of {rows} rows with {bucket.tiles} tiles and {bucket.length} slots does not fit the "
                          f"memory of a device; change one of: {REMEDIES}\n{error}") from error
