"""Questions -> answers: prompts in buckets, batched decoding over devices and hosts (spec: evaluation.md 3, 9)."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.data.batch import Row, collate
from internvlx_jax.data.encode import Encoded, encode_prompt
from internvlx_jax.data.plan import Bucket, smallest_bucket
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.inference.tiling import Tiler
from internvlx_jax.models.generation import (
    Sampling,
    Vocabulary,
    advance,
    for_decoding,
    row_keys,
    start,
)
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.sharding import batch_sharding, data_parallel_size

WINDOW = 4096  # questions planned at a time: their image headers are read and their prompts encoded before any decoding
ROOM_STEP = (
    16  # room for new tokens is a power of two from here on, so that tasks share executables
)
UNPLANNED = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    """How the questions of one task are put to the model.

    Attributes:
        tiler: their images. sampling, seed: how tokens are chosen; a question keeps its randomness in any batch.
        stop_strings: texts that end an answer besides the template's stop token; they are cut off.
    """

    tiler: Tiler
    max_new_tokens: int
    min_new_tokens: int = 0
    sampling: Sampling = Sampling()
    seed: int = 0
    stop_strings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model wrote. finish: `stop`, `length`, or `error` (then `error` says why and the text is empty)."""

    text: str
    prompt_tokens: int
    tiles: int
    new_tokens: int
    finish: str
    error: str | None = None


@dataclasses.dataclass
class Speed:
    """What decoding cost on this process. Counts are of all its rows; seconds and rates leave out batches that
    compiled."""

    answers: int = 0
    images: int = 0
    tiles: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    timed_batches: int = 0
    timed_images: int = 0
    timed_new_tokens: int = 0
    timed_steps: int = 0
    timed_bytes: int = 0

    def add(self, answers: Collection[Answer], *, images: int) -> None:
        self.answers += len(answers)
        self.images += images
        self.tiles += sum(answer.tiles for answer in answers)
        self.prompt_tokens += sum(answer.prompt_tokens for answer in answers)
        self.new_tokens += sum(answer.new_tokens for answer in answers)

    def time(
        self,
        answers: Collection[Answer],
        *,
        images: int,
        prefill: float,
        decode: float,
        steps: int,
        bytes_a_step: int,
    ) -> None:
        self.prefill_seconds += prefill
        self.decode_seconds += decode
        self.timed_batches += 1
        self.timed_images += images
        self.timed_new_tokens += sum(answer.new_tokens for answer in answers)
        self.timed_steps += steps
        self.timed_bytes += steps * bytes_a_step

    def report(self) -> dict[str, float]:
        """Counts, and rates of device time; decode_gbytes_per_s counts the decoder and the cache once a step."""
        busy = self.prefill_seconds + self.decode_seconds

        def ratio(part: float, whole: float) -> float | None:
            return part / whole if whole else None

        return {name: getattr(self, name) for name in ("answers", "images", "tiles", "prompt_tokens", "new_tokens",
                                                       "compile_seconds", "prefill_seconds", "decode_seconds")} | {
            "new_tokens_per_s": ratio(self.timed_new_tokens, busy),
            "images_per_s": ratio(self.timed_images, self.prefill_seconds),
            "time_to_first_token_s": ratio(self.prefill_seconds, self.timed_batches),
            "decode_steps_per_s": ratio(self.timed_steps, self.decode_seconds),
            "decode_gbytes_per_s": ratio(self.timed_bytes / 1e9, self.decode_seconds),
        }  # fmt: skip


