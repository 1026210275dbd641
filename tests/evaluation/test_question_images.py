"""How several images of a question become tiles, and the order of tiling and RGB.

(design: evaluation.md 1, 4)
"""

import io

import numpy as np
import pytest
from PIL import Image

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.tiles import cut_tiles
from internvlx_jax.evaluation.image_policies import FIRST_ONLY, MMMU_GRID, VLMEVALKIT
from internvlx_jax.evaluation.tasks import TASKS
from internvlx_jax.inference.batches import count_tiles, cut_images
from internvlx_jax.inference.images import ImageBytes
from internvlx_jax.inference.requests import EACH, Tiler

TILES = TileConfig(tile_size=56, rule="edge", max_num=6)


def stored(width, height, mode="RGB") -> ImageBytes:
    image = Image.effect_noise((width, height), 80).convert("RGB")
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG")
    return ImageBytes(f"{width}x{height}", file.getvalue())


WIDE, SMALL = stored(168, 56), stored(50, 50)


@pytest.mark.parametrize(
    "policy, images, blocks",
    [
        (EACH, [WIDE], (4,)),  # 3 x 1 and a thumbnail
        (EACH, [WIDE, SMALL], (4, 1)),
        (EACH, [WIDE] * 4, (1,) * 4),  # 6 // 4 tiles each
        (VLMEVALKIT, [WIDE, SMALL], (4, 1)),
        (VLMEVALKIT, [WIDE] * 4, (4,) * 4),
        (VLMEVALKIT, [WIDE] * 33, (1,) * 33),
        (MMMU_GRID, [SMALL], (5,)),  # 100 x 100 is cut, 50 x 50 is not
        (MMMU_GRID, [SMALL, WIDE, WIDE], (7,)),
        (FIRST_ONLY, [WIDE, WIDE], (1,)),
        (EACH, [], ()),
        (MMMU_GRID, [], ()),
    ],
)
def test_tiles_of_the_images_of_a_question(policy, images, blocks):
    tiler = Tiler(TILES, policy)
    assert count_tiles(tiler, images) == blocks
    cut = [len(tiles) for tiles in cut_images(tiler, images, "here")]
    assert ((sum(cut),) if policy.one_block and cut else tuple(cut)) == blocks


def test_mmmu_enlarges_the_first_image_bilinearly():
    first, second = cut_images(Tiler(TILES, MMMU_GRID), [SMALL, SMALL], "here")
    image = Image.open(SMALL.open())
    np.testing.assert_array_equal(
        first, cut_tiles(image.resize((100, 100), Image.Resampling.BILINEAR), TILES)
    )
    np.testing.assert_array_equal(second, cut_tiles(image, TILES))


def test_mmmu_without_a_grid_takes_the_first_image_as_it_is():
    spec = TASKS["mmmu_val"].protocols["internvl"]
    assert (spec.images(True), spec.images(False)) == (MMMU_GRID, FIRST_ONLY)


def test_palettes_are_resized_by_nearest_neighbor_after_tiling():
    palette = stored(120, 90, "P")
    image = Image.open(palette.open())
    (before,) = cut_images(Tiler(TILES), [palette], "here")
    np.testing.assert_array_equal(before, cut_tiles(image.convert("RGB"), TILES))
    (after,) = cut_images(Tiler(TILES, rgb="after_tiling"), [palette], "here")
    assert after.shape == before.shape and (after != before).any()
    colors = {tuple(color) for color in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}
    assert {tuple(color) for color in after.reshape(-1, 3).tolist()} <= colors, (
        "none between two of them"
    )
    plain = cut_images(Tiler(TILES, rgb="after_tiling"), [WIDE], "here")
    np.testing.assert_array_equal(plain[0], cut_images(Tiler(TILES), [WIDE], "here")[0])


def test_an_unreadable_image_names_itself():
    with pytest.raises(SampleError, match="row 3 image"):
        count_tiles(Tiler(TILES), [ImageBytes("row 3 image", b"nothing")])
