"""load_pretrained: folders straight onto a mesh, strict about every name (checkpoints.md 6, 8)."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from internvlx_jax import load_pretrained
from internvlx_jax.checkpoints.hf_folder import HFFolder
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.models.params import abstract_model, flatten
from internvlx_jax.models.sharding import make_mesh, param_shardings


@pytest.fixture
def folder(golden, tmp_path):
    shutil.copytree(golden / "internlm2", tmp_path / "model")
    return tmp_path / "model"


def params(pretrained):
    return flatten(nnx.to_pure_dict(nnx.state(pretrained.model)))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder, count=3):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {
        name: f"model-{i % count + 1:05}-of-{count:05}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file
        )
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_sharded_equals_single(folder):
    single = params(load_pretrained(folder, dtype="float32"))
    shard(folder)
    sharded = params(load_pretrained(folder, dtype="float32"))
    assert single.keys() == sharded.keys()
    for path in single:
        np.testing.assert_array_equal(single[path], sharded[path])


def test_onto_a_mesh(folder):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    single, placed = (
        params(load_pretrained(folder, dtype="float32")),
        params(load_pretrained(folder, dtype="float32", mesh=mesh)),
    )
    for path in single:
        np.testing.assert_array_equal(single[path], placed[path])
    kernel = placed["decoder.layers.mlp.gate.kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_bfloat16_files_and_targets(folder):
    def to_bf16(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    original = params(load_pretrained(folder, dtype="bfloat16"))
    rewrite(folder, to_bf16)
    for path, value in params(load_pretrained(folder, dtype="bfloat16")).items():
        assert value.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(np.asarray(value), np.asarray(original[path]))
    for value in params(load_pretrained(folder, dtype="float32")).values():
        assert value.dtype == np.float32


def test_every_mismatch_in_one_report(folder):
    def damage(tensors):
        del tensors["projector.cls_scale"]
        tensors["extra.weight"] = np.zeros((2, 3), np.float32)
        tensors["language_model.output.weight"] = tensors["language_model.output.weight"][
            :-1
        ].copy()
        tensors["vision_model.encoder.layers.1.ls1"] = np.zeros(64, np.int32)

    rewrite(folder, damage)
    with pytest.raises(CheckpointError) as error:
        load_pretrained(folder)
    text = str(error.value)
    assert len(error.value.problems) == 4
    assert "missing tensor projector.cls_scale [1, 2, 2, 64]" in text
    assert "unused tensor extra.weight [2, 3]" in text
    assert "language_model.output.weight has shape [199, 64], config.json implies [200, 64]" in text
    assert "vision_model.encoder.layers.1.ls1 has dtype I32" in text


def test_old_rotary_tables_are_ignored(folder):
    def add(tensors):
        tensors["language_model.model.layers.0.attention.rotary_emb.inv_freq"] = np.zeros(
            8, np.float32
        )

    rewrite(folder, add)
    load_pretrained(folder)


def test_index_problems(folder):
    index = shard(folder)
    (folder / "model-00002-of-00003.safetensors").rename(folder / "moved.safetensors")
    with pytest.raises(
        CheckpointError, match="model-00002-of-00003.safetensors: named by .* but missing"
    ):
        load_pretrained(folder)
    (folder / "moved.safetensors").rename(folder / "model-00002-of-00003.safetensors")
    some = next(iter(index["weight_map"]))
    index["weight_map"][some] = "model-00002-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{some}: .* places it in"):
        load_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        load_pretrained(folder)


def test_truncated_file(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors: not a readable safetensors file"):
        load_pretrained(folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint folder.*holds config.json.*Found: README.md"
    ):
        load_pretrained(folder)


def test_config_error_names_the_file(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad2square": True}))
    with pytest.raises(ConfigError, match="config.json.*pad2square = True"):
        load_pretrained(folder)


def test_a_process_reads_its_own_slices_only(folder, monkeypatch):
    """A process with 2 of 8 devices reads a quarter of a sharded parameter.

    A slice that both of its devices hold is read once.
    """
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    source = HFFolder(folder)
    mine = set(jax.devices()[:2])

    def local_part(shape, sharding, callback):
        for device, index in sharding.devices_indices_map(shape).items():
            if device in mine:
                callback(index)
        return np.zeros(shape)

    read, sizes = source.read, {}

    def counted(path, dtype, index):
        array = read(path, dtype, index)
        sizes[path] = sizes.get(path, 0) + array.size
        return array

    monkeypatch.setattr(source, "read", counted)
    monkeypatch.setattr(jax, "make_array_from_callback", local_part)
    abstract = abstract_model(source.config, dtype="float32")
    source.load(abstract, param_shardings(abstract.shapes, abstract.axes, mesh))
    gate = abstract.shapes[
        "decoder.layers.mlp.gate.kernel"
    ]  # over fsdp and tensor; devices 0 and 1 differ in tensor
    assert sizes["decoder.layers.mlp.gate.kernel"] == gate.size // 2
    assert sizes["decoder.norm.weight"] == abstract.shapes["decoder.norm.weight"].size
    assert sum(sizes.values()) < 0.6 * sum(leaf.size for leaf in abstract.shapes.values())


@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_a_slice_is_read_without_the_rest(golden, name, rewrite_tensors, tmp_path):
    """Every slice equals that of the whole; values outside are not even looked at."""
    folder = tmp_path / "model"
    shutil.copytree(golden / name, folder)
    source = HFFolder(folder)
    for path in (
        "decoder.layers.attn.qkv.kernel",
        "decoder.layers.attn.out.kernel",
        "vision.layers.attn.qkv.kernel",
        "decoder.embedding",
        "decoder.head",
    ):
        whole = source.read(path)
        index = tuple(slice(size // 2, size) for size in whole.shape)
        np.testing.assert_array_equal(source.read(path, None, index), whole[index])
    head = {"internlm2": "language_model.output.weight", "qwen2": "language_model.lm_head.weight"}[
        name
    ]

    def damage(tensors):
        tensors[head][:, :8] = np.nan

    rewrite_tensors(folder, damage)
    source = HFFolder(folder)
    source.read("decoder.head", None, (slice(8, None), slice(None)))
    source.check_finite()
    source.read("decoder.head", None, (slice(0, 16), slice(None)))
    with pytest.raises(CheckpointError, match=f"{head} holds"):
        source.check_finite()
