"""Everything that is wrong with a checkpoint is named (checkpoints.md 8).

The exit status is 1, and nothing is left behind.
"""

import json
import os
import shutil
import struct
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.checkpoints.safetensors_folder import CHECKSUMS, format_sums, sha256
from internvlx_jax.cli.convert import main


@pytest.fixture
def folder(golden, tmp_path):
    shutil.copytree(
        golden / "qwen2", tmp_path / "model", ignore=shutil.ignore_patterns("*.npz", "*.md")
    )
    return tmp_path / "model"


@pytest.fixture
def refused(folder, tmp_path, capsys):
    """refused(*flags): import fails with status 1 and leaves nothing; -> the message."""

    def check(*flags, source=folder):
        before = sorted(tmp_path.rglob("*"))
        assert main(["import", "--from", str(source), "--to", str(tmp_path / "jax"), *flags]) == 1
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return check


def accepted(folder, tmp_path, *flags):
    return main(["import", "--from", str(folder), "--to", str(tmp_path / "jax"), *flags]) == 0


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_bit_flip_in_the_values(folder, refused, tmp_path):
    """Found by its checksum; without one, only values that are not finite betray it."""
    file = folder / "model.safetensors"
    (folder / CHECKSUMS).write_text(format_sums({file.name: sha256(file)}))
    data = bytearray(file.read_bytes())
    data[-1000] ^= 0x10
    file.write_bytes(data)
    message = refused()
    assert "model.safetensors: SHA-256 is" in message and "damaged" in message
    (folder / CHECKSUMS).unlink()
    assert accepted(folder, tmp_path)


