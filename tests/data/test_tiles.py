"""Grids and tile pixels against the release (design: data.md 8 and 9)."""

import csv
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.tiles import (
    choose_grid,
    cut_tiles,
    normalize,
    pad_to_square,
    per_image_limit,
    tile_count,
    tile_limit,
)

# data.md 9: (width, height) -> (grid, tiles) under off 6, edge 6, area 6, off 12, edge 12, area 12
RULE_TABLE = """
300x300    1,1:1 1,1:1 1,1:1 1,1:1 1,1:1 1,1:1
448x448    1,1:1 1,1:1 1,1:1 1,1:1 1,1:1 1,1:1
449x448    1,1:1 1,1:1 1,1:1 1,1:1 1,1:1 1,1:1
640x480    3,2:7 1,1:1 1,1:1 4,3:13 1,1:1 1,1:1
480x640    2,3:7 1,2:3 1,2:3 3,4:13 1,2:3 1,2:3
800x600    3,2:7 2,2:5 1,1:1 4,3:13 2,2:5 1,1:1
1024x768   3,2:7 3,2:7 2,2:5 4,3:13 3,2:7 2,2:5
1280x720   2,1:3 2,1:3 2,1:3 4,2:9 2,1:3 2,1:3
1920x1080  2,1:3 2,1:3 2,1:3 4,2:9 4,2:9 4,2:9
1000x1000  2,2:5 2,2:5 2,2:5 3,3:10 3,3:10 2,2:5
100x1000   1,6:7 1,3:4 1,1:1 1,10:11 1,3:4 1,1:1
450x2000   1,5:6 1,5:6 1,5:6 1,5:6 1,5:6 1,5:6
4000x3000  3,2:7 3,2:7 3,2:7 4,3:13 4,3:13 4,3:13
"""

# data.md 9: tiles -> images of image_sizes.csv, maximum 6, thumbnail
HISTOGRAMS = {
    ("photo", "off"): {1: 131, 3: 24, 4: 5, 5: 5, 7: 835},
    ("photo", "edge"): {1: 675, 3: 287, 4: 1, 5: 19, 7: 18},
    ("photo", "area"): {1: 947, 3: 36, 4: 1, 5: 8, 7: 8},
    ("receipt", "off"): {3: 338, 4: 124, 5: 9, 7: 155},
    ("receipt", "edge"): {1: 1, 3: 340, 4: 124, 5: 9, 7: 152},
    ("receipt", "area"): {1: 2, 3: 361, 4: 124, 5: 8, 7: 131},
}


