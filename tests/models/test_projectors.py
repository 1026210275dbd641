"""PVTC and mlp1 against the original and against the formulas (model.md 4, 5)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from safetensors.numpy import load_file

from internvlx_jax.checkpoints.name_table import name_table
from internvlx_jax.convert.verify import variant
from internvlx_jax.core.model_config import (
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.models.params import flatten, unflatten
from internvlx_jax.models.projectors import PVTC, Mlp1, split_regions, transpose_grid

ATOL = 1e-4
run = jax.jit(lambda projector, x: projector(x))


def test_both_pixel_shuffle_versions(parity):
    x = jnp.asarray(parity.inputs["proj_in"])
    for version in ("v1", "v2"):
        z = run(variant(parity.model.projector, pixel_shuffle=version), x)
        expected = parity.outputs[f"proj_out_{version}"]
        np.testing.assert_allclose(z.reshape(expected.shape), expected, atol=ATOL, rtol=0)


def test_every_intermediate(parity):
    projector, outputs = parity.model.projector, parity.outputs
    x = jnp.asarray(parity.inputs["proj_in"])
    regions = split_regions(x[:, 1:], projector.config.region_side)
    shuffled = rearrange(regions, "i q m v -> i q (m v)")
    local = projector.local_query(shuffled)
    if projector.config.pixel_shuffle == "v1":
        shuffled, local = transpose_grid(shuffled), transpose_grid(local)
    np.testing.assert_array_equal(
        shuffled.reshape(outputs["proj_shuffled"].shape), outputs["proj_shuffled"]
    )
    kv = projector.region_kv(regions)
    cls = projector.global_query(x[:, 0])
    gq = cls[:, None] * projector.cls_scale[...]

    def close(ours, name):
        np.testing.assert_allclose(
            ours.reshape(outputs[name].shape), outputs[name], atol=ATOL, rtol=0, err_msg=name
        )

    close(local, "proj_mlp1")
    close(cls, "proj_mlp2")
    close(rearrange(kv, "i q m d -> (i q) m d"), "proj_kv_windows")
    close(gq, "proj_q_global_in")
    close(projector.attn_local(local, kv, None, 0.0), "proj_attn_local")
    close(projector.attn_global(gq, kv, None, 0.0), "proj_attn_global")
    close(run(projector, x), "proj_out")


def test_tower_and_projector_together(parity):
    pixels = jnp.asarray(parity.inputs["pixel_values"].transpose(0, 2, 3, 1))
    z = jax.jit(lambda model, pixels: model.encode_tiles(pixels))(parity.model, pixels)
    expected = parity.outputs["extract_feature"]
    np.testing.assert_allclose(z.reshape(expected.shape), expected, atol=ATOL, rtol=0)
    for layer in (-1, -2):
        x = run(variant(parity.model.vision, select_layer=layer), pixels)
        expected = parity.outputs[f"extract_feature_select{layer}"]
        np.testing.assert_allclose(
            run(parity.model.projector, x).reshape(expected.shape), expected, atol=ATOL, rtol=0
        )


def model_config(*, vision_width, grid, width, ratio, kind="pvtc"):
    size = grid * 14
    return ModelConfig(
        vision=VisionConfig(width=vision_width, layers=1, heads=2, mlp_width=32, image_size=size),
        projector=ProjectorConfig(kind=kind, downsample_ratio=ratio),
        decoder=DecoderConfig(
            vocab_size=32, width=width, layers=1, heads=2, kv_heads=2, head_dim=16, mlp_width=32
        ),
        prompt=PromptConfig(tiles=TileConfig(tile_size=size)),
    )


def build(config):
    make = PVTC if config.projector.kind == "pvtc" else Mlp1
    sizes = (config.vision.width, config.token_grid) if make is PVTC else (config.vision.width,)
    return make(config.projector, *sizes, config.decoder.width, rngs=nnx.Rngs(0), dtype=jnp.float32)


def test_regions_of_four_by_four(golden):
    folder = golden / "projector_ratio_0.25"
    tensors, arrays = load_file(folder / "model.safetensors"), np.load(folder / "arrays.npz")
    config = model_config(vision_width=24, grid=8, width=32, ratio=0.25)
    projector = build(config)
    entries = [entry for entry in name_table(config) if entry.target.startswith("projector.")]
    flat = {
        entry.target: entry.to_target(
            [tensors[name.removeprefix("projector.")] for name in entry.sources(0)]
        )
        for entry in entries
    }
    assert flat.keys() == {
        f"projector.{path}" for path in flatten(nnx.to_pure_dict(nnx.state(projector)))
    }
    graphdef, _ = nnx.split(projector)
    params = {path.removeprefix("projector."): jnp.asarray(value) for path, value in flat.items()}
    loaded = nnx.merge(graphdef, unflatten(params))
    for version in ("v1", "v2"):
        z = run(variant(loaded, pixel_shuffle=version), jnp.asarray(arrays["proj_in"]))
        expected = arrays[f"proj_out_{version}"]
        np.testing.assert_allclose(z.reshape(expected.shape), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("ratio, side", [(1.0, 1), (0.5, 2), (0.25, 4), (0.125, 8)])
def test_any_power_of_two_region(ratio, side):
    config = model_config(vision_width=8, grid=8, width=16, ratio=ratio)
    x = jax.random.normal(jax.random.key(0), (2, 65, 8))
    projector = build(config)
    z = run(projector, x)
    assert z.shape == (2, (8 // side) ** 2, 16)
    # A token depends on its own region and the class token only.
    patch = 1 + 3 * 8 + 5
    changed = np.abs(np.asarray(run(projector, x.at[:, patch].add(1.0)) - z)).max(axis=(0, 2)) > 0
    assert np.flatnonzero(changed).tolist() == [(3 // side) * (8 // side) + 5 // side]


@pytest.mark.parametrize("ratio", [0.3, 0.75, 2.0])
def test_other_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="downsample_ratio"):
        ProjectorConfig(downsample_ratio=ratio)


def test_pvtc_refuses_another_grid():
    projector = build(model_config(vision_width=8, grid=4, width=16, ratio=0.5))
    with pytest.raises(ValueError, match="36 patches"):
        projector(jnp.zeros((1, 37, 8)))


def test_mlp1_is_its_formula():
    config = model_config(vision_width=8, grid=4, width=16, ratio=0.5, kind="mlp1")
    projector = build(config)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 17, 8)))
    tokens = np.stack(
        [
            [
                np.concatenate(
                    [x[i, 1 + (2 * a + y) * 4 + 2 * b + c] for y in (0, 1) for c in (0, 1)]
                )
                for a in (0, 1)
                for b in (0, 1)
            ]
            for i in (0, 1)
        ]
    )
    mean, var = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
    y = (tokens - mean) / np.sqrt(var + 1e-5)
    y = y @ projector.fc1.kernel[...] + projector.fc1.bias[...]
    y = (
        np.asarray(jax.nn.gelu(y, approximate=False)) @ projector.fc2.kernel[...]
        + projector.fc2.bias[...]
    )
    np.testing.assert_allclose(projector(jnp.asarray(x)), y, atol=1e-5)