def test_a_bit_flip_in_a_cached_download(folder, refused, tmp_path):
    """Files of a Hugging Face cache are links to blobs that are named by their checksum."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    blob = tmp_path / sha256(file)
    file.rename(blob)
    os.symlink(blob, file)
    data[-1] ^= 1
    blob.write_bytes(data)
    assert "damaged" in refused()


def test_a_bit_flip_in_the_header(folder, refused):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    place = data.index(b'"data_offsets"') + 1
    data[place] ^= 0x02
    file.write_bytes(data)
    assert "model.safetensors: not a readable safetensors file" in refused()


def test_a_truncated_file(folder, refused):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors: not a readable safetensors file" in refused()


def test_an_index_that_names_a_missing_shard(folder, refused):
    tensors = load_file(folder / "model.safetensors")
    index = {
        "metadata": {},
        "weight_map": {name: f"model-{n % 2}.safetensors" for n, name in enumerate(tensors)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-0.safetensors")
    message = refused()
    assert "model-1.safetensors: named by model.safetensors.index.json but missing" in message


def test_a_tensor_in_two_shards(folder, refused):
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors, folder / "model-0.safetensors")
    save_file({name: tensors[name]}, folder / "model-1.safetensors")
    weight_map = {name: "model-0.safetensors" for name in tensors} | {name: "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert f"tensor {name} is in both model-0.safetensors and model-1.safetensors" in refused()


def test_a_tensor_twice_in_one_header(folder, refused):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip()
    header = (
        header[:-1]
        + b',"projector.cls_scale":'
        + json.dumps(json.loads(header)["projector.cls_scale"]).encode()
        + b"}"
    )
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    message = refused()
    assert "model.safetensors" in message and ("twice" in message or "duplicate" in message.lower())


def test_a_config_that_contradicts_the_tensors(folder, refused):
    def more_layers(config):
        config["llm_config"]["num_hidden_layers"] = 4
        config["llm_config"]["vocab_size"] = 201
        config["vision_config"]["qk_normalization"] = True

    edit_config(folder, more_layers)
    message = refused()
    assert (
        "missing tensor language_model.model.layers.3.self_attn.q_proj.weight [32, 32]" in message
    )
    assert (
        "language_model.lm_head.weight has shape [200, 32], config.json implies [201, 32]"
        in message
    )
    assert "missing tensor vision_model.encoder.layers.1.attn.q_norm.weight [64]" in message


def test_values_that_are_not_finite(folder, refused, rewrite_tensors):
    def damage(tensors):
        tensors["projector.mlp2.1.weight"][3, 4] = np.nan
        tensors["language_model.model.layers.1.mlp.up_proj.weight"][0, :2] = np.inf

    rewrite_tensors(folder, damage)
    message = refused()
    assert "tensor projector.mlp2.1.weight holds 1 values that are NaN or infinite" in message
    assert "tensor language_model.model.layers.1.mlp.up_proj.weight holds 2 values" in message


def test_what_may_be_ignored_and_started_fresh_is_listed(
    folder, refused, rewrite_tensors, tmp_path, capsys
):
    def change(tensors):
        tensors["extra.weight"] = np.zeros(3, np.float32)
        for name in [name for name in tensors if name.startswith("projector.")]:
            del tensors[name]

    rewrite_tensors(folder, change)
    message = refused()
    assert (
        "unused tensor extra.weight [3]" in message
        and "missing tensor projector.cls_scale [1, 2, 2, 32]" in message
    )
    message = refused("--ignore_source", "nothing", "--init_missing", "vision")
    assert (
        "--ignore_source 'nothing' matches no tensor" in message
        and "--init_missing 'vision' matches no" in message
    )
    assert "is not a regular expression" in refused("--ignore_source", "(")
    assert accepted(
        folder, tmp_path, "--ignore_source", "extra", "--init_missing", "projector", "--verify"
    )
    out = capsys.readouterr().out
    assert "initialized projector.cls_scale: [4, 32] ~ " in out and "seed 0" in out
    assert "verified: 29 read back" in out  # what was read, not what is fresh


def test_a_folder_that_is_there_is_kept(folder, tmp_path, capsys):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "mine").write_text("keep")
    assert not accepted(folder, tmp_path)
    assert "exists already" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "jax").iterdir()] == ["mine"]


def test_a_damaged_write_is_found_by_verify(folder, tmp_path, monkeypatch, capsys):
    """--verify reads the files: a wrong value is an error, and the folder never appears."""
    from internvlx_jax.checkpoints import run_writer, safetensors_writer

    write = safetensors_writer.SafetensorsWriter.write

    def wrong(self, name, array, first_row=0):
        write(self, name, array + (name == "projector.cls_scale"), first_row)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_writer.SafetensorsWriter, "write", wrong)
        status = main(
            [
                "export",
                "--from",
                str(folder),
                "--to",
                str(tmp_path / "back"),
                "--layout",
                "internvl-x",
                "--dtype",
                "keep",
                "--verify",
            ]
        )
    assert (
        status == 1
        and "projector.cls_scale: 128 values differ, first at [0, 0, 0, 0], by at most 1"
        in (capsys.readouterr().err)
    )
    add = run_writer.ParamsWriter.add
    monkeypatch.setattr(
        run_writer.ParamsWriter,
        "add",
        lambda self, path, array: add(self, path, -array if path.endswith("cls_scale") else array),
    )
    assert not accepted(folder, tmp_path, "--verify")
    assert "projector.cls_scale: 128 values differ" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


def test_pickle_files_need_torch(folder, refused, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refused()
    assert (
        "pytorch_model.bin: pickle files need torch" in message
        and "convert the files to safetensors" in message
    )


def test_hub_ids(refused, monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'internvlx-jax[hub]'" in refused(source="owner/name")
    assert "no such folder" in refused(source="no/such/folder")
    hub = types.ModuleType("huggingface_hub")

    def offline(*_, **__):
        raise OSError("cannot reach the server")

    hub.snapshot_download = offline
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    message = refused(source="owner/name")
    assert (
        "the Hugging Face hub did not deliver it (cannot reach the server)" in message
        and "path of a downloaded copy" in message
    )


def test_a_downloaded_repository_is_imported(folder, tmp_path, monkeypatch):
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, revision=None, allow_patterns=(): {
        ("owner/name", "v1"): folder
    }[name, revision]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    assert accepted("owner/name", tmp_path, "--revision", "v1")


def test_an_id_carries_its_revision(folder, tmp_path, monkeypatch):
    """Every command takes a checkpoint by one name, so the revision is a part of it."""
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, revision=None, allow_patterns=(): {
        ("owner/name", "refs/pr/1"): folder
    }[name, revision]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/name@refs/pr/1").path == folder


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda config: config["text_config"].update(model_type="mamba"),
            "text_config.model_type is 'mamba'",
        ),
        (
            lambda config: config["vision_config"].update(use_mean_pooling=False),
            "use_mean_pooling is False",
        ),
        (
            lambda config: config["vision_config"].update(image_size=[56, 112]),
            "image_size [56, 112] is not square",
        ),
        (lambda config: config.pop("template"), "the hf layout does not say template"),
    ],
)
def test_hf_configs_that_cannot_be_read(tmp_path, make_checkpoint, refused, change, message):
    make_checkpoint(tmp_path / "chat", "qwen2", "mlp1")
    assert (
        main(
            [
                "export",
                "--from",
                str(tmp_path / "chat"),
                "--to",
                str(tmp_path / "hf"),
                "--layout",
                "hf",
                "--image_token_id",
                "7",
            ]
        )
        == 0
    )
    (tmp_path / "hf" / "chat_template.jinja").unlink()  # or it would say the template
    edit_config(tmp_path / "hf", change)
    assert message in refused(source=tmp_path / "hf")


def test_inspect(folder, tmp_path, capsys, rewrite_tensors):
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert (
        "201,888 parameters, 98 tensors, 807,552 bytes F32" in out
        and "nothing missing, nothing extra" in out
    )
    assert accepted(folder, tmp_path)
    assert main(["inspect", str(tmp_path / "jax"), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("\n{") :])
    assert sum(found["parameters"].values()) == 201_888 and found["problems"] == []
    rewrite_tensors(folder, lambda tensors: tensors.pop("projector.cls_scale"))
    assert main(["inspect", str(folder)]) == 1
    assert "problem: missing tensor projector.cls_scale" in capsys.readouterr().out


def test_an_export_checks_its_source(folder, tmp_path, capsys, rewrite_tensors):
    """A PyTorch folder that goes straight into another layout is held to the same rules."""
    rewrite_tensors(
        folder, lambda tensors: tensors.update({"extra.weight": np.zeros(3, np.float32)})
    )
    assert (
        main(
            [
                "export",
                "--from",
                str(folder),
                "--to",
                str(tmp_path / "out"),
                "--layout",
                "internvl-x",
            ]
        )
        == 1
    )
    assert "unused tensor extra.weight [3]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
