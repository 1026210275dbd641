"""The name table without weights: names, shapes and totals at real size (checkpoints.md 11)."""

import json

import ml_dtypes
import numpy as np
import pytest

from internvlx_jax.checkpoints.hf_config import model_config
from internvlx_jax.checkpoints.name_table import name_table
from internvlx_jax.checkpoints.safetensors_writer import index_text, plan_files
from internvlx_jax.checkpoints.torch_checkpoint import expected_tensors
from internvlx_jax.models.params import abstract_model


def abstract(golden, size, **changes):
    stored = json.loads((golden / f"shapes-{size}.json").read_text())
    config = model_config({**stored["config"], **changes}, stored["shapes"])
    return stored, config, abstract_model(config, dtype="bfloat16")


@pytest.mark.parametrize("size", ["2b", "8b"])
def test_names_shapes_and_totals(golden, size):
    stored, config, model = abstract(golden, size)
    tensors = list(expected_tensors(name_table(config), model).items())
    assert len(tensors) == len(dict(tensors)) == stored["n_tensors"]
    assert [(name, list(shape)) for name, shape in tensors] == [
        (name, list(s)) for name, s in stored["shapes"].items()
    ]
    total = sum(leaf.size for leaf in model.shapes.values())
    assert total == stored["parameters"]["total"]
    for module, ours in (
        ("vision_model", "vision"),
        ("language_model", "decoder"),
        ("projector", "projector"),
    ):
        count = sum(leaf.size for path, leaf in model.shapes.items() if path.startswith(ours + "."))
        assert count == stored["parameters"][module]
    assert config.tokens_per_tile == stored["num_image_token"]


@pytest.mark.parametrize("size", ["2b", "8b"])
def test_backwards_too(golden, size):
    """Every stored tensor is the source of one entry, and the targets are our parameters."""
    stored, config, model = abstract(golden, size)
    table = name_table(config)
    assert {entry.target for entry in table} == model.shapes.keys()
    sources = [
        name
        for entry in table
        for layer in range(entry.layers or 1)
        for name in entry.sources(layer)
    ]
    assert sorted(sources) == sorted(stored["shapes"])


@pytest.mark.parametrize(
    "size, total, tensors", [("2b", 2_205_754_368, 517), ("8b", 8_075_365_376, 573)]
)
def test_internvl2_baseline(golden, size, total, tensors):
    stored = json.loads((golden / f"shapes-{size}.json").read_text())
    names = [name for name in stored["shapes"] if not name.startswith("projector.")] + [
        "mlp1.0.weight"
    ]
    config = model_config(stored["config"], names)
    model = abstract_model(config, dtype="bfloat16")
    assert config.projector.kind == "mlp1"
    assert sum(leaf.size for leaf in model.shapes.values()) == total
    listed = expected_tensors(name_table(config), model)
    assert len(listed) == tensors
    assert len(expected_tensors(name_table(config, "hf"), model)) == {517: 661, 573: 733}[tensors]
    if size == "8b":
        plan = {name: (shape, np.dtype(ml_dtypes.bfloat16)) for name, shape in listed.items()}
        assert len(index_text(plan, plan_files(plan))) == 51_167  # bytes of the public file
    width = config.decoder.width
    assert listed["mlp1.1.weight"] == (width, 4096) and listed["mlp1.3.bias"] == (width,)


def test_shards_of_the_public_files(golden):
    """8B: tensors and bytes of each shard, and bytes of the index."""
    stored, config, model = abstract(golden, "8b")
    plan = {
        name: (shape, np.dtype(ml_dtypes.bfloat16))
        for name, shape in expected_tensors(name_table(config), model).items()
    }
    files = plan_files(plan)
    tensors, sizes = {}, {}
    for name, file in files.items():
        tensors[file] = tensors.get(file, 0) + 1
        sizes[file] = sizes.get(file, 0) + 2 * int(np.prod(plan[name][0]))
    assert list(tensors.values()) == [399, 78, 78, 39]
    assert list(sizes.values()) == [4_939_896_832, 4_915_904_512, 4_915_904_512, 2_438_115_328]
    assert next(iter(sizes)) == "model-00001-of-00004.safetensors"
    assert len(index_text(plan, files)) == 52_892


@pytest.mark.parametrize("name", ["internlm2", "internlm2_qknorm", "qwen2"])
def test_transforms_are_bit_exact_inverses(golden, name):
    from safetensors.numpy import load_file

    tensors = load_file(golden / name / "model.safetensors")
    config = model_config(json.loads((golden / name / "config.json").read_text()), tensors)
    for entry in name_table(config):
        for layer in range(entry.layers or 1):
            names = entry.sources(layer)
            back = entry.to_sources(entry.to_target([tensors[source] for source in names]))
            for source, array in zip(names, back, strict=True):
                np.testing.assert_array_equal(array, tensors[source], err_msg=source)


def test_many_layers_are_sorted_by_number(golden):
    """Layer 10 stands behind layer 9, not behind layer 1."""
    _, config, _ = abstract(golden, "2b")
    entry = next(entry for entry in name_table(config) if entry.target == "vision.layers.ls1")
    assert [entry.sources(layer)[0].split(".")[3] for layer in range(entry.layers)] == [
        str(n) for n in range(24)
    ]
