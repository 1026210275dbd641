"""Encoded samples -> one static-shape batch (design: data.md 12, 13). NumPy only.

The second half says which visual token stands in which slot (design: model.md 7, lvtc.md 3):
integers of static shape, so that nothing inside a jitted step depends on data. models/lvtc.py shows
the short layout beside the long one, and is the only reader of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from internvlx_jax.core.inputs import IGNORED, Inputs, ShortLayout
from internvlx_jax.core.model_config import LvtcConfig
from internvlx_jax.data.buckets import Bucket


class Row(NamedTuple):
    """One sample, or several one after the other, before padding.

    Attributes:
        tokens: int32[n].
        labels: int32[n], unshifted; IGNORED where nothing is learned.
        tile_start: int32[t], first slot of each tile.
        tiles: uint8[t, Y, X, 3].
        segments: lengths of the samples in the row; None: it is one sample.
        loss_weight: float32[n], weight of the label in the same slot; None: 1.
        dataset: number of the sample's dataset, or of each segment's.
    """

    tokens: np.ndarray
    labels: np.ndarray
    tile_start: np.ndarray
    tiles: np.ndarray
    segments: tuple[int, ...] | None = None
    loss_weight: np.ndarray | None = None
    dataset: int | tuple[int, ...] = 0


class Batch(NamedTuple):
    """A batch of static shape.

    Attributes:
        inputs: what the model reads.
        labels: int32[B, S], unshifted; IGNORED where nothing is learned.
        loss_weight: float32[B, S], weight of the label in the same slot; 0 on padding and masked
            rows.
        dataset: int32[B, S], number of the dataset that the slot's sample is from; 0 on padding.
    """

    inputs: Inputs
    labels: np.ndarray
    loss_weight: np.ndarray
    dataset: np.ndarray


def join_rows(rows: Sequence[Row]) -> Row:
    """Returns one row whose segments are the given samples, tiles in the same order."""
    lengths = [len(row.tokens) for row in rows]
    offsets = np.cumsum([0, *lengths[:-1]])
    weights = [
        np.ones(n, np.float32) if row.loss_weight is None else row.loss_weight
        for row, n in zip(rows, lengths, strict=True)
    ]
    starts = [row.tile_start + offset for row, offset in zip(rows, offsets, strict=True)]
    return Row(
        np.concatenate([row.tokens for row in rows]),
        np.concatenate([row.labels for row in rows]),
        np.concatenate(starts).astype(np.int32),
        np.concatenate([row.tiles for row in rows]),
        tuple(lengths),
        np.concatenate(weights),
        tuple(cast(int, row.dataset) for row in rows),  # each row is one sample here
    )


def collate(
    rows: Sequence[Row | None],
    bucket: Bucket,
    *,
    tile_size: int,
    tokens_per_tile: int,
    pad_id: int,
    lvtc: LvtcConfig | None = None,
) -> Batch:
    """Pads rows on the right to one static shape.

    Args:
        rows: the rows; None is a masked row.
        bucket: token and tile slots per row.
        tile_size: side of a tile in pixels.
        tokens_per_tile: image tokens per tile.
        pad_id: token on padding.
        lvtc: adds the short layout; None without LVTC.

    Raises:
        ValueError: a row does not fit the bucket.
    """
    shape = (len(rows), bucket.length)
    tokens = np.full(shape, pad_id, np.int32)
    labels = np.full(shape, IGNORED, np.int32)
    weights = np.zeros(shape, np.float32)
    positions, segment_ids, dataset = (np.zeros(shape, np.int32) for _ in range(3))
    tiles = np.zeros((len(rows), bucket.tiles, tile_size, tile_size, 3), np.uint8)
    tile_start = np.full((len(rows), bucket.tiles), bucket.length, np.int32)
    for b, row in enumerate(rows):
        if row is None:
            continue
        n, t = len(row.tokens), len(row.tiles)
        if n > bucket.length or t > bucket.tiles:
            raise ValueError(f"a sample of {n} tokens and {t} tiles does not fit {bucket}")
        tokens[b, :n], labels[b, :n] = row.tokens, row.labels
        weights[b, :n] = 1 if row.loss_weight is None else row.loss_weight
        dataset[b, :n] = np.repeat(row.dataset, row.segments or n)
        first = 0
        for segment, length in enumerate(row.segments or (n,), start=1):
            slots = slice(first, first + length)
            positions[b, slots], segment_ids[b, slots] = np.arange(length), segment
            labels[b, first] = IGNORED  # nothing predicts the first token of a segment
            first += length
        tiles[b, :t], tile_start[b, :t] = row.tiles, row.tile_start
    weights[labels == IGNORED] = 0
    index = feature_index(tile_start, bucket.length, tokens_per_tile)
    short = None
    if lvtc is not None:
        short = short_layout(segment_ids, tile_start, bucket.short_length, lvtc)
    inputs = Inputs(tokens, positions, segment_ids, tiles, index, short)
    return Batch(inputs, labels, weights, dataset)


# --- slots of visual tokens -----------------------------------------------------------------------


def feature_index(tile_start: np.ndarray, length: int, tokens_per_tile: int) -> np.ndarray:
    """Returns, for each slot, the row's visual token that replaces its text embedding.

    Args:
        tile_start: int32[B, T], first slot of each tile's tokens, or `length` for an unused tile
            slot.
        length: S, slots per row.
        tokens_per_tile: Q.

    Returns:
        int32[B, S]: tile * Q + token, or T * Q (out of range) on text slots.

    Raises:
        ValueError: A tile's tokens go beyond the row.
    """
    rows, tiles = tile_start.shape
    index = np.full((rows, length), tiles * tokens_per_tile, np.int32)
    for row, tile in np.argwhere(tile_start < length):
        first = tile_start[row, tile]
        if first + tokens_per_tile > length:
            raise ValueError(
                f"row {row}: tile {tile} starts at slot {first} and its {tokens_per_tile} tokens "
                f"do not fit into {length} slots"
            )
        index[row, first : first + tokens_per_tile] = tile * tokens_per_tile + np.arange(
            tokens_per_tile
        )
    return index


def short_lengths(segment_ids: np.ndarray, tile_start: np.ndarray, lvtc: LvtcConfig) -> np.ndarray:
    """Returns int[B], the slots that each row needs in the short layout; see `short_layout`."""
    used = tile_start < segment_ids.shape[1]
    return (segment_ids > 0).sum(axis=1) - used.sum(axis=1) * lvtc.saved_per_tile


def short_layout(
    segment_ids: np.ndarray, tile_start: np.ndarray, short_length: int, lvtc: LvtcConfig
) -> ShortLayout:
    """Returns the short layout of rows that are laid out in the long one.

    It has the same order, without gaps. Low token (a, b) of a tile stands for its top-left child,
    the long slot of (a * s, b * s), and so takes its position.

    Args:
        segment_ids: int32[B, S], 0 = padding, on any side.
        tile_start: int32[B, T], first long slot of each tile, or S for an unused tile slot.
        short_length: R, slots per row of the short layout.
        lvtc: Grids.

    Raises:
        ValueError: A row needs more than `short_length` slots.
    """
    rows, length = segment_ids.shape
    tiles = tile_start.shape[1]
    low, high, scale = lvtc.low_grid, lvtc.high_grid, lvtc.scale
    needed = short_lengths(segment_ids, tile_start, lvtc)
    if (needed > short_length).any():
        row = int(needed.argmax())
        raise ValueError(
            f"row {row} needs {needed[row]} slots in the short layout, which has {short_length}"
        )

    visual = feature_index(tile_start, length, high**2)  # [B, S]
    is_visual = visual < tiles * high**2
    tile, token = np.divmod(visual, high**2)
    a, b = np.divmod(token, high)  # row and column on the high grid
    is_corner = is_visual & (a % scale == 0) & (b % scale == 0)
    kept = (segment_ids > 0) & (is_corner | ~is_visual)
    rank = np.cumsum(kept, axis=1) - 1  # short slot of each kept long slot

    short_to_long = np.full((rows, short_length), length, np.int32)
    row, slot = np.nonzero(kept)
    short_to_long[row, rank[row, slot]] = slot

    start = np.full((rows, tiles), short_length, np.int32)
    row, first = np.nonzero(tile_start < length)
    start[row, first] = rank[row, tile_start[row, first]]

    # A visual slot's parent lies in its tile's block of the short layout.
    padded_start = np.concatenate([start, np.full((rows, 1), short_length, np.int32)], axis=1)
    block = np.take_along_axis(padded_start, np.where(is_visual, tile, tiles), axis=1)
    parent = block + (a // scale) * low + b // scale
    long_to_short = np.where(is_visual, parent, np.where(kept, rank, short_length)).astype(np.int32)
    return ShortLayout(
        short_to_long, long_to_short, start, feature_index(start, short_length, low**2)
    )
