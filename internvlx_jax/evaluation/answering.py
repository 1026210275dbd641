"""Questions -> answers: prompts in buckets, batched greedy decoding (spec: evaluation.md 3)."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from internvlx_jax.convert.load import Pretrained
from internvlx_jax.data.batch import Batch, Row, collate
from internvlx_jax.data.encode import encode_prompt
from internvlx_jax.data.errors import SampleError
from internvlx_jax.data.plan import Bucket, smallest_bucket
from internvlx_jax.data.processor import Processor
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.models.generate import greedy
from internvlx_jax.training.sharding import batch_sharding, data_parallel_size


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model wrote. finish: `stop`, `length`, or `error` (then `error` says why and the text is empty)."""

    question: Question
    text: str
    prompt_tokens: int
    tiles: int
    new_tokens: int
    finish: str
    error: str | None = None


class Answerer:
    """Greedy decoding of one loaded model on one mesh; `executables` counts the shapes it ran."""

    def __init__(self, pretrained: Pretrained, processor: Processor, mesh: Mesh, *, batch_size: int,
                 max_new_tokens: int):
        self.model, self.processor, self.mesh = pretrained.model, processor, mesh
        self.max_new_tokens = max_new_tokens
        shards = data_parallel_size(mesh)
        self.rows = -(-batch_size // shards) * shards
        self.stop_id = processor.tokenizer.token_id(processor.template.stop)
        self._buckets: set[Bucket] = set()
        self._greedy = jax.jit(greedy, static_argnames=("max_new_tokens", "stop_ids", "pad_id"))

    @property
    def executables(self) -> int:
        return len(self._buckets)

    def answer(self, questions: Sequence[Question], report: Callable[[int], None] = lambda done: None) -> list[Answer]:
        """One answer a question, in order; a question whose images cannot be read gets an error instead."""
        answers: dict[int, Answer] = {}
        groups: dict[Bucket, list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            try:
                groups[self._bucket(question)].append(index)
            except SampleError as error:
                answers[index] = failure(question, error)
        batches = [(bucket, indices[i : i + self.rows]) for bucket, indices in sorted(groups.items())
                   for i in range(0, len(indices), self.rows)]
        self._buckets |= groups.keys()
        for loaded in self._load(questions, batches):
            answers |= self._generate(questions, loaded)
            report(len(answers))
        return [answers[index] for index in range(len(questions))]

    def _bucket(self, question: Question) -> Bucket:
        tiles = self.processor.tiles_per_image(self.processor.sizes(question.images, question.where))
        length = len(self._prompt(question, tiles).tokens)
        bucket = smallest_bucket(sum(tiles), length, saved_per_tile=self.processor.saved_per_tile)
        rope = self.model.config.decoder.rope
        if bucket.length + self.max_new_tokens > rope.max_positions and not rope.allow_longer:
            raise SampleError(
                "too_long", f"a prompt of {length} tokens (padded to {bucket.length}) and {self.max_new_tokens} new ones "
                f"are more than the decoder's {rope.max_positions} positions.",
                "Lower max_num or max_new_tokens, or shorten the question.", question.where)
        return bucket

    def _prompt(self, question: Question, tiles: Sequence[int]):
        processor = self.processor
        try:
            return encode_prompt(question.text, system=processor.system_message, template=processor.template,
                                 tokenizer=processor.tokenizer, tiles_per_image=tiles,
                                 tokens_per_tile=processor.tokens_per_tile, special_text=processor.special_text)
        except SampleError as error:
            raise error.at(question.where) from None

    def _load(self, questions: Sequence[Question], batches: list[tuple[Bucket, list[int]]]) -> Iterator[_Loaded]:
        """Decode images ahead, in threads."""

        def load(batch: tuple[Bucket, list[int]]) -> _Loaded:
            bucket, indices = batch
            rows: list[Row | None] = []
            errors: dict[int, SampleError] = {}
            for index in indices:
                try:
                    rows.append(self._row(questions[index]))
                except SampleError as error:
                    rows.append(None)
                    errors[index] = error
            rows += [None] * (self.rows - len(rows))
            processor = self.processor
            return _Loaded(indices, errors, rows, collate(
                rows, bucket, tile_size=processor.tiles.tile_size, tokens_per_tile=processor.tokens_per_tile,
                pad_id=processor.tokenizer.pad_id, lvtc=processor.lvtc))

        threads = min(4, os.cpu_count() or 1)
        return iter(grain.MapDataset.source(batches).map(load).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))

    def _row(self, question: Question) -> Row:
        tiles = self.processor.cut(question.images, question.where)
        prompt = self._prompt(question, [len(image) for image in tiles])
        return Row(prompt.tokens, prompt.labels, prompt.tile_start, self.processor.concatenate(tiles))

    def _generate(self, questions: Sequence[Question], loaded: _Loaded) -> dict[int, Answer]:
        tokenizer = self.processor.tokenizer
        inputs = jax.device_put(loaded.batch.inputs, batch_sharding(self.mesh))
        tokens, _ = self._greedy(self.model, inputs, max_new_tokens=self.max_new_tokens, stop_ids=(self.stop_id,),
                                 pad_id=tokenizer.pad_id)
        answers = {}
        for index, row, ids in zip(loaded.indices, loaded.rows, np.asarray(tokens).tolist()):
            if row is None:
                answers[index] = failure(questions[index], loaded.errors[index])
                continue
            stopped = self.stop_id in ids
            new = ids[: ids.index(self.stop_id)] if stopped else ids
            # The model may have more rows than the tokenizer has ids; those have no text.
            text = tokenizer.decode(id for id in new if id < tokenizer.vocab_size).strip()
            answers[index] = Answer(questions[index], text, len(row.tokens), len(row.tiles), len(new) + stopped,
                                    "stop" if stopped else "length")
        return answers


@dataclasses.dataclass(frozen=True)
class _Loaded:
    indices: list[int]
    errors: dict[int, SampleError]
    rows: list[Row | None]
    batch: Batch


def failure(question: Question, error: SampleError) -> Answer:
    return Answer(question, "", 0, 0, 0, "error", str(error))
