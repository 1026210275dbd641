"""Answers requests in batches over devices and hosts, or streams one answer.

(design: evaluation.md 3, 9)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.batch import Row
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.templates import Template
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.inference.batches import (
    BatchSizes,
    LoadedBatch,
    PlannedBatch,
    PromptBuilder,
    prepare_batches,
)
from internvlx_jax.inference.requests import Answer, GenerationSpec, Request
from internvlx_jax.inference.speed import Speed
from internvlx_jax.models.generation import (
    Decoding,
    Vocabulary,
    advance,
    for_decoding,
    row_keys,
    start,
)
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.sharding import batch_sharding, data_parallel_size

SMALLEST_CAPACITY = 16
# What the tokenizer writes for a character whose last bytes are still to come.
UNFINISHED = "\ufffd"


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
        self.reader = AnswerReader(processor.tokenizer, processor.template)
        # Each combination of shapes and sampling compiles once.
        static = ("sampling", "vocabulary")
        self._run_start = jax.jit(start, static_argnames=("max_new_tokens", *static))
        self._run_advance = jax.jit(advance, static_argnames=static, donate_argnames="state")
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

    @property
    def programs(self) -> int:
        """Number of programs compiled so far."""
        # jax has no public count of the programs of a jitted function.
        programs = (self._run_start, self._run_advance)
        return sum(p._cache_size() for p in programs)  # pyright: ignore[reportAttributeAccessIssue]

    def answer(
        self, requests: Mapping[int, Request], spec: GenerationSpec
    ) -> Iterator[dict[int, Answer]]:
        """Yields answers by number, one batch at a time; a failed request gets an error instead.

        Args:
            requests: requests by number, the same on every process. The number decides the
                randomness of an answer.
            spec: how they are asked.
        """
        for batch in prepare_batches(requests, spec, self.prompts, self.sizes):
            if isinstance(batch, LoadedBatch):
                yield self._generate(batch, spec)
            else:
                yield {number: Answer.failed(error) for number, error in batch.items()}

    def stream(self, request: Request, spec: GenerationSpec, *, number: int = 0) -> Iterator[str]:
        """Yields pieces of one answer while it is written; joined they are the answer's text.

        Raises:
            ConfigError: there are several processes.
            SampleError: the request cannot be put to the model.
        """
        if self.processes > 1:
            raise ConfigError("an answer can be streamed in one process only; use answer()")
        batch = PlannedBatch(self.prompts.bucket(request, spec), (number,), self.sizes.of(1))
        loaded = self.prompts.load(batch, {number: request}, spec)
        for error in loaded.errors.values():
            raise error
        state = self._start(loaded, spec)
        shown = ""
        while True:
            step = int(state.step)
            ids = np.asarray(state.tokens)[0, :step].tolist()
            text, stopped = self.reader.read(ids, spec.stop_strings)
            ended, text = stopped or step >= spec.max_new_tokens, text.lstrip()
            text = text.rstrip() if ended else settled(text, spec.stop_strings)
            if text[len(shown) :]:
                yield text[len(shown) :]
            if ended:
                return
            shown = text
            state = self._advance(state, step + 1, spec)

    def _start(self, loaded: LoadedBatch, spec: GenerationSpec) -> Decoding:
        """Runs the prompts of a batch and chooses the first token of each row."""
        numbers = np.zeros(len(loaded.rows), np.uint32)
        numbers[: len(loaded.numbers)] = loaded.numbers
        sharding = batch_sharding(self.mesh)
        inputs, numbers = jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), (loaded.inputs, numbers)
        )
        bucket = loaded.batch.bucket
        capacity = self._capacity(bucket, spec)
        self._shapes.add((bucket, capacity, loaded.batch.rows))
        return self._run_start(
            self.model,
            inputs,
            row_keys(spec.seed, numbers),  # with the seed, the randomness of each row
            spec.min_new_tokens,
            max_new_tokens=capacity,
            sampling=spec.sampling,
            vocabulary=self.reader.vocabulary,
        )

    def _capacity(self, bucket: Bucket, spec: GenerationSpec) -> int:
        """Returns the cache slots for new tokens: a power of two, so that specs share executables.

        The decoder's positions bound it.
        """
        capacity = SMALLEST_CAPACITY
        while capacity < spec.max_new_tokens:
            capacity *= 2
        rope = self.prompts.rope
        return capacity if rope.allow_longer else min(capacity, rope.max_positions - bucket.length)

    def _advance(self, state: Decoding, until: int, spec: GenerationSpec) -> Decoding:
        """Goes on until `until` tokens are written or every row has stopped; consumes `state`."""
        return self._run_advance(
            self.model,
            state,
            until,
            spec.min_new_tokens,
            sampling=spec.sampling,
            vocabulary=self.reader.vocabulary,
        )

    def _generate(self, loaded: LoadedBatch, spec: GenerationSpec) -> dict[int, Answer]:
        compiled, begun = self.programs, time.perf_counter()
        state = self._start(loaded, spec)
        first_steps = int(state.step)
        prefilled = time.perf_counter()
        state = self._advance(state, spec.max_new_tokens, spec)
        tokens = local_rows(state.tokens, len(loaded.rows))[:, : spec.max_new_tokens].tolist()
        steps = int(state.step)
        decoded = time.perf_counter()

        answers = {
            number: Answer.failed(loaded.errors[number])
            if row is None
            else self._read(row, ids, spec)
            for number, row, ids in zip(loaded.numbers, loaded.rows, tokens, strict=False)
        }
        if self.programs > compiled:
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
        text, stopped = self.reader.read(ids, spec.stop_strings)
        stop = self.reader.stop_id
        new_tokens = ids.index(stop) + 1 if stop in ids else len(ids)
        finish = "stop" if stopped else "length"
        return Answer(text.strip(), len(row.tokens), len(row.tiles), new_tokens, finish)


@dataclasses.dataclass(frozen=True)
class AnswerReader:
    """Reads text from the token ids of an answer.

    Attributes:
        tokenizer: of the model.
        template: of the model; its stop token ends an answer.
    """

    tokenizer: Tokenizer
    template: Template

    @property
    def stop_id(self) -> int:
        """Id of the stop token."""
        return self.tokenizer.token_id(self.template.stop)

    @property
    def vocabulary(self) -> Vocabulary:
        """Ids that have a meaning while decoding."""
        pad, bos = self.tokenizer.pad_id, self.tokenizer.bos_id
        return Vocabulary(stop_ids=(self.stop_id,), pad_id=pad, bos_id=pad if bos is None else bos)

    def read(self, ids: Sequence[int], stop_strings: Sequence[str] = ()) -> tuple[str, bool]:
        """Returns the text before the stop token and all stop strings, and whether one occurs."""
        stopped = self.stop_id in ids
        ids = ids[: ids.index(self.stop_id)] if stopped else ids
        # The model may have more rows than the tokenizer has ids; those have no text.
        text = self.tokenizer.decode(id for id in ids if id < self.tokenizer.vocab_size)
        end = min([text.find(stop) for stop in stop_strings if stop in text], default=len(text))
        return text[:end], stopped or end < len(text)


def settled(text: str, stop_strings: Sequence[str] = ()) -> str:
    """Returns the part of an unfinished answer that further tokens leave as it is.

    Half a character, the beginning of a stop string and trailing white space may still change.
    """
    text = text.rstrip(UNFINISHED)
    partial = max(
        (
            length
            for stop in stop_strings
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ),
        default=0,
    )
    return text[: len(text) - partial].rstrip()


def local_rows(array: jax.Array, rows: int) -> np.ndarray:
    """Returns this process's `rows` rows of an array over the rows of all processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        first = jax.process_index() * rows
        return np.asarray(array.addressable_data(0))[first : first + rows]
    shards = {shard.index[0].start: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[first]) for first in sorted(shards)])
