"""Static-shape batches and their index plans (design: data.md 13)."""

import dataclasses

import numpy as np
import pytest

from internvlx_jax.core.model_config import LvtcConfig
from internvlx_jax.data.batch import IGNORED, Row, collate, feature_index
from internvlx_jax.data.buckets import Bucket

SIDE, PER_TILE, PAD, IMAGE = 4, 4, 2, 7
BUCKET = Bucket(5, 64)


def make_row(rng: np.random.Generator, images: list[int]) -> Row:
    """Text with `images` tiles a block.

    Text <img> tile tokens </img> text ...; the last six tokens are the answer.
    """
    tokens, starts = list(rng.integers(10, 99, 1 + rng.integers(8))), []
    for tiles in images:
        starts += [len(tokens) + 1 + tile * PER_TILE for tile in range(tiles)]
        tokens += [5, *[IMAGE] * (tiles * PER_TILE), 6, *rng.integers(10, 99, rng.integers(4))]
    tokens += list(rng.integers(10, 99, 6))
    labels = [IGNORED] * (len(tokens) - 6) + tokens[-6:]
    return Row(
        np.array(tokens, np.int32),
        np.array(labels, np.int32),
        np.array(starts, np.int32),
        rng.integers(1, 256, (sum(images), SIDE, SIDE, 3), np.uint8),
    )


def place(rows):
    return collate(rows, BUCKET, tile_size=SIDE, tokens_per_tile=PER_TILE, pad_id=PAD)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return [
        make_row(rng, []),
        make_row(rng, [1]),
        None,
        make_row(rng, [2, 1, 2]),
        make_row(rng, [3]),
    ]


def test_shapes_and_types_are_those_of_the_bucket(rows):
    inputs, labels, loss_weight, dataset = place(rows)
    arrays = inputs._asdict() | {"labels": labels, "loss_weight": loss_weight, "dataset": dataset}
    shapes = {
        name: (value.shape, value.dtype.name) for name, value in arrays.items() if value is not None
    }
    assert shapes == {
        "tokens": ((5, 64), "int32"),
        "positions": ((5, 64), "int32"),
        "segment_ids": ((5, 64), "int32"),
        "tiles": ((5, 5, SIDE, SIDE, 3), "uint8"),
        "feature_index": ((5, 64), "int32"),
        "labels": ((5, 64), "int32"),
        "loss_weight": ((5, 64), "float32"),
        "dataset": ((5, 64), "int32"),
    }


def test_rows_stand_on_the_left_and_padding_has_no_segment(rows):
    rows = [row and row._replace(dataset=b) for b, row in enumerate(rows)]
    inputs, labels, loss_weight, dataset = place(rows)
    for b, row in enumerate(rows):
        n = 0 if row is None else len(row.tokens)
        if row is not None:
            np.testing.assert_array_equal(inputs.tokens[b, :n], row.tokens)
            np.testing.assert_array_equal(labels[b, :n], row.labels)
        assert (inputs.tokens[b, n:] == PAD).all() and (labels[b, n:] == IGNORED).all()
        assert inputs.segment_ids[b].tolist() == [1] * n + [0] * (64 - n)
        assert inputs.positions[b].tolist() == [*range(n)] + [0] * (64 - n)
        np.testing.assert_array_equal(loss_weight[b], labels[b] != IGNORED)
        assert dataset[b].tolist() == [b] * n + [0] * (64 - n)
    assert loss_weight[2].sum() == 0, "a masked row"
    assert loss_weight.sum() == 6 * 4


def test_tiles_fill_the_first_slots(rows):
    tiles = place(rows).inputs.tiles
    for b, count in enumerate((0, 1, 0, 5, 3)):
        if count:
            np.testing.assert_array_equal(tiles[b, :count], rows[b].tiles)
        assert not tiles[b, count:].any()


def test_feature_index_counts_the_visual_tokens_of_a_row(rows):
    """Oracle: from left to right, the k-th image token shows the k-th visual token of the row."""
    inputs = place(rows).inputs
    for tokens, found in zip(inputs.tokens, inputs.feature_index):
        seen, expected = 0, []
        for token in tokens.tolist():
            expected.append(seen if token == IMAGE else BUCKET.tiles * PER_TILE)
            seen += token == IMAGE
        assert found.tolist() == expected


