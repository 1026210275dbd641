"""Answers the turns of one conversation on one cache (design: serving.md 4).

The cache holds the tokens that were read and written so far. The next prompt is encoded as a whole,
as ever; what it has in common with those tokens from the beginning on is kept, and the rest is run.
So an answer is the one that the whole prompt gives, also where the text of an earlier answer is
encoded in other tokens than the model wrote.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from internvlx_jax.core.errors import SampleError
from internvlx_jax.data.batch import Row
from internvlx_jax.data.buckets import Bucket, smallest_bucket
from internvlx_jax.data.images import ImageSource
from internvlx_jax.inference.batch_generator import BatchGenerator, settled
from internvlx_jax.inference.batches import PromptBuilder, count_tiles, cut_images, located
from internvlx_jax.inference.requests import GenerationSpec, Request, Tiler
from internvlx_jax.models.continuation import enlarged, extend, keeps_rotation
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.serving_slots import (
    Slots,
    admit,
    decode,
    empty_slots,
    one_row,
    slot_shardings,
)
from internvlx_jax.models.sharding import data_parallel_size

LEAST_CAPACITY = 256
LEAST_LENGTH = 32  # of the new part of a prompt; lengths double from there
# Scores of a new part with all keys, which exist at once; larger parts run with their whole prompt.
MOST_SCORES = 2**28


@dataclasses.dataclass(frozen=True)
class Kept:
    """A cache and what it holds.

    Attributes:
        slots: one row.
        tokens: what its keys are of, in order, and the newest token, which has none yet.
        turns: images of each turn of the prompt.
        tiler: how they became tiles.
        model: whose keys they are.
    """

    slots: Slots
    tokens: np.ndarray
    turns: tuple[tuple[ImageSource, ...], ...]
    tiler: Tiler
    model: InternVLX

    @property
    def capacity(self) -> int:
        """Tokens that the cache has room for."""
        return self.slots.cache.ranges[-1].segments.shape[1]

    def begins(self, request: Request, spec: GenerationSpec, model: InternVLX) -> bool:
        """Returns whether its tokens, as far as they agree, are the beginning of a prompt.

        Tokens tell a turn with images from one without, but not one image from another.
        """
        return (
            self.model is model
            and self.tiler == spec.tiler
            and all(
                _same(kept, images) or not (kept and images)
                for kept, images in zip(self.turns, request.images_per_turn, strict=False)
            )
        )


def _same(one: tuple[ImageSource, ...], other: tuple[ImageSource, ...]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


class Part(NamedTuple):
    """The part of a prompt that the cache does not hold.

    Attributes:
        row: its tokens and tiles; `tile_start` counts from its first token.
        prompt: int32[n], tokens of the whole prompt.
        kept: tokens in front of it.
        tiles: tiles in front of it.
    """

    row: Row
    prompt: np.ndarray
    kept: int
    tiles: int


class Conversations:
    """Programs that all conversations of a model share; each shape is compiled once.

    Args:
        generator: the model, and how it reads prompts.
    """

    def __init__(self, generator: BatchGenerator):
        self.generator = generator
        vocabulary = generator.reader.vocabulary
        empty = functools.partial(empty_slots, slots=1)
        shapes = jax.eval_shape(functools.partial(empty, capacity=8), generator.model)
        shardings = slot_shardings(shapes, generator.mesh)
        jit = functools.partial(jax.jit, donate_argnums=1, out_shardings=(shardings, None))
        self.admit = jit(functools.partial(admit, vocabulary=vocabulary))
        self.extend = jit(functools.partial(extend, vocabulary=vocabulary))
        self.decode = jit(functools.partial(decode, most=1, vocabulary=vocabulary))
        self.empty = jax.jit(empty, static_argnames="capacity", out_shardings=shardings)
        self.enlarge = jax.jit(enlarged, static_argnums=1, out_shardings=shardings)

    @property
    def programs(self) -> int:
        """Number of programs compiled so far."""
        programs = (self.admit, self.extend, self.decode, self.empty, self.enlarge)
        return sum(p._cache_size() for p in programs)  # pyright: ignore[reportAttributeAccessIssue]

    def can_keep(self, spec: GenerationSpec, capacity: int) -> bool:
        """Returns whether a cache of this size can be kept between turns."""
        rope = self.generator.prompts.rope
        return (
            keeps_rotation(rope, capacity)
            and spec.min_new_tokens == 0  # the rows of `decode` have none
            and data_parallel_size(self.generator.mesh) == 1
        )


class Conversation:
    """The cache of one conversation, at most one answer at a time.

    Attributes:
        kept: what the last answer left; None while an answer is written, and before the first.
        prefilled: tokens of the newest prompt that were run; the others were kept.
    """

    def __init__(self, programs: Conversations):
        self.programs = programs
        self.kept: Kept | None = None
        self.prefilled = 0

    def forget(self) -> None:
        """Frees the cache."""
        self.kept = None

    def stream(self, request: Request, spec: GenerationSpec) -> Iterator[str]:
        """Yields pieces of one answer, as `BatchGenerator.stream` does.

        Raises:
            SampleError: the request cannot be put to the model; the cache stays as it is.
        """
        generator, number = self.programs.generator, len(request.history)
        bucket = generator.prompts.bucket(request, spec)
        capacity = _capacity(bucket.length + spec.max_new_tokens, generator.prompts)
        if not self.programs.can_keep(spec, capacity):
            self.forget()
            self.prefilled = bucket.length
            yield from generator.stream(request, spec, number=number)
            return
        state, prompt, ids = self._begin(request, spec, bucket, capacity)
        shown = ""
        try:
            while state is not None:
                text, stopped = generator.reader.read(ids, spec.stop_strings)
                ended = stopped or len(ids) >= spec.max_new_tokens
                text = text.lstrip()
                text = text.rstrip() if ended else settled(text, spec.stop_strings)
                if text[len(shown) :]:
                    yield text[len(shown) :]
                if ended:
                    return
                shown = text
                slots, state = state.slots, None  # what a step that fails has taken is lost
                slots, tokens = self.programs.decode(
                    generator.model, slots, np.zeros(1, bool), np.int32(1)
                )
                ids.append(int(tokens[0, 0]))
                state = self._kept(slots, prompt, request, spec)
        finally:
            if state is not None:
                known = np.append(prompt, ids).astype(np.int32)
                self.kept = dataclasses.replace(state, tokens=known)

    def _begin(
        self, request: Request, spec: GenerationSpec, bucket: Bucket, capacity: int
    ) -> tuple[Kept, np.ndarray, list[int]]:
        """Runs a prompt, or its new part; returns the cache, the prompt and the first token."""
        programs, prompts = self.programs, self.programs.generator.prompts
        model = programs.generator.model
        how = one_row(spec.sampling, spec.seed, len(request.history))
        limit = np.int32(spec.max_new_tokens)
        part, room = None, None
        if self.kept is not None and self.kept.begins(request, spec, model):
            part = new_part(prompts, request, spec, self.kept.tokens[:-1])
            room = None if part is None else self._room(self.kept, part, capacity)
        if part is None or room is None:
            row = prompts.row(request, bucket, spec)
            inputs = prompts.inputs([row], bucket)
            self.kept, prompt = None, row.tokens
            slots = programs.empty(model, capacity=capacity)
            slots, token = programs.admit(model, slots, inputs, np.int32(0), limit, how)
        else:
            (slots, shape), row, prompt = room, part.row, part.prompt
            inputs = prompts.inputs([row], shape)
            inputs = inputs._replace(positions=inputs.positions + np.int32(part.kept))
            # Taken, so that a second stream of this conversation does not use the same arrays.
            self.kept, kept = None, _kept_slots(part, prompts)
            slots, token = programs.extend(model, slots, inputs, kept, limit, how)
        self.prefilled = len(row.tokens)
        return self._kept(slots, prompt, request, spec), prompt, [int(token)]

    def _kept(
        self, slots: Slots, tokens: np.ndarray, request: Request, spec: GenerationSpec
    ) -> Kept:
        turns = request.images_per_turn
        return Kept(slots, tokens, turns, spec.tiler, self.programs.generator.model)

    def _room(self, kept: Kept, part: Part, capacity: int) -> tuple[Slots, Bucket] | None:
        """Returns the cache with room for a new part, and the shape of it; None without room."""
        prompts, config = self.programs.generator.prompts, self.programs.generator.model.config
        length = LEAST_LENGTH
        while length < len(part.row.tokens):
            length *= 2
        needed = part.kept + length
        capacity = _capacity(max(capacity, kept.capacity, needed), prompts)
        scores = config.decoder.heads * length * (capacity + length)
        if (
            capacity < needed
            or scores > MOST_SCORES
            or not keeps_rotation(config.decoder.rope, capacity)
        ):
            return None
        saved = prompts.processor.saved_per_tile
        slots = kept.slots
        if capacity > kept.capacity:
            slots = self.programs.enlarge(slots, capacity)
        return slots, smallest_bucket(len(part.row.tiles), length, 1, saved)


def new_part(
    prompts: PromptBuilder, request: Request, spec: GenerationSpec, known: np.ndarray
) -> Part | None:
    """Returns the part of a prompt behind the tokens that it shares with `known`.

    Images of the shared part are not decoded.

    Args:
        prompts: makes rows of requests.
        request: the conversation.
        spec: how it is asked.
        known: int32[n], tokens whose keys are kept.

    Returns:
        The part; None if a tile is only half in it.

    Raises:
        SampleError: an image cannot be decoded, or its size has changed.
    """
    with located(request.where):
        blocks = [count_tiles(spec.tiler, images) for images in request.images_per_turn]
        encoded = prompts.encode(request, blocks)
        tokens, starts = encoded.tokens, encoded.tile_start
        # The last token runs in any case: its logits choose the first one of the answer.
        longest = min(len(known), len(tokens) - 1)
        differs = np.flatnonzero(known[:longest] != tokens[:longest])
        kept = int(differs[0]) if len(differs) else longest
        before = int((starts < kept).sum())
        if before and starts[before - 1] + prompts.processor.tokens_per_tile > kept:
            return None
        size, tiles, passed = spec.tiler.tiles.tile_size, [], 0
        for images, counts in zip(request.images_per_turn, blocks, strict=True):
            if passed + sum(counts) > before:
                tiles += cut_images(spec.tiler, images, request.where)
            else:
                passed += sum(counts)
        new = np.concatenate([np.zeros((0, size, size, 3), np.uint8), *tiles])[before - passed :]
        if len(new) != len(starts) - before:
            raise SampleError(
                "size_mismatch",
                "an image has another size than when it was counted.",
                "Leave the images as they are while they are read.",
            )
        start = (starts[before:] - kept).astype(np.int32)
        row = Row(tokens[kept:], encoded.labels[kept:], start, new)
        return Part(row, tokens, kept, before)


def _kept_slots(part: Part, prompts: PromptBuilder) -> np.ndarray:
    """Returns int32[ranges], the slots of each layer range in front of a part."""
    processor = prompts.processor
    if processor.lvtc is None:
        return np.array([part.kept], np.int32)
    return np.array([part.kept - part.tiles * processor.saved_per_tile, part.kept], np.int32)


def _capacity(tokens: int, prompts: PromptBuilder) -> int:
    """Returns the room of a cache: a power of two, so that conversations share programs."""
    capacity = LEAST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    return capacity if prompts.rope.allow_longer else min(capacity, prompts.rope.max_positions)
