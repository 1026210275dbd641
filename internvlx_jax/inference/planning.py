"""Groups requests into batches of one shape each, the same on every process.

(design: evaluation.md 9)
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.inference.prompts import PromptBuilder
from internvlx_jax.inference.requests import GenerationSpec, Request

UNPLANNED = -1


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """Requests of one shape.

    Attributes:
        bucket: shape of a row.
        numbers: numbers of its requests, at most `rows`.
        rows: rows of the batch over all processes; those behind the requests are empty.
    """

    bucket: Bucket
    numbers: tuple[int, ...]
    rows: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Batches of all processes, and on the first process the requests that failed by number."""

    batches: tuple[PlannedBatch, ...]
    failed: Mapping[int, SampleError]


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Numbers of rows that batches may have.

    Attributes:
        rows: rows of a full batch, a multiple of `shards`.
        shards: parts into which devices divide a batch.
        fit: whether a batch with fewer requests has fewer rows: the next power of two per shard,
            so that few shapes are compiled. Otherwise every batch has the rows of a full one.
    """

    rows: int
    shards: int
    fit: bool

    def of(self, requests: int) -> int:
        """Returns the rows of a batch with that many requests."""
        if not self.fit:
            return self.rows
        per_shard = -(-requests // self.shards)
        return min(self.rows, self.shards * 2 ** (per_shard - 1).bit_length())


def plan_batches(
    requests: Mapping[int, Request],
    spec: GenerationSpec,
    prompts: PromptBuilder,
    sizes: BatchSizes,
) -> Plan:
    """Groups requests by shape. The first process decides; the others receive its plan."""
    shapes = np.full((len(requests), 3), UNPLANNED, np.int32)
    failed: dict[int, SampleError] = {}
    if jax.process_index() == 0:
        found = _buckets(requests, spec, prompts)
        for row, (number, bucket) in enumerate(found.items()):
            if isinstance(bucket, SampleError):
                failed[number] = bucket
            else:
                shapes[row] = dataclasses.astuple(bucket)
    if jax.process_count() > 1:
        shapes = np.asarray(multihost_utils.broadcast_one_to_all(shapes))
    groups: dict[Bucket, list[int]] = defaultdict(list)
    for number, shape in zip(requests, shapes.tolist(), strict=True):
        if UNPLANNED not in shape:
            groups[Bucket(*shape)].append(number)
    chunks = [
        (bucket, tuple(group[i : i + sizes.rows]))
        for bucket, group in sorted(groups.items())
        for i in range(0, len(group), sizes.rows)
    ]
    batches = [PlannedBatch(bucket, chunk, sizes.of(len(chunk))) for bucket, chunk in chunks]
    return Plan(tuple(batches), failed)


def _buckets(
    requests: Mapping[int, Request], spec: GenerationSpec, prompts: PromptBuilder
) -> dict[int, Bucket | SampleError]:
    """Returns the shape of each request, or what is wrong with it; headers are read in threads."""

    def bucket(request: Request) -> Bucket | SampleError:
        try:
            return prompts.bucket(request, spec)
        except SampleError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(requests, pool.map(bucket, requests.values()), strict=True))
