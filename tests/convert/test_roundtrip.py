"""import and export through the command: bit-equal tensors and equal configs, for every layout."""

import functools
import gc
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from internvlx_jax.checkpoints import run_format
from internvlx_jax.checkpoints.run_folder import RunFolder, SplitArray
from internvlx_jax.checkpoints.safetensors_folder import SafetensorsFolder, read_sums, sha256
from internvlx_jax.checkpoints.safetensors_writer import SafetensorsWriter
from internvlx_jax.cli.convert import main
from internvlx_jax.convert import export_hf as to_hf


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["internlm2", "internlm2_qknorm", "qwen2"])
def test_golden_import_verify_export_and_import_again(golden, tmp_path, name, same_tensors, capsys):
    folder = golden / name
    assert run("import", "--from", folder, "--to", tmp_path / "jax", "--verify") == 0
    assert "all bit-equal" in capsys.readouterr().out
    assert (
        run(
            "export",
            "--from",
            tmp_path / "jax",
            "--to",
            tmp_path / "back",
            "--layout",
            "internvl-x",
            "--dtype",
            "keep",
            "--verify",
        )
        == 0
    )
    same_tensors(folder, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert run("import", "--from", tmp_path / "back", "--to", tmp_path / "again") == 0
    first, again = RunFolder(tmp_path / "jax"), RunFolder(tmp_path / "again")
    assert first.config == again.config
    assert first.shapes.keys() == again.shapes.keys()
    pairs = zip(first.read_all(first.shapes), again.read_all(first.shapes), strict=True)
    for (path, one), (_, other) in pairs:
        np.testing.assert_array_equal(one, other, err_msg=path)


@pytest.mark.parametrize(
    "projector, family",
    [
        ("mlp1", "internlm2"),
        ("mlp1", "llama"),
        ("mlp1", "qwen2"),
        ("mlp1", "qwen3"),
        ("mlp1", "phi3"),
        ("pvtc", "llama"),
        ("pvtc", "qwen3"),
        ("pvtc", "phi3"),
    ],
)
def test_every_family(tmp_path, make_checkpoint, same_tensors, projector, family):
    make_checkpoint(tmp_path / "source", family, projector, "bfloat16")
    layout = "internvl" if projector == "mlp1" else "internvl-x"
    assert run("import", "--from", tmp_path / "source", "--to", tmp_path / "jax", "--verify") == 0
    assert (
        run("export", "--from", tmp_path / "jax", "--to", tmp_path / "back", "--layout", layout)
        == 0
    )
    same_tensors(tmp_path / "source", tmp_path / "back")
    assert json.loads((tmp_path / "source" / "config.json").read_text()) == json.loads(
        (tmp_path / "back" / "config.json").read_text()
    )
    if projector == "pvtc" or family == "phi3":
        assert (
            run("export", "--from", tmp_path / "jax", "--to", tmp_path / "hf", "--layout", "hf")
            == 1
        )
        assert not (tmp_path / "hf").exists()
        return
    # internvl -> hf -> JAX -> hf, and back to internvl
    hf = ("--image_token_id", 7, "--layout", "hf")
    assert run("export", "--from", tmp_path / "jax", "--to", tmp_path / "hf", "--verify", *hf) == 0
    assert run("import", "--from", tmp_path / "hf", "--to", tmp_path / "jax2") == 0
    assert run("verify", "--checkpoint", tmp_path / "jax", "--against", tmp_path / "jax2") == 0
    assert (
        run("export", "--from", tmp_path / "jax2", "--to", tmp_path / "hf2", "--layout", "hf") == 0
    )
    same_tensors(tmp_path / "hf", tmp_path / "hf2")
    assert (
        run(
            "export",
            "--from",
            tmp_path / "jax2",
            "--to",
            tmp_path / "back2",
            "--layout",
            "internvl",
        )
        == 0
    )
    same_tensors(tmp_path / "source", tmp_path / "back2")


def test_a_scratch_model_has_a_config_of_its_own(tmp_path, make_checkpoint, same_tensors):
    """Without the files of a source, config.json suffices to read the folder again."""
    make_checkpoint(tmp_path / "source", "qwen2", "mlp1")
    assert run("import", "--from", tmp_path / "source", "--to", tmp_path / "jax") == 0
    for file in (tmp_path / "jax" / "source").iterdir():
        file.unlink()
    assert (
        run("export", "--from", tmp_path / "jax", "--to", tmp_path / "back", "--layout", "internvl")
        == 0
    )
    assert run("import", "--from", tmp_path / "back", "--to", tmp_path / "jax2") == 0
    assert RunFolder(tmp_path / "jax").config == RunFolder(tmp_path / "jax2").config


def test_straight_from_one_layout_to_another(tmp_path, make_checkpoint, same_tensors):
    make_checkpoint(tmp_path / "source", "llama", "mlp1")
    assert (
        run(
            "export",
            "--from",
            tmp_path / "source",
            "--to",
            tmp_path / "hf",
            "--layout",
            "hf",
            "--dtype",
            "keep",
            "--image_token_id",
            7,
        )
        == 0
    )
    assert (
        run(
            "export",
            "--from",
            tmp_path / "hf",
            "--to",
            tmp_path / "back",
            "--layout",
            "internvl",
            "--dtype",
            "keep",
        )
        == 0
    )
    same_tensors(tmp_path / "source", tmp_path / "back")


def test_shards(tmp_path, make_checkpoint, same_tensors, monkeypatch):
    """Several files and an index are read again; one tensor takes rows of several parameters."""
    make_checkpoint(tmp_path / "source", "phi3")
    monkeypatch.setattr(
        to_hf, "SafetensorsWriter", functools.partial(SafetensorsWriter, max_bytes=200_000)
    )
    assert run("import", "--from", tmp_path / "source", "--to", tmp_path / "jax") == 0
    back = tmp_path / "back"
    assert (
        run(
            "export",
            "--from",
            tmp_path / "jax",
            "--to",
            back,
            "--layout",
            "internvl-x",
            "--dtype",
            "keep",
            "--verify",
        )
        == 0
    )
    same_tensors(tmp_path / "source", back)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in back.glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values())) == sorted(
        read_sums(back / "SHA256SUMS")
    )
    assert all(name in load_file(back / file) for name, file in index["weight_map"].items())
    assert run("verify", "--checkpoint", tmp_path / "jax", "--against", back) == 0


