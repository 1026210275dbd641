"""Samples that are too long for the largest bucket or row: what gives way, in which order (design: data.md 10)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.data.conversations import ChatSample, Size
from internvlx_jax.data.encode import Encoded
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER

CHANGES = (
    "",
    "fewer_tiles",
    "dropped_turns",
    "cut_answer",
)  # what fit_sample may have done, the last one wins


class Room(NamedTuple):
    """Slots that one sample may take: tokens, tiles (None: any number), tokens of the short layout (with LVTC)."""

    length: int
    tiles: int | None = None
    short_length: int = 0


class Fitted(NamedTuple):
    """Attributes:
    encoded: tokens and labels, at most `room.length`.
    tiles: of each image that is kept, the first ones of the sample.
    limit: largest grid of an image.
    change: one of CHANGES.
    """

    encoded: Encoded
    tiles: tuple[int, ...]
    limit: int
    change: str


def fit_sample(
    processor: Processor, sample: ChatSample, sizes: Sequence[Size], room: Room
) -> Fitted:
    """Encode a sample so that it fits: as it is, else with fewer tiles, else without its last questions and answers,
    else without the end of its answer. Image tokens are never cut.

    Raises SampleError naming the line, "too_long" when nothing helps.
    """
    limit = processor.image_limit(len(sizes))
    tiles = processor.tiles_per_image(sizes, limit)
    encoded = processor.encode(sample, tiles)
    whole = len(encoded.tokens), sum(tiles)
    if _fits(*whole, room):
        return Fitted(encoded, tiles, limit, "")

    text = whole[0] - whole[1] * processor.tokens_per_tile
    while limit > 1 and not _fits(text + sum(tiles) * processor.tokens_per_tile, sum(tiles), room):
        limit -= 1
        tiles = processor.tiles_per_image(sizes, limit)
    encoded, change = processor.encode(sample, tiles), "fewer_tiles"

    while not _fits(len(encoded.tokens), sum(tiles), room) and len(sample.turns) > 2:
        turns = sample.turns[: len(sample.turns) - (1 if sample.turns[-1][0] == "human" else 2)]
        kept = tiles[
            : sum(text.count(IMAGE_PLACEHOLDER) for role, text in turns if role == "human")
        ]
        if tiles and not kept:
            break  # without an image it would become a text sample, whose "<image>" is text
        try:
            encoded = processor.encode(dataclasses.replace(sample, turns=turns), kept)
        except SampleError:
            break  # nothing supervised would be left
        sample, tiles, change = dataclasses.replace(sample, turns=turns), kept, "dropped_turns"

    if not _fits(len(encoded.tokens), sum(tiles), room):
        encoded, change = _cut_answer(encoded, room.length, processor.tokens_per_tile), "cut_answer"
        if not _fits(0, sum(tiles), room) or encoded is None:
            raise _too_long(processor, sample, *whole, room)
    return Fitted(encoded, tiles, limit, change)


def _fits(length: int, tiles: int, room: Room) -> bool:
    return length <= room.length and (room.tiles is None or tiles <= room.tiles)


def _cut_answer(encoded: Encoded, length: int, tokens_per_tile: int) -> Encoded | None:
    """The first `length` tokens; None if image tokens or the whole answer would be lost."""
    images_end = encoded.tile_start.max(initial=-tokens_per_tile - 1) + tokens_per_tile + 1
    if images_end > length or (encoded.labels[:length] == IGNORED).all():
        return None
    return Encoded(encoded.tokens[:length], encoded.labels[:length], encoded.tile_start)


def _too_long(
    processor: Processor, sample: ChatSample, length: int, tiles: int, room: Room
) -> SampleError:
    slots = "" if room.tiles is None else f" and {room.tiles} tile slots"
    return SampleError(
        "too_long",
        f"{length} tokens, {tiles * processor.tokens_per_tile} of them image tokens of {tiles} tiles, do "
        f"not fit into data.max_length = {room.length}{slots}; image tokens are never cut.",
        "Raise data.max_length, lower model.prompt.tiles.max_num, or shorten the conversation.",
        sample.where,
    )


def supervised_tokens(labels: np.ndarray) -> int:
    """Labels that count: the first token of a sample is predicted from nothing."""
    return int((labels[1:] != IGNORED).sum())
