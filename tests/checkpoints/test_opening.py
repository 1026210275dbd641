"""What `open_checkpoint` takes, and what it says about everything else."""

import shutil
import sys
import types

import pytest

from internvlx_jax.checkpoints.hf_folder import HFFolder
from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.core.errors import ConfigError


def test_every_kind_is_opened(golden, tmp_path):
    run = golden / "run_folder_0_1" / "run"
    assert isinstance(open_checkpoint(run), RunFolder)
    assert open_checkpoint(run / "checkpoints" / "4").path == run.resolve() / "checkpoints" / "4"
    assert isinstance(open_checkpoint(golden / "internlm2"), HFFolder)
    # A Hugging Face folder may be kept in a folder that is named as that of a run's steps.
    shutil.copytree(golden / "internlm2", tmp_path / "checkpoints" / "internlm2")
    assert isinstance(open_checkpoint(tmp_path / "checkpoints" / "internlm2"), HFFolder)


def test_a_folder_of_another_kind_is_described(tmp_path):
    for name in ("config.json", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        open_checkpoint(tmp_path)
    message = str(error.value)
    for words in (
        "model*.safetensors (or pytorch_model*.bin)",
        "checkpoints/STEP",
        "Found: config.json, images/, metrics.jsonl, notes.txt",
    ):
        assert words in message
    for n in range(9):
        (tmp_path / f"a{n}").touch()
    with pytest.raises(FileNotFoundError, match="a7 and 5 more"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="notes.txt is a file; give the checkpoint folder"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_run_before_its_first_save_says_so(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint.*save_every"):
        open_checkpoint(tmp_path / "run")


def test_an_id_is_fetched(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = types.ModuleType("huggingface_hub")
    folders = {"owner/name": str(golden / "internlm2")}
    hub.snapshot_download = lambda name, revision=None, allow_patterns=(): folders[name]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert open_checkpoint("owner/name").path == golden / "internlm2"
    with pytest.raises(ConfigError, match="holds no average of parameters"):
        open_checkpoint("owner/name", ema=True)
    with pytest.raises(ConfigError, match="owner/other: .*did not deliver it.*a downloaded copy"):
        open_checkpoint("owner/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'internvlx-jax\[hub\]'"):
        open_checkpoint("owner/name")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        open_checkpoint("nowhere")
