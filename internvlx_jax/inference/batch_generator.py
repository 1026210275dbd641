"""Answers requests in batches over devices and hosts, or streams one answer.

(design: evaluation.md 3, 9)
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.data.batch import Row
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.processor import Processor
from internvlx_jax.inference.decoding import TokenDecoder, settled
from internvlx_jax.inference.planning import BatchSizes, PlannedBatch, plan_batches
from internvlx_jax.inference.prompts import PromptBuilder
from internvlx_jax.inference.requests import Answer, GenerationSpec, Request
from internvlx_jax.inference.speed import Speed
from internvlx_jax.models.generation import Decoding, for_decoding
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.sharding import batch_sharding, data_parallel_size

# Requests are planned this many at a time: their image headers are read and their prompts encoded
# before the first of them is decoded.
WINDOW = 4096


class BatchGenerator:
    """Answers requests with one model on one mesh.

    All processes call `answer` alike, and each receives the answers of its own rows.

    Args:
        model: model whose parameters lie on `mesh`.
        processor: how the model reads prompts.
        mesh: devices.
        batch_size: rows of a full batch, rounded up to the data-parallel shards of the mesh.
        fit_rows: whether a batch with fewer requests has fewer rows; more shapes are compiled then.

    Raises:
        ConfigError: the processes cannot share batches evenly.
    """

    def __init__(
        self,
        model: InternVLX,
        processor: Processor,
        mesh: Mesh,
        *,
        batch_size: int,
        fit_rows: bool = False,
    ):
        shards, self.processes = data_parallel_size(mesh), jax.process_count()
        if shards % self.processes:
            raise ConfigError(
                f"{self.processes} processes cannot share batches of a multiple of {shards} rows "
                "evenly; raise mesh.data or mesh.fsdp so that each process has rows of its own"
            )
        self.mesh, self.rows = mesh, -(-batch_size // shards) * shards
        self.sizes = BatchSizes(self.rows, shards, fit_rows)
        self.prompts = PromptBuilder(processor, model.config.decoder.rope)
        self.decoder = TokenDecoder(processor.tokenizer, processor.template)
        self.speed = Speed()
        self._shapes: set[tuple[Bucket, int, int]] = set()
        self._decoder_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.decoder)))
        self.use(model)

    def use(self, model: InternVLX) -> None:
        """Goes on with other parameters of the same model."""
        self.model = for_decoding(model)

    @property
    def executables(self) -> int:
        """Number of shapes (bucket, capacity, rows) that were run; each compiles once."""
        return len(self._shapes)

    def answer(
        self, requests: Mapping[int, Request], spec: GenerationSpec
    ) -> Iterator[dict[int, Answer]]:
        """Yields answers by number, one batch at a time; a failed request gets an error instead.

        Args:
            requests: requests by number, the same on every process. The number decides the
                randomness of an answer.
            spec: how they are asked.
        """
        numbers = sorted(requests)
        for first in range(0, len(numbers), WINDOW):
            window = {number: requests[number] for number in numbers[first : first + WINDOW]}
            plan = plan_batches(window, spec, self.prompts, self.sizes)
            if plan.failed:
                yield {number: Answer.failed(error) for number, error in plan.failed.items()}
            for loaded in self._load(window, plan.batches, spec):
                yield self._generate(loaded, spec)

    def stream(self, request: Request, spec: GenerationSpec, *, number: int = 0) -> Iterator[str]:
        """Yields pieces of one answer while it is written; joined they are the answer's text.

        Raises:
            ConfigError: there are several processes.
            SampleError: the request cannot be put to the model.
        """
        if self.processes > 1:
            raise ConfigError("an answer can be streamed in one process only; use answer()")
        bucket = self.prompts.bucket(request, spec)
        batch = PlannedBatch(bucket, (number,), self.sizes.of(1))
        rows = [self.prompts.row(request, bucket, spec), *[None] * (batch.rows - 1)]
        inputs = self.prompts.inputs(rows, bucket)
        state = self._start(_Loaded(batch, (number,), {}, rows, inputs), spec)
        shown = ""
        while True:
            step = int(state.step)
            ids = np.asarray(state.tokens)[0, :step].tolist()
            text, stopped = self.decoder.read(ids, spec.stop_strings)
            ended, text = stopped or step >= spec.max_new_tokens, text.lstrip()
            text = text.rstrip() if ended else settled(text, spec.stop_strings)
            if text[len(shown) :]:
                yield text[len(shown) :]
            if ended:
                return
            shown = text
            state = self.decoder.advance(self.model, state, step + 1, spec)

    def _load(
        self,
        requests: Mapping[int, Request],
        batches: Sequence[PlannedBatch],
        spec: GenerationSpec,
    ) -> Iterator[_Loaded]:
        """Yields this process's rows of each batch; images are decoded ahead, in threads."""

        def load(batch: PlannedBatch) -> _Loaded:
            here = batch.rows // self.processes
            first = jax.process_index() * here
            numbers = batch.numbers[first : first + here]
            rows: list[Row | None] = [None] * here
            errors: dict[int, SampleError] = {}
            for i, number in enumerate(numbers):
                try:
                    rows[i] = self.prompts.row(requests[number], batch.bucket, spec)
                except SampleError as error:
                    errors[number] = error
            images = sum(len(turn) for n in numbers for turn in requests[n].images_per_turn)
            inputs = self.prompts.inputs(rows, batch.bucket)
            return _Loaded(batch, numbers, errors, rows, inputs, images)

        threads = min(4, os.cpu_count() or 1)
        return iter(
            grain.MapDataset.source(batches)
            .map(load)
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        )

    def _start(self, loaded: _Loaded, spec: GenerationSpec) -> Decoding:
        numbers = np.zeros(len(loaded.rows), np.uint32)
        numbers[: len(loaded.numbers)] = loaded.numbers
        sharding = batch_sharding(self.mesh)
        inputs, numbers = jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), (loaded.inputs, numbers)
        )
        bucket = loaded.batch.bucket
        capacity = self.prompts.capacity(bucket, spec)
        self._shapes.add((bucket, capacity, loaded.batch.rows))
        return self.decoder.start(self.model, inputs, numbers, spec, capacity=capacity)

    def _generate(self, loaded: _Loaded, spec: GenerationSpec) -> dict[int, Answer]:
        compiled, begun = self.decoder.executables, time.perf_counter()
        state = self._start(loaded, spec)
        first_steps = int(state.step)
        prefilled = time.perf_counter()
        state = self.decoder.advance(self.model, state, spec.max_new_tokens, spec)
        tokens = local_rows(state.tokens, len(loaded.rows))[:, : spec.max_new_tokens].tolist()
        steps = int(state.step)
        decoded = time.perf_counter()

        answers = {
            number: Answer.failed(loaded.errors[number])
            if row is None
            else self._read(row, ids, spec)
            for number, row, ids in zip(loaded.numbers, loaded.rows, tokens, strict=False)
        }
        if self.decoder.executables > compiled:
            costs: dict[str, float] = {"compile_seconds": decoded - begun}
        else:
            cache = jax.tree.leaves([layers.kv for layers in state.cache.ranges])
            bytes_per_step = self._decoder_bytes + sum(leaf.nbytes for leaf in cache)
            costs = {
                "prefill_seconds": prefilled - begun,
                "decode_seconds": decoded - prefilled,
                "timed_batches": 1,
                "timed_images": loaded.images,
                "timed_new_tokens": sum(answer.new_tokens for answer in answers.values()),
                "timed_steps": steps - first_steps,
                "timed_bytes": (steps - first_steps) * bytes_per_step,
            }
        self.speed += Speed.of(answers.values(), images=loaded.images, **costs)
        return answers

    def _read(self, row: Row, ids: list[int], spec: GenerationSpec) -> Answer:
        text, stopped = self.decoder.read(ids, spec.stop_strings)
        stop = self.decoder.stop_id
        new_tokens = ids.index(stop) + 1 if stop in ids else len(ids)
        finish = "stop" if stopped else "length"
        return Answer(text.strip(), len(row.tokens), len(row.tiles), new_tokens, finish)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """One batch on this process.

    Attributes:
        batch: the plan of all processes.
        numbers: requests of this process.
        errors: requests that failed while they were read.
        rows: None where there is no request, or none that can be read.
        inputs: rows as arrays.
        images: number of images in the requests.
    """

    batch: PlannedBatch
    numbers: tuple[int, ...]
    errors: dict[int, SampleError]
    rows: list[Row | None]
    inputs: Inputs
    images: int = 0


def local_rows(array: jax.Array, rows: int) -> np.ndarray:
    """Returns this process's `rows` rows of an array over the rows of all processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        first = jax.process_index() * rows
        return np.asarray(array.addressable_data(0))[first : first + rows]
    shards = {shard.index[0].start: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[first]) for first in sorted(shards)])
