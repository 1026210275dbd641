"""Path, shape, axes and partition of every parameter; 1 device equals 8 (training.md 13)."""

import json
import math

import jax
import numpy as np
import pytest

from internvlx_jax.checkpoints.hf_config import model_config
from internvlx_jax.checkpoints.hf_folder import HFFolder
from internvlx_jax.convert.verify import inputs_from_flat
from internvlx_jax.core.presets import internvlx_2b, internvlx_8b
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.data.batch import Batch
from internvlx_jax.models.params import abstract_model, init_params
from internvlx_jax.models.sharding import (
    batch_sharding,
    make_mesh,
    mesh_sizes,
    param_shardings,
    replicated,
)
from internvlx_jax.training.step import loss_and_grads


@pytest.mark.parametrize("size", ["2b", "8b"])
def test_golden_partition(golden, size):
    """Regenerate after a wanted change: print(table) into tests/golden/partition-SIZE.txt."""
    stored = json.loads((golden / f"shapes-{size}.json").read_text())
    config = model_config(stored["config"], stored["shapes"])
    assert partition_table(config) == (golden / f"partition-{size}.txt").read_text()


@pytest.mark.parametrize("preset", ["paper_inject", "fast_inject"])
@pytest.mark.parametrize("size, model", [("2b", internvlx_2b), ("8b", internvlx_8b)])
def test_golden_partition_of_lvtc(golden, size, model, preset):
    """What LVTC adds, injections included; `paper` and `fast` have a part of it."""
    added = [
        line
        for line in partition_table(model(preset)).splitlines(keepends=True)
        if line.startswith("lvtc.")
    ]
    assert "".join(added) == (golden / f"partition-{size}-{preset}.txt").read_text()


def partition_table(config):
    """Path, shape, dtype and partition of every parameter on a 2 x 2 x 2 mesh."""
    abstract = abstract_model(config, dtype="bfloat16")
    shardings = param_shardings(
        abstract.shapes, abstract.axes, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    )
    return "".join(
        f"{path} {list(leaf.shape)} {leaf.dtype} {list(shardings[path].spec)}\n"
        for path, leaf in sorted(abstract.shapes.items())
    )


def test_large_parameters_are_divided(golden):
    """At 8B nothing above a million elements stays whole on an 8-device mesh."""
    stored = json.loads((golden / "shapes-8b.json").read_text())
    abstract = abstract_model(model_config(stored["config"], stored["shapes"]), dtype="bfloat16")
    shardings = param_shardings(
        abstract.shapes, abstract.axes, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    )
    for path, leaf in abstract.shapes.items():
        share = math.prod(shardings[path].shard_shape(leaf.shape)) / leaf.size
        assert leaf.size < 1e6 or share <= 1 / 4, path


