"""Encoded samples -> one static-shape batch (design: data.md 12, 13). NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np

from internvlx_jax.core.inputs import IGNORED, Inputs
from internvlx_jax.core.model_config import LvtcConfig
from internvlx_jax.core.token_layout import layouts
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
    index, short = layouts(segment_ids, tile_start, tokens_per_tile, bucket.short_length, lvtc)
    inputs = Inputs(tokens, positions, segment_ids, tiles, index, short)
    return Batch(inputs, labels, weights, dataset)
