"""Image -> tiles: how many, on which grid, and their pixels (design: data.md 8).

Dims: n tiles of s x s pixels, the thumbnail (if any) last. A grid is (columns, rows).
"""

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from internvlx_jax.core.errors import did_you_mean
from internvlx_jax.core.tile_config import NORMALIZATIONS, TileConfig

# Pixels of an image from which its thumbnail is resized beside its tiles; a thread takes 0.1 ms.
THREADED_PIXELS = 2**18


def per_image_limit(max_num: int, n_images: int) -> int:
    """Returns the tile maximum for each of the n_images of a sample (design: data.md 8.6)."""
    return max(1, max_num // max(1, n_images))


def tile_limit(config: TileConfig, width: int, height: int, max_num: int | None = None) -> int:
    """Returns the largest number of grid cells for an image (RVTC, design: data.md 8.1).

    Args:
        config: how the model's images are cut.
        width: of the image in pixels.
        height: of the image in pixels.
        max_num: replaces the maximum of the config (per-dataset or per-image limits).
    """
    max_num = config.max_num if max_num is None else max_num
    s = config.tile_size
    if config.rule == "edge":
        return min(max_num, math.ceil(width / s) * math.ceil(height / s))
    if config.rule == "area":
        return min(max_num, math.ceil(width * height / s**2))
    return max_num


@functools.cache
def _candidates(min_num: int, limit: int) -> list[tuple[int, int]]:
    grids = [
        (c, r) for c in range(1, limit + 1) for r in range(1, limit // c + 1) if c * r >= min_num
    ]
    return sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))


def choose_grid(
    config: TileConfig, width: int, height: int, max_num: int | None = None
) -> tuple[int, int]:
    """Returns the grid whose aspect ratio is nearest to that of the image (design: data.md 8.2).

    Ties go to the larger grid if the image has more than half of its pixels.

    Returns:
        (columns, rows); (1, 1) without candidates.
    """
    best, distance = (1, 1), math.inf
    if not config.dynamic:
        return best
    for c, r in _candidates(config.min_num, tile_limit(config, width, height, max_num)):
        e = abs(width / height - c / r)
        if e < distance or (e == distance and width * height > 0.5 * config.tile_size**2 * c * r):
            best, distance = (c, r), e
    return best


def _has_thumbnail(config: TileConfig, grid: tuple[int, int]) -> bool:
    return config.use_thumbnail and grid != (1, 1)


def tile_count(config: TileConfig, width: int, height: int, max_num: int | None = None) -> int:
    """Returns the tiles of an image of width x height pixels, the thumbnail included."""
    grid = choose_grid(config, width, height, max_num)
    return grid[0] * grid[1] + _has_thumbnail(config, grid)


def tile_counts(
    config: TileConfig, sizes: Sequence[tuple[int, int]], max_num: int | None = None
) -> tuple[int, ...]:
    """Returns the tiles of each image of one sample, thumbnails included.

    Args:
        config: how the model's images are cut.
        sizes: width and height of each image, in pixels.
        max_num: largest grid of an image; None: that of `per_image_limit`.
    """
    limit = per_image_limit(config.max_num, len(sizes)) if max_num is None else max_num
    return tuple(tile_count(config, width, height, limit) for width, height in sizes)


def cut_images(images: Sequence[Image.Image], config: TileConfig, max_num: int) -> np.ndarray:
    """Returns uint8[t, s, s, 3]: the tiles of all images of a sample, none for text."""
    s = config.tile_size
    tiles = [cut_tiles(image, config, max_num) for image in images]
    return np.concatenate([np.zeros((0, s, s, 3), np.uint8), *tiles])


def cut_tiles(image: Image.Image, config: TileConfig, max_num: int | None = None) -> np.ndarray:
    """Cuts an RGB image into tiles (design: data.md 8.3).

    Pillow 13's antialiased BICUBIC on uint8 defines the pixels.

    Returns:
        uint8[n, s, s, 3], row by row, the thumbnail last.

    Raises:
        ValueError: the image has another mode than RGB.
    """
    if image.mode != "RGB":
        raise ValueError(
            f"tiles are cut from RGB images, got {image.mode}. Open images with load_image."
        )
    s = config.tile_size
    grid = choose_grid(config, *image.size, max_num)
    if not _has_thumbnail(config, grid):
        return np.stack(_cells(image, grid, s))
    if image.width * image.height < THREADED_PIXELS:
        return np.stack([*_cells(image, grid, s), np.asarray(_resize(image, s, s))])
    with ThreadPoolExecutor(1) as thread:  # Pillow lets other threads run while it resizes
        thumbnail = thread.submit(_resize, image, s, s)
        return np.stack([*_cells(image, grid, s), np.asarray(thumbnail.result())])


def _cells(image: Image.Image, grid: tuple[int, int], s: int) -> list[np.ndarray]:
    """Returns the cells of the grid, uint8[s, s, 3] each, row by row."""
    columns, rows = grid
    canvas = np.asarray(_resize(image, columns * s, rows * s))
    return [
        canvas[r * s : (r + 1) * s, c * s : (c + 1) * s]
        for r in range(rows)
        for c in range(columns)
    ]


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    # Pillow resizes one axis after the other and rounds in between. Up to version 12 the width came
    # first; version 13 begins with the height if it shrinks by more than twice as many pixels,
    # which changes values by a few levels. Separate calls fix the order of version 13, so that all
    # versions give the same bytes.
    shrunk_x, shrunk_y = image.width - width, image.height - height
    height_first = shrunk_y > max(0, 2 * shrunk_x)
    between = (image.width, height) if height_first else (width, image.height)
    bicubic = Image.Resampling.BICUBIC
    return image.resize(between, bicubic).resize((width, height), bicubic)


def pad_to_square(image: Image.Image) -> Image.Image:
    """Centers an RGB image on a square of its longer side (design: data.md 8.4).

    The ImageNet mean fills the rest.
    """
    width, height = image.size
    side = max(width, height)
    mean, _ = NORMALIZATIONS["imagenet"]
    square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def normalize(tiles: np.ndarray, kind: str = "imagenet") -> np.ndarray:
    """Normalizes pixels as the release does, bit for bit (design: data.md 8.4).

    Args:
        tiles: uint8[..., 3].
        kind: constants of NORMALIZATIONS.

    Returns:
        float32[..., 3], (tiles / 255 - mean) / std.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(
            f'normalization "{kind}" is unknown.{did_you_mean(kind, NORMALIZATIONS)} '
            f"Use one of {', '.join(NORMALIZATIONS)}."
        )
    mean, std = np.array(NORMALIZATIONS[kind], np.float32)
    return (tiles.astype(np.float32) / np.float32(255) - mean) / std
