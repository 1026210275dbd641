"""Hugging Face folders behind gs://: read tensor by tensor, written shard by shard
(design: checkpoints.md 6, platform.md 8).
"""

import functools
import json
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from internvlx_jax.checkpoints import safetensors_folder
from internvlx_jax.checkpoints.hf_folder import HFFolder
from internvlx_jax.checkpoints.opening import resolve
from internvlx_jax.checkpoints.safetensors_folder import SafetensorsFolder
from internvlx_jax.checkpoints.safetensors_writer import SafetensorsWriter
from internvlx_jax.cli import convert
from internvlx_jax.convert import export_hf
from internvlx_jax.convert.export_hf import export_checkpoint
from internvlx_jax.core import byte_ranges, uploads
from internvlx_jax.core.errors import CheckpointError
from internvlx_jax.core.paths import RemotePath, as_path
from internvlx_jax.core.uploads import upload_folder

MB = 2**20


@pytest.fixture
def checkpoint(make_checkpoint, tmp_path):
    """A checkpoint of several shards, the same one on the disk and in the bucket."""
    make_checkpoint(tmp_path / "hf")
    source = HFFolder(tmp_path / "hf")
    nbytes = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    return source, nbytes


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The bytes of the shards in the folder of temporary files whenever something is sent."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("INTERNVLX_CACHE", str(tmp_path / "cache"))
    sizes, upload = [], RemotePath.upload

    def sent(self, local):
        sizes.append(sum(path.stat().st_size for path in local.parent.glob("*.safetensors")))
        upload(self, local)

    monkeypatch.setattr(RemotePath, "upload", sent)
    return sizes


def tensors(folder) -> dict[str, bytes]:
    opened = SafetensorsFolder(folder)
    return {name: opened.read(name).tobytes() for name in sorted(opened.names())}


@pytest.mark.slow
def test_an_export_is_sent_shard_by_shard(checkpoint, folder, scratch, tmp_path, monkeypatch):
    source, nbytes = checkpoint
    shard = nbytes // 12
    small = functools.partial(SafetensorsWriter, max_bytes=shard)
    monkeypatch.setattr(export_hf, "SafetensorsWriter", small)
    options = dict(layout="internvl-x", dtype="keep", verify=True)
    local = export_checkpoint(source, tmp_path / "local", **options)
    remote = as_path(f"{folder}/hf")
    sent = export_checkpoint(source, remote, **options)
    assert len(sent.files) > 6 and sent.verified == local.verified
    assert tensors(remote) == tensors(tmp_path / "local")
    largest = max(
        int(np.prod(shape)) * 4 for shape in map(source.tensors.shape, source.tensors.names())
    )
    assert max(scratch) <= 2 * max(shard, largest) + 10_000 * len(sent.files) < nbytes
    names = {path.name for path in remote.iterdir()}
    assert names >= {"config.json", "SHA256SUMS", "model.safetensors.index.json", *sent.files}
    assert SafetensorsFolder(remote).check_sums() == len(sent.files)
    # Nothing is left of an export that fails.
    calls = []
    real = uploads.RemotePath.upload

    def broken(self, path):
        calls.append(path)
        if len(calls) > 2:
            raise OSError("no more")
        real(self, path)

    monkeypatch.setattr(RemotePath, "upload", broken)
    with pytest.raises(OSError, match="no more"):
        export_checkpoint(source, as_path(f"{folder}/broken"), **options)
    assert len(calls) == 3 and not as_path(f"{folder}/broken").exists()


@pytest.fixture
def sharded(folder, tmp_path):
    """Twelve tensors of 1 MiB in shards of four, in the bucket -> (folder, tensors)."""
    values = {
        f"t{n:02}": np.random.default_rng(n).integers(0, 9, 2**18).astype(np.float32)
        for n in range(12)
    }
    home, weight_map = tmp_path / "shards", {}
    home.mkdir()
    for number in range(3):
        name = f"model-{number + 1:05}-of-00003.safetensors"
        part = dict(list(values.items())[4 * number : 4 * number + 4])
        save_file(part, home / name)
        weight_map |= dict.fromkeys(part, name)
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    remote = as_path(f"{folder}/shards")
    upload_folder(home, remote)
    return remote, values


def test_tensors_are_read_by_range_one_at_a_time(sharded, monkeypatch):
    remote, values = sharded
    monkeypatch.setattr(byte_ranges, "PART", 300_000)  # several requests per tensor
    tracemalloc.start()
    opened = SafetensorsFolder(remote)
    for name, expected in values.items():
        found = opened.read(name)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)
        del found
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Two tensors and the parts on their way, or the first megabyte of a file, which has its header.
    assert peak < 5 * MB, "a shard has 4 MiB, the folder 12"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "its tensors end at byte"),
        (lambda data: data + b"\0", "its tensors end at byte"),
        (lambda data: data[:5], "too short for a header"),
        (lambda data: b"\xff" * 8 + data[8:], "its header has"),
        (lambda data: data.replace(b'"F32"', b'"F16"', 1), "do not follow from its shapes"),
        (lambda data: data.replace(b'"shape"', b'"shale"', 1), "not the header"),
        (lambda data: data.replace(b'{"', b"{!", 1), "not a readable safetensors file"),
        (None, "missing; copy the shard into the folder"),
    ],
)
def test_a_damaged_remote_shard_is_named(sharded, change, words):
    remote, _ = sharded
    shard = remote / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.unlink() if change is None else shard.write_bytes(change(data))
    with pytest.raises(CheckpointError, match=f"model-00002-of-00003.safetensors: .*{words}"):
        SafetensorsFolder(remote)


@pytest.mark.slow
def test_an_import_reads_the_weights_where_they_are(
    checkpoint, folder, scratch, tmp_path, monkeypatch
):
    source, _ = checkpoint
    remote = as_path(f"{folder}/hf")
    upload_folder(source.path, remote)
    monkeypatch.setattr(safetensors_folder, "_FIRST_READ", 100)  # the header is longer
    assert resolve(str(remote), by_range=True) == remote
    command = ["import", "--verify", "--from"]
    assert convert.main([*command, str(remote), "--to", str(tmp_path / "one")]) == 0
    assert convert.main([*command, str(source.path), "--to", str(tmp_path / "other")]) == 0
    copied = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "config.json" in copied and "model.safetensors" not in copied
    one = HFFolder(remote)
    for path, values in source.read_all(source.entries):
        np.testing.assert_array_equal(one.read(path), values)