@pytest.fixture
def few_objects():
    """Leaves all objects so far out of garbage collections, which long sessions make slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
def test_large_parameters(tmp_path, make_checkpoint, same_tensors, monkeypatch, few_objects):
    """Those beyond GROUP_BYTES are written and read alone, in parts, in bounded memory."""
    monkeypatch.setattr(run_format, "GROUP_BYTES", 2**15)
    make_checkpoint(tmp_path / "source", "qwen2", "mlp1")
    assert run("import", "--from", tmp_path / "source", "--to", tmp_path / "jax", "--verify") == 0
    folder = RunFolder(tmp_path / "jax")
    kinds = {
        path: type(array)
        for path, array in folder.read_all(["decoder.layers.mlp.up.kernel", "decoder.norm.weight"])
    }
    assert kinds == {
        "decoder.layers.mlp.up.kernel": SplitArray,
        "decoder.norm.weight": np.ndarray,
    }
    assert (
        run(
            "export",
            "--from",
            tmp_path / "jax",
            "--to",
            tmp_path / "back",
            "--layout",
            "internvl",
            "--dtype",
            "keep",
            "--verify",
        )
        == 0
    )
    same_tensors(tmp_path / "source", tmp_path / "back")
    assert run("verify", "--checkpoint", tmp_path / "jax", "--against", tmp_path / "jax") == 0


def test_casts_are_counted(tmp_path, golden, capsys):
    assert (
        run(
            "import",
            "--from",
            golden / "qwen2",
            "--to",
            tmp_path / "jax",
            "--dtype",
            "bfloat16",
            "--report",
            tmp_path / "report.json",
        )
        == 0
    )
    changed = json.loads((tmp_path / "report.json").read_text())["rounded"]
    assert (
        sum(changed.values()) > 100_000
        and f"changed {sum(changed.values()):,} values" in capsys.readouterr().out
    )
    assert run("import", "--from", golden / "qwen2", "--to", tmp_path / "wide") == 0
    assert (
        run(
            "export",
            "--from",
            tmp_path / "wide",
            "--to",
            tmp_path / "back",
            "--layout",
            "internvl-x",
            "--report",
            tmp_path / "report.json",
        )
        == 0
    )
    assert sum(json.loads((tmp_path / "report.json").read_text())["rounded"].values()) == sum(
        changed.values()
    )
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_side_files_and_checksums(tmp_path, make_checkpoint, capsys):
    source = tmp_path / "source"
    make_checkpoint(
        source,
        auto_map={"AutoModel": "modeling_x.InternVLChatModel", "AutoConfig": "configuration_x.C"},
    )
    for name in ("modeling_x.py", "tokenizer.model", "added_tokens.json", "generation_config.json"):
        (source / name).write_bytes(b"bytes of " + name.encode())
    assert run("import", "--from", source, "--to", tmp_path / "jax") == 0
    assert "configuration_x.py" in capsys.readouterr().out
    back = tmp_path / "back"
    assert (
        run(
            "export",
            "--from",
            tmp_path / "jax",
            "--to",
            back,
            "--layout",
            "internvl-x",
            "--dtype",
            "keep",
        )
        == 0
    )
    for name in ("modeling_x.py", "tokenizer.model", "added_tokens.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    assert read_sums(back / "SHA256SUMS") == {
        "model.safetensors": sha256(back / "model.safetensors")
    }
    assert SafetensorsFolder(back).check_sums() == 1
    assert (
        load_file(back / "model.safetensors").keys()
        == load_file(source / "model.safetensors").keys()
    )


def test_tower_and_projector_alone(tmp_path, golden):
    whole = load_file(golden / "internlm2" / "model.safetensors")
    for layout, prefix in (("vit", "vision_model."), ("projector", "")):
        assert (
            run(
                "export",
                "--from",
                golden / "internlm2",
                "--to",
                tmp_path / layout,
                "--layout",
                layout,
                "--dtype",
                "keep",
            )
            == 0
        )
        tensors = load_file(tmp_path / layout / "model.safetensors")
        assert {prefix + name for name in tensors} == {
            name for name in whole if name.startswith(prefix or "projector.")
        }
        assert all(np.array_equal(array, whole[prefix + name]) for name, array in tensors.items())
        assert run("inspect", tmp_path / layout) == 0


def test_lvtc(tmp_path, make_checkpoint, same_tensors):
    """Its parameters (a gate is a scalar) travel under lvtc.*, or are dropped on request."""
    lvtc = {"expand_layer": 1, "low_grid": 2, "high_grid": 4}
    tensors = make_checkpoint(tmp_path / "source", lvtc=lvtc)
    assert tensors["lvtc.high.gate"].shape == ()
    assert run("import", "--from", tmp_path / "source", "--to", tmp_path / "jax", "--verify") == 0
    export = (
        "export",
        "--from",
        tmp_path / "jax",
        "--layout",
        "internvl-x",
        "--dtype",
        "keep",
        "--verify",
    )
    assert run(*export, "--to", tmp_path / "back") == 0
    same_tensors(tmp_path / "source", tmp_path / "back")
    assert run(*export, "--to", tmp_path / "plain", "--drop-lvtc") == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == {name for name in tensors if not name.startswith("lvtc.")}
    assert "lvtc" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert run("inspect", tmp_path / "plain") == 0