def test_mesh_errors():
    with pytest.raises(ValueError, match="needs 3 devices, 8 are present"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ValueError, match="multiple of the 4 slices"):
        mesh_sizes(MeshConfig(data=2, fsdp=-1), 1024, slices=4)
    assert dict(make_mesh(MeshConfig(fsdp=4)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
    "devices, rows, slices, expected",
    [
        (8, 128, 1, (1, 8, 1)),
        (256, 256, 1, (4, 64, 1)),
        (256, 128, 1, (2, 64, 2)),  # no device without a row
        (512, 512, 2, (8, 64, 1)),
        (256, None, 4, (4, 64, 1)),
        (6, 128, 1, (1, 2, 3)),
    ],
)
def test_an_open_mesh_follows_devices_and_rows(devices, rows, slices, expected):
    sizes = mesh_sizes(MeshConfig(data=-1, fsdp=-1, tensor=-1), devices, rows=rows, slices=slices)
    assert tuple(sizes.values()) == expected


def golden_batch(golden, folder="internlm2"):
    """A golden checkpoint, and its batch of eight rows."""
    source = HFFolder(golden / folder)
    inputs = dict(np.load(golden / folder.partition("/")[0] / "inputs.npz"))
    flags = inputs["image_flags"] == 1
    model_inputs = inputs_from_flat(
        source.config,
        7,
        inputs["input_ids"],
        inputs["pixel_values"][flags],
        inputs["attention_mask"],
    )
    labels = inputs["labels"].astype(np.int32)
    batch = Batch(model_inputs, labels, (labels != -100).astype(np.float32), np.zeros_like(labels))
    # Eight rows, so that every device of data x fsdp holds some: the three golden ones, repeated.
    return source, jax.tree.map(lambda x: np.concatenate([x, x, x[:2]]), batch)


@pytest.mark.parametrize("folder", ["internlm2", "qwen3/internvl"])
@pytest.mark.parametrize(
    "mesh_config", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=8, tensor=1)]
)
def test_one_device_equals_eight(golden, mesh_config, folder):
    source, batch = golden_batch(golden, folder)
    assert source.config.decoder.qk_norm == folder.startswith("qwen3")
    abstract = abstract_model(source.config, dtype="float32")

    def run(mesh):
        shardings = param_shardings(abstract.shapes, abstract.axes, mesh)
        params = source.load(abstract, shardings)
        step = jax.jit(
            lambda params, batch: loss_and_grads(abstract.graphdef, params, {}, batch, None),
            out_shardings=(replicated(mesh), shardings),
        )
        with jax.default_matmul_precision("highest"):
            return step(params, jax.device_put(batch, batch_sharding(mesh)))

    (loss, _), grads = run(make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    (sharded_loss, _), sharded_grads = run(make_mesh(mesh_config))
    np.testing.assert_allclose(sharded_loss, loss, atol=2e-6)
    for path in grads:
        np.testing.assert_allclose(sharded_grads[path], grads[path], atol=3e-6, err_msg=path)


def test_sharded_init_equals_whole_init(tiny, tiny_params):
    abstract = abstract_model(tiny, dtype="float32")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = param_shardings(abstract.shapes, abstract.axes, mesh)
    sharded = init_params(tiny, 0, shardings=shardings)
    assert tiny_params.keys() == abstract.shapes.keys()
    for path, whole in tiny_params.items():
        np.testing.assert_array_equal(whole, sharded[path], err_msg=path)
        assert sharded[path].sharding == shardings[path]


def test_initial_distributions(tiny_params):
    """Fresh parameters have the distributions of model.md 12.

    Tower and projector: U(-1/sqrt(fan_in), ..); embeddings: N(0, 1); decoder: N(0, 0.02); norms: 1.
    """
    params = tiny_params
    patch = np.asarray(params["vision.patch_embed.kernel"])
    assert np.abs(patch).max() <= 588**-0.5 and patch.std() == pytest.approx(
        588**-0.5 / 3**0.5, rel=0.05
    )
    assert np.asarray(params["vision.position_embedding"]).std() == pytest.approx(1.0, rel=0.15)
    assert np.asarray(params["decoder.embedding"]).std() == pytest.approx(0.02, rel=0.05)
    assert np.asarray(params["decoder.layers.mlp.down.kernel"]).std() == pytest.approx(
        0.02, rel=0.05
    )
    for path, value in params.items():
        if "norm" in path:
            assert np.unique(value).tolist() == [0.0 if path.endswith("bias") else 1.0], path
    # Layers of a stack differ.
    assert (
        np.ptp(
            np.asarray(params["decoder.layers.mlp.gate.kernel"])[0]
            - params["decoder.layers.mlp.gate.kernel"][1]
        )
        > 0
    )


def test_model_modules_do_not_name_mesh_axes():
    from pathlib import Path

    import internvlx_jax

    root = Path(internvlx_jax.__file__).parent
    for file in root.rglob("*.py"):
        if file.name != "sharding.py":
            text = file.read_text()
            assert "PartitionSpec" not in text and '"fsdp"' not in text, file
