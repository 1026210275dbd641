"""The vision tower against the original: embeddings, every block, other image sizes (model.md 3,
15).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvlx_jax.convert.verify import variant
from internvlx_jax.core.model_config import VisionConfig
from internvlx_jax.models.vit import VisionTower, bicubic_matrix, resize_positions

ATOL = 1e-4
run = jax.jit(lambda vision, pixels, key=None: vision(pixels, drop_path_key=key))


def nhwc(pixels):
    return jnp.asarray(pixels.transpose(0, 2, 3, 1))


def test_every_hidden_state(parity):
    pixels = nhwc(parity.inputs["pixel_values"])
    for depth in range(parity.model.vision.config.layers + 1):
        vision = variant(parity.model.vision, select_layer=depth)
        np.testing.assert_allclose(
            run(vision, pixels), parity.outputs[f"vit_hidden_{depth}"], atol=ATOL, rtol=0
        )


def test_last_state_and_pooler(parity):
    x = run(variant(parity.model.vision, select_layer=-1), nhwc(parity.inputs["pixel_values"]))
    np.testing.assert_allclose(x, parity.outputs["vit_last_hidden_state"], atol=ATOL, rtol=0)
    np.testing.assert_allclose(x[:, 0], parity.outputs["vit_pooler_output"], atol=ATOL, rtol=0)


def test_larger_image_interpolates_positions(parity):
    vision = variant(parity.model.vision, select_layer=-1)
    x = run(vision, nhwc(parity.inputs["pixel_values_alt"]))
    np.testing.assert_allclose(x, parity.outputs["vit_alt_last_hidden_state"], atol=ATOL, rtol=0)


def test_resized_position_tables(parity):
    positions = parity.model.vision.position_embedding[...]
    side = parity.model.vision.config.grid
    for name, change in (("resized_pos_embed", 2), ("resized_pos_embed_down", -2)):
        expected = parity.outputs[name][0]
        grid = int(round((len(expected) - 1) ** 0.5))
        assert np.sign(grid - side) == np.sign(change)
        np.testing.assert_allclose(
            resize_positions(positions, (grid, grid)), expected, atol=1e-5, rtol=0
        )


def test_bicubic_rows():
    np.testing.assert_allclose(
        bicubic_matrix(4, 6)[:2],
        [[1.0868056, -0.0868056, 0, 0], [0.5, 0.59375, -0.09375, 0]],
        atol=1e-7,
    )
    np.testing.assert_allclose(bicubic_matrix(4, 2)[0], [0.5, 0.59375, -0.09375, 0], atol=1e-7)
    np.testing.assert_array_equal(bicubic_matrix(5, 5), np.eye(5))


def test_rows_that_fill_no_patch_are_dropped(load_golden):
    vision = load_golden("internlm2").model.vision
    pixels = nhwc(load_golden("internlm2").inputs["pixel_values"])
    wider = jnp.pad(pixels, ((0, 0), (0, 5), (0, 13), (0, 0)), constant_values=9.0)
    np.testing.assert_array_equal(vision.embed(wider), vision.embed(pixels))


TINY = VisionConfig(width=16, layers=4, heads=2, mlp_width=32, image_size=28, drop_path=0.5)


def tiny(**changes):
    return VisionTower(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0), dtype=jnp.float32)


def test_drop_path_draws_per_tile_and_grows_with_depth():
    from internvlx_jax.models.layers import drop_path

    branch = jnp.ones((4000, 3, 2))
    dropped = np.asarray(drop_path(branch, jax.random.key(0), 0.1, batch_dims=1))
    per_tile = dropped.reshape(4000, -1)
    assert np.all(per_tile == per_tile[:, :1])
    assert 0.08 < np.mean(per_tile[:, 0] == 0) < 0.12
    np.testing.assert_allclose(per_tile[per_tile > 0], 1 / 0.9, rtol=1e-6)
    assert drop_path(branch, None, 0.1, batch_dims=1) is branch


def test_drop_path_acts_in_training_only():
    vision, pixels = tiny(), jax.random.normal(jax.random.key(1), (8, 28, 28, 3))
    still = run(vision, pixels)
    moved = run(vision, pixels, jax.random.key(2))
    assert np.abs(np.asarray(moved - still)).max() > 1e-3
    none = tiny(drop_path=0.0)
    np.testing.assert_array_equal(run(none, pixels, jax.random.key(2)), still)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(remat):
    vision, pixels = tiny(drop_path=0.0), jax.random.normal(jax.random.key(1), (2, 28, 28, 3))
    grad = jax.jit(
        jax.grad(lambda v, policy: jnp.sum(v(pixels, remat=policy) ** 2)), static_argnums=1
    )
    for a, b in zip(jax.tree.leaves(grad(vision, "none")), jax.tree.leaves(grad(vision, remat))):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4)


def test_select_layer_out_of_range_is_named():
    with pytest.raises(ValueError, match="select_layer -6"):
        dataclasses.replace(TINY, select_layer=-6)
