"""How images become tiles: the settings (design: data.md 8)."""

from __future__ import annotations

import dataclasses

from internvlx_jax.core.errors import did_you_mean
from internvlx_jax.core.ranges import COUNT, Range, check_ranges

MOST_TILES = 4096  # of one image; every grid of so many cells is a candidate

TILE_RULES = ("edge", "area", "off")

# kind -> (mean, std) of the RGB channels on the scale 0..1 (design: data.md 8.4)
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Says how images become tiles.

    Attributes:
        tile_size: Side of a tile in pixels (s).
        rule: What bounds the number of grid cells: "edge" is the released RVTC, the paper's
            resolution-level compression; "area" bounds by pixels, "off" is plain InternVL.
        max_num, min_num: Bounds of columns * rows, the thumbnail not counted.
        use_thumbnail: Whether a grid of several cells is followed by the whole image squashed to
            one tile.
        dynamic: False squashes every image into one tile, without grid and thumbnail, as non-HD
            models do.
    """

    tile_size: int = 448
    rule: str = "edge"
    max_num: int = 6
    min_num: int = 1
    use_thumbnail: bool = True
    dynamic: bool = True

    def __post_init__(self):
        if self.rule not in TILE_RULES:
            raise ValueError(
                f'tile rule "{self.rule}" is unknown.{did_you_mean(self.rule, TILE_RULES)} '
                f"Use one of {', '.join(TILE_RULES)}."
            )
        grid = Range(1, MOST_TILES)
        check_ranges(self, "tiles.", tile_size=COUNT, max_num=grid, min_num=grid)