def synth(seed: int, w: int, h: int) -> Image.Image:
    """The image generator of the golden data (golden/rvtc/README.md)."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    im = np.zeros((h, w, 3))
    for c in range(3):
        for _ in range(3):
            fx, fy, ph = r.uniform(0, 6, 3)
            im[..., c] += np.sin(2 * np.pi * (fx * x / w + fy * y / h) + ph)
    im = (im - im.min()) / (im.max() - im.min()) * 255
    for _ in range(4):
        x0, y0 = int(r.integers(0, w)), int(r.integers(0, h))
        x1, y1 = x0 + int(r.integers(1, w // 3 + 2)), y0 + int(r.integers(1, h // 3 + 2))
        im[y0:y1, x0:x1] = r.integers(0, 256, 3)
    return Image.fromarray(im.round().astype(np.uint8))


def nchw(tiles: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(tiles, -1, -3))


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def grids(golden):
    return json.loads((golden / "rvtc" / "grids.json").read_text())


@pytest.mark.parametrize(
    "group, rows", [("hand", 252), ("min_num_cases", 30), ("other_image_sizes", 90), ("ties", 30)]
)
def test_golden_grids(grids, group, rows):
    assert len(grids[group]) == rows
    for row in grids[group]:
        config = TileConfig(
            tile_size=row["image_size"],
            max_num=row["max_num"],
            min_num=row["min_num"],
            use_thumbnail=row["thumbnail"],
        )
        assert choose_grid(config, row["w"], row["h"]) == tuple(row["grid"]), row
        assert tile_count(config, row["w"], row["h"]) == row["tiles"], row


def test_golden_random_grids(grids):
    assert len(grids["random"]) == 1500
    for w, h, max_num, thumbnail, columns, rows, tiles in grids["random"]:
        config = TileConfig(
            use_thumbnail=bool(thumbnail)
        )  # the maximum through the argument, as datasets do
        assert choose_grid(config, w, h, max_num) == (columns, rows)
        assert tile_count(config, w, h, max_num) == tiles


@pytest.mark.parametrize("row", RULE_TABLE.strip().splitlines())
def test_tile_rules(row):
    size, *cells = row.split()
    width, height = map(int, size.split("x"))
    for cell, (max_num, rule) in zip(
        cells, [(m, r) for m in (6, 12) for r in ("off", "edge", "area")], strict=True
    ):
        config = TileConfig(rule=rule, max_num=max_num)
        columns, rows = choose_grid(config, width, height)
        assert f"{columns},{rows}:{tile_count(config, width, height)}" == cell, (rule, max_num)


def test_histograms(shared_data):
    with open(shared_data / "image_sizes.csv", newline="") as file:
        sizes = [
            (row["source"], int(row["width"]), int(row["height"])) for row in csv.DictReader(file)
        ]
    for (source, rule), expected in HISTOGRAMS.items():
        config = TileConfig(rule=rule)
        counts = Counter(tile_count(config, w, h) for which, w, h in sizes if which == source)
        assert counts == expected, (source, rule)


def test_golden_pixels(golden):
    cases = json.loads((golden / "rvtc" / "pixels.json").read_text())["small"]
    with np.load(golden / "rvtc" / "pixels.npz") as file:
        arrays = dict(file)
    assert len(cases) == 8
    for case in cases:
        key = case["key"]
        image = Image.fromarray(arrays[f"{key}_image"])
        config = TileConfig(
            tile_size=case["image_size"], max_num=case["max_num"], use_thumbnail=case["thumbnail"]
        )
        tiles = cut_tiles(image, config)
        assert tiles.dtype == np.uint8 and np.array_equal(tiles, arrays[f"{key}_tiles"])
        values = normalize(tiles)
        assert values.dtype == np.float32
        assert sha256(nchw(values)) == case["pixel_values_sha256"]
        if f"{key}_nodyn_pixel_values" in arrays:
            whole = normalize(
                cut_tiles(image, TileConfig(tile_size=case["image_size"], dynamic=False))
            )
            assert np.array_equal(nchw(whole)[0], arrays[f"{key}_nodyn_pixel_values"])


def test_golden_normalisations_and_square(golden):
    with np.load(golden / "rvtc" / "pixels.npz") as file:
        arrays = dict(file)
    image = Image.fromarray(arrays["img0_image"])
    whole = TileConfig(tile_size=56, dynamic=False)
    square = pad_to_square(image)
    assert np.array_equal(np.asarray(square), arrays["img0_expand2square"])
    assert pad_to_square(image.transpose(Image.Transpose.ROTATE_90)).size == square.size
    for name, tiles, kind in [
        ("pad2square", cut_tiles(square, whole), "imagenet"),
        ("clip", cut_tiles(image, whole), "clip"),
        ("siglip", cut_tiles(image, whole), "siglip"),
    ]:
        assert np.array_equal(
            nchw(normalize(tiles, kind))[0], arrays[f"img0_{name}_pixel_values"]
        ), name


def test_golden_pixels_at_448(golden):
    cases = json.loads((golden / "rvtc" / "pixels.json").read_text())["big"]
    assert len(cases) == 4
    for case in cases:
        image = synth(case["seed"], case["w"], case["h"])
        assert sha256(np.asarray(image)) == case["image_sha256"], (
            "the generator differs, not the tiling"
        )
        tiles = cut_tiles(
            image, TileConfig(max_num=case["max_num"], use_thumbnail=case["thumbnail"])
        )
        assert sha256(tiles) == case["tiles_sha256"]


def test_limits():
    assert [per_image_limit(6, n) for n in (1, 2, 4, 6, 7)] == [6, 3, 1, 1, 1]
    assert tile_limit(TileConfig(rule="area"), 20, 20) == 1
    assert tile_limit(TileConfig(), 4480, 4480, max_num=2) == 2
    assert tile_count(TileConfig(dynamic=False), 4480, 1000) == 1


def test_errors():
    with pytest.raises(
        ValueError, match='"egde" is unknown. Did you mean "edge"[?] Use one of edge, area'
    ):
        TileConfig(rule="egde")
    with pytest.raises(ValueError, match="max_num is 0, it must be from 1 to 4096"):
        TileConfig(max_num=0)
    with pytest.raises(ValueError, match="Use one of imagenet, clip, siglip"):
        normalize(np.zeros((1, 2, 2, 3), np.uint8), "imagnet")
    with pytest.raises(ValueError, match="RGB images, got L"):
        cut_tiles(Image.new("L", (4, 4)), TileConfig())