def test_feature_index_of_random_rows():
    rng = np.random.default_rng(1)
    for _ in range(50):
        row = make_row(rng, list(rng.integers(0, 3, rng.integers(1, 3))))
        index = place([row]).inputs.feature_index[0]
        visual = row.tokens == IMAGE
        assert index[: len(row.tokens)][visual].tolist() == [*range(visual.sum())]
        assert (np.delete(index, np.flatnonzero(visual)) == BUCKET.tiles * PER_TILE).all()


def test_tiles_may_start_in_any_order():
    index = feature_index(np.array([[4, 0, 8]], np.int32), 8, 2)
    assert index.tolist() == [[2, 3, 6, 6, 0, 1, 6, 6]]


def test_a_tile_beyond_the_last_slot_is_an_error():
    with pytest.raises(
        ValueError, match="row 1: tile 0 starts at slot 7 and its 2 tokens do not fit into 8 slots"
    ):
        feature_index(np.array([[8], [7]], np.int32), 8, 2)


@pytest.mark.parametrize(
    "images, bucket", [([1], Bucket(1, 8)), ([2], Bucket(1, 64)), ([1], Bucket(0, 64))]
)
def test_a_row_that_does_not_fit_is_an_error(images, bucket):
    row = make_row(np.random.default_rng(0), images)
    with pytest.raises(
        ValueError,
        match=f"a sample of {len(row.tokens)} tokens and {sum(images)} tiles does not fit",
    ):
        collate([row], bucket, tile_size=SIDE, tokens_per_tile=PER_TILE, pad_id=PAD)


def test_the_first_token_is_never_a_label():
    tokens = np.arange(10, 15, dtype=np.int32)
    row = Row(tokens, tokens, np.zeros(0, np.int32), np.zeros((0, SIDE, SIDE, 3), np.uint8))
    _, labels, loss_weight, _ = place([row])
    assert labels[0, :5].tolist() == [IGNORED, 11, 12, 13, 14]
    assert loss_weight[0, :6].tolist() == [0, 1, 1, 1, 1, 0]
    assert row.labels[0] == 10, "the row itself stays"


def test_a_text_bucket_has_no_tile_slots(rows):
    inputs = collate(
        [rows[0], None], Bucket(0, 64), tile_size=SIDE, tokens_per_tile=PER_TILE, pad_id=PAD
    ).inputs
    assert inputs.tiles.shape == (2, 0, SIDE, SIDE, 3)
    assert not inputs.feature_index.any(), "0 * tokens_per_tile: out of range of no features"


def test_with_lvtc_a_row_has_a_short_frame_too(rows):
    """A 2 x 2 tile is one slot there; the length of the frame is the bucket's."""
    lvtc = LvtcConfig(expand_layer=1, low_grid=1, high_grid=2)
    assert lvtc.high_grid**2 == PER_TILE
    bucket = dataclasses.replace(BUCKET, short_length=40)
    inputs = collate(
        rows, bucket, tile_size=SIDE, tokens_per_tile=PER_TILE, pad_id=PAD, lvtc=lvtc
    ).inputs
    assert inputs.short.short_to_long.shape == inputs.short.feature_index.shape == (5, 40)
    for b, row in enumerate(rows):
        slots = inputs.short.short_to_long[b]
        tokens = [] if row is None else row.tokens
        visual = {
            start + child
            for start in ([] if row is None else row.tile_start)
            for child in (1, 2, 3)
        }
        assert [*slots[slots < 64]] == [slot for slot in range(len(tokens)) if slot not in visual]
    with pytest.raises(
        ValueError, match=r"row 3 needs \d+ slots in the short layout, which has 12"
    ):
        collate(
            rows,
            dataclasses.replace(BUCKET, short_length=12),
            tile_size=SIDE,
            tokens_per_tile=PER_TILE,
            pad_id=PAD,
            lvtc=lvtc,
        )