class BatchGenerator:
    """One model on one mesh. All processes of a job call `answer` alike, and each gets the answers of its own rows.

    Raises ConfigError when the processes cannot share batches evenly.
    """

    def __init__(self, model: InternVLX, processor: Processor, mesh: Mesh, *, batch_size: int):
        self.processor, self.mesh = processor, mesh
        self.use(model)
        shards, self.processes = data_parallel_size(mesh), jax.process_count()
        if shards % self.processes:
            raise ConfigError(
                f"{self.processes} processes cannot share batches of a multiple of {shards} rows evenly; "
                "raise mesh.data or mesh.fsdp so that each process has rows of its own"
            )
        self.rows = -(-batch_size // shards) * shards
        self.rows_here = self.rows // self.processes
        tokenizer = processor.tokenizer
        self.vocabulary = Vocabulary(
            stop_ids=(tokenizer.token_id(processor.template.stop),),
            pad_id=tokenizer.pad_id,
            bos_id=tokenizer.bos_id,
        )
        self.speed = Speed()
        self._decoder_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.decoder)))
        self.shapes: set[tuple[Bucket, int]] = set()
        static = ("sampling", "vocabulary")
        self._start = jax.jit(start, static_argnames=("max_new_tokens", *static))
        self._advance = jax.jit(advance, static_argnames=static, donate_argnames="state")

    def use(self, model: InternVLX) -> None:
        """Go on with other parameters of the same model."""
        self.model = for_decoding(model)

    @property
    def executables(self) -> int:
        """Shapes (bucket and room) that were run; each is compiled once."""
        return len(self.shapes)

    def answer(
        self, questions: Mapping[int, Question], asking: GenerationSpec
    ) -> Iterator[dict[int, Answer]]:
        """Answers by number, a batch at a time; a question that cannot be put gets an error instead.

        questions: by their number in the task, the same on every process.
        """
        numbers = sorted(questions)
        for first in range(0, len(numbers), WINDOW):
            window = {number: questions[number] for number in numbers[first : first + WINDOW]}
            groups, failed = self._plan(window, asking)
            if failed:
                yield failed
            batches = [
                (bucket, group[i : i + self.rows])
                for bucket, group in sorted(groups.items())
                for i in range(0, len(group), self.rows)
            ]
            for loaded in self._load(window, batches, asking):
                yield self._generate(loaded, asking)

    # --- planning ---------------------------------------------------------------------------------------------------

    def _plan(
        self, questions: Mapping[int, Question], asking: GenerationSpec
    ) -> tuple[dict[Bucket, list[int]], dict[int, Answer]]:
        """Numbers by bucket, and the questions that failed; the latter on the first process only, whose plan counts."""
        plan = np.full((len(questions), 3), UNPLANNED, np.int32)
        failed: dict[int, Answer] = {}
        if jax.process_index() == 0:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                shapes = pool.map(
                    lambda question: self._shape(question, asking), questions.values()
                )
                for row, (number, shape) in enumerate(zip(questions, shapes)):
                    if isinstance(shape, SampleError):
                        failed[number] = failure(shape)
                    else:
                        plan[row] = dataclasses.astuple(shape)
        if self.processes > 1:
            plan = np.asarray(multihost_utils.broadcast_one_to_all(plan))
        groups: dict[Bucket, list[int]] = defaultdict(list)
        for number, shape in zip(questions, plan.tolist()):
            if UNPLANNED not in shape:
                groups[Bucket(*shape)].append(number)
        return groups, failed

    def _shape(self, question: Question, asking: GenerationSpec) -> Bucket | SampleError:
        try:
            blocks = asking.tiler.counts(question.images)
        except SampleError as error:
            return error.at(question.where)
        try:
            length = len(self._prompt(question, blocks).tokens)
            bucket = smallest_bucket(
                sum(blocks), length, saved_per_tile=self.processor.saved_per_tile
            )
            rope = self.model.config.decoder.rope
            if bucket.length + asking.max_new_tokens > rope.max_positions and not rope.allow_longer:
                raise SampleError(
                    "too_long",
                    f"a prompt of {length} tokens (padded to {bucket.length}) and {asking.max_new_tokens} "
                    f"new ones are more than the decoder's {rope.max_positions} positions.",
                    "Lower max_num or max_new_tokens, or shorten the question.",
                    question.where,
                )
            return bucket
        except SampleError as error:
            return error

    def _prompt(self, question: Question, blocks: Sequence[int]) -> Encoded:
        processor = self.processor
        try:
            return encode_prompt(
                question.prompt,
                system=processor.system_message,
                template=processor.template,
                tokenizer=processor.tokenizer,
                tiles_per_image=blocks,
                tokens_per_tile=processor.tokens_per_tile,
                special_text=processor.special_text,
            )
        except SampleError as error:
            raise error.at(question.where) from None

    # --- loading ----------------------------------------------------------------------------------------------------

    def _load(
        self,
        questions: Mapping[int, Question],
        batches: list[tuple[Bucket, list[int]]],
        asking: GenerationSpec,
    ) -> Iterator[_Loaded]:
        """This process's rows of each batch; images are decoded ahead, in threads."""
        first = jax.process_index() * self.rows_here

        def load(batch: tuple[Bucket, list[int]]) -> _Loaded:
            bucket, everyones = batch
            numbers = everyones[first : first + self.rows_here]
            rows: list[Row | None] = []
            errors: dict[int, SampleError] = {}
            for number in numbers:
                try:
                    rows.append(self._row(questions[number], bucket, asking))
                except SampleError as error:
                    rows.append(None)
                    errors[number] = error
            rows += [None] * (self.rows_here - len(rows))
            processor = self.processor
            inputs = collate(
                rows,
                bucket,
                tile_size=processor.tiles.tile_size,
                tokens_per_tile=processor.tokens_per_tile,
                pad_id=processor.tokenizer.pad_id,
                lvtc=processor.lvtc,
            ).inputs
            images = sum(len(questions[number].images) for number in numbers)
            return _Loaded(bucket, numbers, errors, rows, inputs, images)

        threads = min(4, os.cpu_count() or 1)
        return iter(
            grain.MapDataset.source(batches)
            .map(load)
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        )

    def _row(self, question: Question, bucket: Bucket, asking: GenerationSpec) -> Row:
        try:
            tiles = asking.tiler.cut(question.images, question.where)
        except SampleError as error:
            raise error.at(question.where) from None
        prompt = self._prompt(question, asking.tiler.blocks([len(image) for image in tiles]))
        row = Row(
            prompt.tokens, prompt.labels, prompt.tile_start, self.processor.concatenate(tiles)
        )
        if len(row.tokens) > bucket.length or len(row.tiles) > bucket.tiles:
            raise SampleError(
                "size_mismatch",
                "the images are not those that were there when the job began.",
                "Run it again.",
                question.where,
            )
        return row

    # --- decoding ---------------------------------------------------------------------------------------------------

    def _generate(self, loaded: _Loaded, asking: GenerationSpec) -> dict[int, Answer]:
        room = self._room(loaded.bucket, asking)
        options = dict(sampling=asking.sampling, vocabulary=self.vocabulary)
        numbers = np.zeros(self.rows_here, np.uint32)
        numbers[: len(loaded.numbers)] = loaded.numbers
        sharding = batch_sharding(self.mesh)
        inputs, numbers = jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), (loaded.inputs, numbers)
        )
        compiled, begun = self._compiled(), time.perf_counter()
        state = self._start(
            self.model,
            inputs,
            row_keys(asking.seed, numbers),
            asking.min_new_tokens,
            max_new_tokens=room,
            **options,
        )
        first_steps = int(state.step)
        prefilled = time.perf_counter()
        state = self._advance(
            self.model, state, asking.max_new_tokens, asking.min_new_tokens, **options
        )
        tokens, steps = (
            self._local(state.tokens)[:, : asking.max_new_tokens].tolist(),
            int(state.step),
        )
        decoded = time.perf_counter()

        self.shapes.add((loaded.bucket, room))
        answers = {
            number: failure(loaded.errors[number]) if row is None else self._read(row, ids, asking)
            for number, row, ids in zip(loaded.numbers, loaded.rows, tokens)
        }
        self.speed.add(answers.values(), images=loaded.images)
        if self._compiled() > compiled:
            self.speed.compile_seconds += decoded - begun
        else:
            cache = sum(
                leaf.nbytes
                for leaf in jax.tree.leaves([layers.kv for layers in state.cache.ranges])
            )
            self.speed.time(
                answers.values(),
                images=loaded.images,
                prefill=prefilled - begun,
                decode=decoded - prefilled,
                steps=steps - first_steps,
                bytes_a_step=self._decoder_bytes + cache,
            )
        return answers

    def _room(self, bucket: Bucket, asking: GenerationSpec) -> int:
        """Slots for new tokens: rounded up, as far as the decoder's positions allow."""
        room = ROOM_STEP
        while room < asking.max_new_tokens:
            room *= 2
        rope = self.model.config.decoder.rope
        return room if rope.allow_longer else min(room, rope.max_positions - bucket.length)

    def _local(self, array: jax.Array) -> np.ndarray:
        """This process's rows of an array over all rows."""
        if array.is_fully_addressable:
            return np.asarray(array)
        if array.is_fully_replicated:
            first = jax.process_index() * self.rows_here
            return np.asarray(array.addressable_data(0))[first : first + self.rows_here]
        shards = {shard.index[0].start: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(shards[first]) for first in sorted(shards)])

    def _compiled(self) -> int:
        return self._start._cache_size() + self._advance._cache_size()

    def _read(self, row: Row, ids: list[int], asking: GenerationSpec) -> Answer:
        (stop,) = self.vocabulary.stop_ids
        text, stopped = read_answer(self.processor.tokenizer, ids, stop, asking.stop_strings)
        new_tokens = ids.index(stop) + 1 if stop in ids else len(ids)
        return Answer(
            text.strip(),
            len(row.tokens),
            len(row.tiles),
            new_tokens,
            "stop" if stopped else "length",
        )


def read_answer(
    tokenizer: Tokenizer, ids: Sequence[int], stop_id: int, stop_strings: Sequence[str] = ()
) -> tuple[str, bool]:
    """(text in front of the stop id and of all stop strings, whether one of them is there)."""
    stopped = stop_id in ids
    ids = ids[: ids.index(stop_id)] if stopped else ids
    # The model may have more rows than the tokenizer has ids; those have no text.
    text = tokenizer.decode(id for id in ids if id < tokenizer.vocab_size)
    end = min([text.find(stop) for stop in stop_strings if stop in text], default=len(text))
    return text[:end], stopped or end < len(text)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """One batch on this process: `rows` is None where there is no question, or none that can be read."""

    bucket: Bucket
    numbers: list[int]
    errors: dict[int, SampleError]
    rows: list[Row | None]
    inputs: Inputs
    images: int


def failure(error: SampleError) -> Answer:
    return Answer("", 0, 0, 0, "error", str(error))
