"""Steps read ahead by grain, in threads or in worker processes (design: data.md 14)."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import TypeVar

import grain
from absl import flags

from internvlx_jax.data.plan import Plan, PlannedStep
from internvlx_jax.data.workers import end_with_parent

PREFETCHED_STEPS = 4

T = TypeVar("T")


def read_ahead(
    plan: Plan, load: Callable[[PlannedStep], T], start: int, stop: int, num_workers: int
) -> Generator[T, None, None]:
    """Yields `load(step)` of the steps start .. stop - 1 in order, some of them loaded ahead.

    Args:
        plan: the steps.
        load: picklable; what makes a step.
        start: first step.
        stop: the step after the last one.
        num_workers: worker processes, which end with the iterator; 0 loads in threads.
    """
    dataset = grain.MapDataset.range(start, stop).map(plan.step).map(load)
    threads = 1 if num_workers else min(PREFETCHED_STEPS, os.cpu_count() or 1)
    steps = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCHED_STEPS)
    )
    if num_workers:
        if not flags.FLAGS.is_parsed():  # grain's worker processes read absl flags
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        steps = steps.mp_prefetch(options, worker_init_fn=_start_worker)
    iterator = iter(steps)
    try:
        yield from iterator
    finally:
        iterator.close()


def _start_worker(index: int, count: int) -> None:
    """Prepares a worker process of grain."""
    end_with_parent()
