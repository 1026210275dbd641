"""Images of questions: where they lie, and how several of them become tiles (spec: evaluation.md 1, 4, 5)."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Callable, Sequence
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.images import ImageSource, image_size, load_image, open_image
from internvlx_jax.data.processor import DECODED_ANYWAY
from internvlx_jax.data.tiles import choose_grid, cut_tiles, per_image_limit, tile_count

VLMEVALKIT_TILES = 64  # of all images of a question together


@dataclasses.dataclass(frozen=True)
class ImageBytes:
    """An encoded image in memory."""

    name: str
    data: bytes = dataclasses.field(repr=False)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """How the images of one question become tiles.

    Attributes:
        limits: (max_num, number of images) -> tile maximum of each image; images behind the last one are left out.
        one_block: all tiles of all images stand in one image block of the prompt.
        enlarge_first: factor by which the first image is enlarged (bilinear) before its grid is chosen.
    """

    limits: Callable[[int, int], Sequence[int]]
    one_block: bool = False
    enlarge_first: int = 1


EACH = ImagePolicy(limits=lambda most, images: [per_image_limit(most, images)] * images)
VLMEVALKIT = ImagePolicy(
    limits=lambda most, images: [max(1, min(most, VLMEVALKIT_TILES // images))] * images
)
MMMU_GRID = ImagePolicy(
    limits=lambda most, images: [most] + [1] * (images - 1), one_block=True, enlarge_first=2
)
FIRST_ONLY = ImagePolicy(limits=lambda most, images: [1], one_block=True)


@dataclasses.dataclass(frozen=True)
class Tiler:
    """Tiles of questions under one tile rule and one policy.

    rgb: `first` converts an image before cutting; `after_tiling` as the release does for some benchmarks, so that
    palette images are resized by nearest neighbour (`--compat rgb_after_tiling`).
    """

    tiles: TileConfig
    policy: ImagePolicy = EACH
    rgb: Literal["first", "after_tiling"] = "first"

    def counts(self, images: Sequence[ImageSource]) -> tuple[int, ...]:
        """Tiles of each image block, thumbnails included, from the headers alone. Raises SampleError."""
        counts = []
        for i, (image, limit) in enumerate(self._limited(images)):
            width, height = image_size(image)
            factor = self.policy.enlarge_first if i == 0 else 1
            counts.append(tile_count(self.tiles, factor * width, factor * height, limit))
        return self.blocks(counts)

    def cut(self, images: Sequence[ImageSource], where: str) -> list[np.ndarray]:
        """uint8[n, s, s, 3] of each image. Raises SampleError; a damaged image that is used is a warning."""
        return [
            self._cut(image, limit, self.policy.enlarge_first if i == 0 else 1, where)
            for i, (image, limit) in enumerate(self._limited(images))
        ]

    def blocks(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Tiles of each image -> tiles of each block of the prompt."""
        return (sum(counts),) if self.policy.one_block and counts else tuple(counts)

    def _limited(self, images: Sequence[ImageSource]) -> list[tuple[ImageSource, int]]:
        return list(
            zip(images, self.policy.limits(self.tiles.max_num, len(images)) if images else ())
        )

    def _cut(self, file: ImageSource, limit: int, factor: int, where: str) -> np.ndarray:
        image = load_image(file)
        for reason in image.info["counted"]:
            warnings.warn(f"{where}: {file}: {DECODED_ANYWAY[reason]}", stacklevel=4)
        if self.rgb == "after_tiling":
            image = _unconverted(file)
        if factor > 1:
            image = image.resize(
                (factor * image.width, factor * image.height), Image.Resampling.BILINEAR
            )
        if image.mode == "RGB":
            return cut_tiles(image, self.tiles, limit)
        return _cut_then_convert(image, self.tiles, limit)


def _unconverted(file: ImageSource) -> Image.Image:
    with open_image(file) as opened:
        image = Image.open(opened)
        image.load()
    return image


def _cut_then_convert(image: Image.Image, config: TileConfig, limit: int) -> np.ndarray:
    """As cut_tiles, on an image of any mode, each tile made RGB at the end; Pillow resizes palettes by nearest."""
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
