"""Builds the rows of a batch: the one place where a conversation becomes model inputs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import RopeConfig
from internvlx_jax.data.batch import Row, collate
from internvlx_jax.data.buckets import Bucket, smallest_bucket
from internvlx_jax.data.encode import Encoded, encode_prompt
from internvlx_jax.data.processor import Processor
from internvlx_jax.inference.requests import GenerationSpec, Request

SMALLEST_CAPACITY = 16


@dataclasses.dataclass(frozen=True)
class PromptBuilder:
    """Turns requests into rows for one model.

    Attributes:
        processor: tokenizer, template and tiles of the model.
        rope: positions of its decoder, which bound prompt and answer together.
    """

    processor: Processor
    rope: RopeConfig

    def bucket(self, request: Request, spec: GenerationSpec) -> Bucket:
        """Returns the shape that the request needs, from image headers alone.

        Raises:
            SampleError: an image or a placeholder is wrong, or the prompt is too long.
        """
        with located(request.where):
            turns = [spec.tiler.counts(images) for images in request.images_per_turn]
            counts = [n for blocks in turns for n in blocks]
            length = len(self._encode(request, turns).tokens)
            bucket = smallest_bucket(
                sum(counts), length, saved_per_tile=self.processor.saved_per_tile
            )
            total = bucket.length + spec.max_new_tokens
            if total > self.rope.max_positions and not self.rope.allow_longer:
                raise SampleError(
                    "too_long",
                    f"a prompt of {length} tokens (padded to {bucket.length}) and "
                    f"{spec.max_new_tokens} new ones are more than the decoder's "
                    f"{self.rope.max_positions} positions.",
                    "Lower max_num or max_new_tokens, or shorten the prompt or its history.",
                )
            return bucket

    def row(self, request: Request, bucket: Bucket, spec: GenerationSpec) -> Row:
        """Returns the tokens and tiles of the request.

        Raises:
            SampleError: an image cannot be decoded, or it has changed since `bucket` was chosen.
        """
        with located(request.where):
            turns = [spec.tiler.cut(images, request.where) for images in request.images_per_turn]
            blocks = [spec.tiler.blocks(list(map(len, tiles))) for tiles in turns]
            encoded = self._encode(request, blocks)
            size = spec.tiler.tiles.tile_size
            no_tiles = np.zeros((0, size, size, 3), np.uint8)
            tiles = np.concatenate([no_tiles, *(image for images in turns for image in images)])
            if len(encoded.tokens) > bucket.length or len(tiles) > bucket.tiles:
                raise SampleError(
                    "size_mismatch",
                    "an image has another size than when its batch was planned.",
                    "Leave the images as they are while they are read, and run it again.",
                )
            return Row(encoded.tokens, encoded.labels, encoded.tile_start, tiles)

    def inputs(self, rows: Sequence[Row | None], bucket: Bucket) -> Inputs:
        """Returns a batch of the rows; None is an empty row."""
        return collate(
            rows,
            bucket,
            tile_size=self.processor.tiles.tile_size,
            tokens_per_tile=self.processor.tokens_per_tile,
            pad_id=self.processor.tokenizer.pad_id,
            lvtc=self.processor.lvtc,
        ).inputs

    def capacity(self, bucket: Bucket, spec: GenerationSpec) -> int:
        """Returns the cache slots for new tokens: a power of two, so that specs share executables.

        The decoder's positions bound it.
        """
        capacity = SMALLEST_CAPACITY
        while capacity < spec.max_new_tokens:
            capacity *= 2
        rope = self.rope
        return capacity if rope.allow_longer else min(capacity, rope.max_positions - bucket.length)

    def _encode(self, request: Request, turns: Sequence[Sequence[int]]) -> Encoded:
        """Encodes a request whose turns have image blocks of so many tiles."""
        processor = self.processor
        return encode_prompt(
            request.prompt,
            history=[(turn.prompt, turn.answer) for turn in request.history],
            system=processor.system_message if request.system is None else request.system,
            template=processor.template,
            tokenizer=processor.tokenizer,
            tiles_per_image=[tiles for blocks in turns for tiles in blocks],
            images_per_turn=list(map(len, turns)),
            tokens_per_tile=processor.tokens_per_tile,
            special_text=processor.special_text,
        )


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Names the request in front of every SampleError of the block."""
    try:
        yield
    except SampleError as error:
        if not where:
            raise
        raise error.at(where) from error.__cause__
