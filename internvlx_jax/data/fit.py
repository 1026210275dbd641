"""Samples that are too long: what gives way, in which order (design: data.md 10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.data.buckets import Capacity
from internvlx_jax.data.conversations import ChatSample, Size
from internvlx_jax.data.encode import Encoded, encode_sample
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER
from internvlx_jax.data.tiles import per_image_limit, tile_counts

# What fit_sample may have done; where several were needed, the last one.
CHANGES = ("", "fewer_tiles", "dropped_turns", "cut_answer")


class Fitted(NamedTuple):
    """A sample that fits.

    Attributes:
        encoded: tokens and labels, at most `capacity.length`.
        tiles: tiles of each image that is kept, the first ones of the sample.
        limit: largest grid of an image.
        change: one of CHANGES.
    """

    encoded: Encoded
    tiles: tuple[int, ...]
    limit: int
    change: str


def fit_sample(
    processor: Processor, sample: ChatSample, sizes: Sequence[Size], capacity: Capacity
) -> Fitted:
    """Encodes a sample so that it fits.

    A sample stays as it is if it can. Otherwise it gets fewer tiles, then loses its last questions
    and answers, then the end of its answer. Image tokens are never cut.

    Args:
        processor: reads the sample for its model.
        sample: one conversation.
        sizes: width and height of each of its images, in pixels.
        capacity: bounds of tokens and tiles.

    Raises:
        SampleError: "too_long" when nothing helps; the message names the line.
    """
    limit = per_image_limit(processor.tiles.max_num, len(sizes))
    tiles = tile_counts(processor.tiles, sizes, limit)
    encoded = encode(processor, sample, tiles)
    length, count = len(encoded.tokens), sum(tiles)
    if capacity.fits(length, count):
        return Fitted(encoded, tiles, limit, "")

    limit, tiles = _fewer_tiles(
        processor, sizes, capacity, text=length - count * processor.tokens_per_tile
    )
    fitted = Fitted(encode(processor, sample, tiles), tiles, limit, "fewer_tiles")
    fitted = _drop_turns(processor, sample, fitted, capacity)
    if _holds(capacity, fitted):
        return fitted
    cut = _cut_answer(fitted.encoded, capacity.length, processor.tokens_per_tile)
    if cut is None or not capacity.fits(0, sum(fitted.tiles)):
        raise _too_long(processor, sample, length, count, capacity)
    return fitted._replace(encoded=cut, change="cut_answer")


def encode(processor: Processor, sample: ChatSample, tiles_per_image: Sequence[int]) -> Encoded:
    """Returns tokens and labels of a sample, whatever their number.

    Raises:
        SampleError: names file and line.
    """
    system = processor.system_message if sample.system is None else sample.system
    try:
        return encode_sample(
            sample.turns,
            system=system,
            template=processor.template,
            tokenizer=processor.tokenizer,
            tiles_per_image=tiles_per_image,
            tokens_per_tile=processor.tokens_per_tile,
            special_text=processor.special_text,
        )
    except SampleError as error:
        raise error.at(sample.where) from None


def _holds(capacity: Capacity, fitted: Fitted) -> bool:
    return capacity.fits(len(fitted.encoded.tokens), sum(fitted.tiles))


def _fewer_tiles(
    processor: Processor, sizes: Sequence[Size], capacity: Capacity, *, text: int
) -> tuple[int, tuple[int, ...]]:
    """Returns the largest grid with which the sample fits, at least 1, and the tiles per image."""
    limit = per_image_limit(processor.tiles.max_num, len(sizes))
    while True:
        tiles = tile_counts(processor.tiles, sizes, limit)
        count = sum(tiles)
        if limit <= 1 or capacity.fits(text + count * processor.tokens_per_tile, count):
            return limit, tiles
        limit -= 1


def _drop_turns(
    processor: Processor, sample: ChatSample, fitted: Fitted, capacity: Capacity
) -> Fitted:
    """Drops questions and answers from the end, with their images, until the sample fits."""
    turns = sample.turns
    while not _holds(capacity, fitted) and len(turns) > 2:
        turns = turns[: len(turns) - (1 if turns[-1][0] == "human" else 2)]
        questions = [text for role, text in turns if role == "human"]
        kept = fitted.tiles[: sum(text.count(IMAGE_PLACEHOLDER) for text in questions)]
        if fitted.tiles and not kept:
            break  # without an image it would become a text sample, whose "<image>" is text
        try:
            encoded = encode(processor, dataclasses.replace(sample, turns=turns), kept)
        except SampleError:
            break  # nothing supervised would be left
        fitted = Fitted(encoded, kept, fitted.limit, "dropped_turns")
    return fitted


def _cut_answer(encoded: Encoded, length: int, tokens_per_tile: int) -> Encoded | None:
    """Returns the first `length` tokens; None if image tokens or the whole answer would be lost."""
    images_end = encoded.tile_start.max(initial=-tokens_per_tile - 1) + tokens_per_tile + 1
    if images_end > length or (encoded.labels[:length] == IGNORED).all():
        return None
    return Encoded(encoded.tokens[:length], encoded.labels[:length], encoded.tile_start)


def _too_long(
    processor: Processor, sample: ChatSample, length: int, tiles: int, capacity: Capacity
) -> SampleError:
    slots = "" if capacity.tiles is None else f" and {capacity.tiles} tile slots"
    return SampleError(
        "too_long",
        f"{length} tokens, {tiles * processor.tokens_per_tile} of them image tokens of {tiles} "
        f"tiles, do not fit into data.max_length = {capacity.length}{slots}; image tokens are "
        "never cut.",
        "Raise data.max_length, lower model.prompt.tiles.max_num, or shorten the conversation.",
        sample.where,
    )


def supervised_tokens(labels: np.ndarray) -> int:
    """Returns how many labels count: nothing predicts the first token of a sample."""
    return int((labels[1:] != IGNORED).sum())
