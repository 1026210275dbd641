"""Cuts the images of a request into tiles (design: evaluation.md 1, 4, 5)."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.images import ImageSource, image_size, load_image, open_image
from internvlx_jax.data.tiles import choose_grid, cut_tiles, per_image_limit, tile_count

# What load_image counts, and what to do about it.
DECODED_ANYWAY = {
    "truncated": "the file is damaged; what could be decoded is used, the rest is blank. Replace "
    "the file.",
    "16bit": "16-bit values are shifted down to 8 bits. Convert the file if its values use another "
    "range.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """How the images of one turn share the tile maximum.

    Attributes:
        limits: maps (max_num, number of images) to the tile maximum of each image; images behind
            the last limit are left out.
        one_block: whether all tiles of all images stand in one image block of the prompt.
        enlarge_first: factor by which the first image is enlarged (bilinear) before its grid is
            chosen.
    """

    limits: Callable[[int, int], Sequence[int]]
    one_block: bool = False
    enlarge_first: int = 1


EACH = ImagePolicy(limits=lambda most, images: [per_image_limit(most, images)] * images)


@dataclasses.dataclass(frozen=True)
class Tiler:
    """Cuts images under one tile rule and one policy.

    Attributes:
        tiles: the tile rule.
        policy: how several images share the tile maximum.
        rgb: "first" converts an image before cutting. "after_tiling" converts tiles, as the release
            does for some benchmarks, so that palette images are resized by nearest neighbor.
    """

    tiles: TileConfig
    policy: ImagePolicy = EACH
    rgb: Literal["first", "after_tiling"] = "first"

    def counts(self, images: Sequence[ImageSource]) -> tuple[int, ...]:
        """Returns the tiles of each image block, thumbnails included, from the headers alone.

        Raises:
            SampleError: a header cannot be read.
        """
        counts = []
        for image, limit, factor in self._limited(images):
            width, height = image_size(image)
            counts.append(tile_count(self.tiles, factor * width, factor * height, limit))
        return self.blocks(counts)

    def cut(self, images: Sequence[ImageSource], where: str) -> list[np.ndarray]:
        """Returns the tiles of each image, uint8[n, s, s, 3] with s the tile size.

        A damaged image that is used all the same causes a warning, which `where` begins.

        Raises:
            SampleError: an image cannot be read.
        """
        return [
            self._cut(image, limit, factor, where) for image, limit, factor in self._limited(images)
        ]

    def blocks(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Maps the tiles of each image to the tiles of each image block of the prompt."""
        return (sum(counts),) if self.policy.one_block and counts else tuple(counts)

    def _limited(self, images: Sequence[ImageSource]) -> list[tuple[ImageSource, int, int]]:
        """Returns (image, tile maximum, enlargement) of each image that is used."""
        limits = self.policy.limits(self.tiles.max_num, len(images)) if images else ()
        factors = [self.policy.enlarge_first] + [1] * len(images)
        return list(zip(images, limits, factors, strict=False))

    def _cut(self, source: ImageSource, limit: int, factor: int, where: str) -> np.ndarray:
        image = load_image(source)
        for reason in image.info["counted"]:
            message = f"{source}: {DECODED_ANYWAY[reason]}"
            warnings.warn(f"{where}: {message}" if where else message, stacklevel=4)
        if self.rgb == "after_tiling":
            image = _unconverted(source)
        if factor > 1:
            size = (factor * image.width, factor * image.height)
            image = image.resize(size, Image.Resampling.BILINEAR)
        if image.mode == "RGB":
            return cut_tiles(image, self.tiles, limit)
        return _cut_then_convert(image, self.tiles, limit)


def _unconverted(source: ImageSource) -> Image.Image:
    with open_image(source) as opened:
        image = Image.open(opened)
        image.load()
    return image


def _cut_then_convert(image: Image.Image, config: TileConfig, limit: int) -> np.ndarray:
    """Cuts an image of any mode and converts each tile; Pillow resizes palettes by nearest."""
    s = config.tile_size
    columns, rows = choose_grid(config, *image.size, limit)
    bicubic = Image.Resampling.BICUBIC
    canvas = image.resize((columns * s, rows * s), bicubic)
    tiles = [
        canvas.crop((c * s, r * s, (c + 1) * s, (r + 1) * s))
        for r in range(rows)
        for c in range(columns)
    ]
    if config.use_thumbnail and (columns, rows) != (1, 1):
        tiles.append(image.resize((s, s), bicubic))
    return np.stack([np.asarray(tile.convert("RGB")) for tile in tiles])
