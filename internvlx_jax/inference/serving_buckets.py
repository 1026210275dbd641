"""The few shapes of prompts that a server compiles before it answers (design: serving.md 2)."""

from __future__ import annotations

import dataclasses

import numpy as np

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.core.model_config import RopeConfig
from internvlx_jax.data.batch import Row
from internvlx_jax.data.buckets import LENGTH_STEP, Bucket, round_up
from internvlx_jax.data.images import check_pixels, image_size
from internvlx_jax.data.processor import Processor
from internvlx_jax.inference.batches import PromptBuilder, count_tiles, located
from internvlx_jax.inference.requests import GenerationSpec, Request

MOST_CAPACITY = 8192
# Tile slots of the shapes: text, one tile, and steps that waste at most half of the tower's work.
TILE_STEPS = (0, 1, 2, 4, 7, 13, 24, 48, 96)
# Text around the images of the smallest shape; lengths double from there.
LEAST_TEXT = 64
MAX_PIXELS = 50_000_000
ANY_LENGTH = 2**31
# No token of a known vocabulary stands for more characters; a text that is longer than all tokens
# of a slot can be is refused before it is encoded.
LONGEST_TOKEN = 256


@dataclasses.dataclass(frozen=True)
class ServingBuckets:
    """Shapes that prompts are padded to.

    Attributes:
        all: the shapes, smallest first.
        capacity: tokens of prompt and answer that a slot holds.
        max_tiles: most tiles of a request.
        max_pixels: most pixels of an image; larger ones are refused undecoded.
    """

    all: tuple[Bucket, ...]
    capacity: int
    max_tiles: int
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(
        cls,
        processor: Processor,
        rope: RopeConfig,
        capacity: int | None = None,
        max_tiles: int | None = None,
    ) -> ServingBuckets:
        """Returns the shapes for a model.

        Args:
            processor: how the model reads prompts.
            rope: positions of its decoder.
            capacity: tokens of a slot; None: the decoder's positions, at most MOST_CAPACITY.
            max_tiles: most tiles of a request; None: what the model's own tile rule may give one
                image, and twice as many for a high `detail`, as far as they fit.

        Raises:
            ConfigError: a slot has more tokens than the decoder has positions, or no room.
        """
        if capacity is None:
            capacity = min(rope.max_positions, MOST_CAPACITY)
        if capacity > rope.max_positions and not rope.allow_longer:
            raise ConfigError(
                f"max_length is {capacity}, but the decoder has {rope.max_positions} positions; "
                "set max_length to at most that"
            )
        per_tile = processor.tokens_per_tile
        room = (capacity - LEAST_TEXT) // per_tile
        if room < 1:
            raise ConfigError(
                f"max_length is {capacity}, which has no room for a tile of {per_tile} tokens and "
                f"{LEAST_TEXT} of text; raise max_length"
            )
        most = min(room, 24 if max_tiles is None else max_tiles)
        if max_tiles is not None and max_tiles > room:
            raise ConfigError(
                f"max_tiles is {max_tiles}, but max_length {capacity} has room for {room} tiles of "
                f"{per_tile} tokens; raise max_length or lower max_tiles"
            )
        steps = [step for step in TILE_STEPS if step < most] + [most]
        found: list[Bucket] = []
        for fewest, tiles in zip([0, *(step + 1 for step in steps)], steps, strict=False):
            least = fewest * per_tile + LEAST_TEXT
            length = round_up(least, LENGTH_STEP)
            while True:
                length = min(length, capacity)
                short = 0
                if processor.saved_per_tile:
                    short = length - fewest * processor.saved_per_tile
                found.append(Bucket(tiles, length, short))
                if length == capacity:
                    break
                length *= 2
        return cls(tuple(sorted(found)), capacity, most)

    def described(self) -> str:
        """Returns the shapes in one line."""
        by_tiles: dict[int, list[str]] = {}
        for bucket in self.all:
            by_tiles.setdefault(bucket.tiles, []).append(str(bucket.length))
        return ", ".join(
            f"{tiles} tiles x {'/'.join(lengths)} tokens" for tiles, lengths in by_tiles.items()
        )

    def probe(self, bucket: Bucket) -> Row:
        """Returns a prompt of one token, to compile a shape with."""
        one = np.zeros(1, np.int32)
        none = np.zeros((0,), np.int32)
        return Row(one, np.full(1, IGNORED, np.int32), none, np.zeros((0, 1, 1, 3), np.uint8))

    def read(
        self, prompts: PromptBuilder, request: Request, spec: GenerationSpec
    ) -> tuple[Bucket, Row]:
        """Returns the shape of a request and its prompt, images decoded.

        Raises:
            SampleError: an image or a placeholder is wrong, or the request is too large.
        """
        with located(request.where):
            texts = [request.prompt, request.system or ""]
            texts += [text for turn in request.history for text in (turn.prompt, turn.answer)]
            characters = sum(map(len, texts))
            if characters > LONGEST_TOKEN * self.capacity:
                raise self._too_long(f"{characters} characters")
            for images in request.images_per_turn:
                for image in images:
                    check_pixels(image_size(image), self.max_pixels, image)
            tiles = sum(sum(count_tiles(spec.tiler, images)) for images in request.images_per_turn)
            if tiles > self.max_tiles:
                raise SampleError(
                    "too_long",
                    f"the images are {tiles} tiles, this server takes {self.max_tiles}.",
                    "Send fewer or smaller images, or lower max_dynamic_patch.",
                )
            row = prompts.row(request, Bucket(tiles, ANY_LENGTH), spec)
            if len(row.tokens) >= self.capacity:
                raise self._too_long(f"{len(row.tokens)} tokens")
            fits = (b for b in self.all if b.tiles >= tiles and b.length >= len(row.tokens))
            return min(fits), row

    def _too_long(self, length: str) -> SampleError:
        return SampleError(
            "too_long",
            f"the prompt has {length}, a slot of this server holds {self.capacity} tokens with the "
            "answer.",
            "Shorten the prompt or its history, or send fewer or smaller images.",
        )
