"""Hugging Face ids with the real huggingface_hub, its cache, and no connection."""

import shutil

import pytest

from internvlx_jax import load, load_pretrained
from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.cli import main
from internvlx_jax.core.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(golden, tmp_path, monkeypatch):
    """A cache that holds owner/name at one commit, its branch main and its tag v1; offline."""
    from huggingface_hub import constants

    folder = tmp_path / "cache"
    repository = folder / "models--owner--name"
    shutil.copytree(golden / "internlm2", repository / "snapshots" / COMMIT)
    for reference in ("main", "v1"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def test_what_was_downloaded_is_taken_without_a_connection(cache, tmp_path, capsys):
    """By branch, tag or commit, in the id or beside it."""
    snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
    for name in ("owner/name", "owner/name@v1", f"owner/name@{COMMIT}"):
        assert open_checkpoint(name).path == snapshot
    assert load_pretrained("owner/name@v1", dtype="float32").config.decoder.layers == 3
    flags = ["--from", "owner/name", "--revision", "v1", "--to", str(tmp_path / "jax")]
    assert main(["convert", "import", *flags]) == 0
    assert "SHA-256" not in capsys.readouterr().err
    assert main(["convert", "verify", "--checkpoint", "jax", "--against", "owner/name@v1"]) == 0
    assert main(["convert", "inspect", "owner/name"]) == 0


COMMANDS = {
    "chat": ["chat", "--checkpoint", "{}"],
    "eval": ["eval", "--checkpoint", "{}", "--tasks", "mme", "--data_root", ".", "--out_dir", "o"],
    "import": ["convert", "import", "--from", "{}", "--to", "o"],
    "parts": ["convert", "import", "--vit", "{}", "--llm", "{}", "--to", "o"],
    "export": ["convert", "export", "--from", "{}", "--to", "o", "--layout", "internvl-x"],
    "inspect": ["convert", "inspect", "{}"],
    "verify": ["convert", "verify", "--checkpoint", "{}", "--against", "{}"],
    "train": ["train", "--config", "{config}", "--set", "init_from={}", "output_dir=o"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["owner/absent", "owner/name@v2"])
def test_every_command_says_what_is_missing(command, name, cache, tmp_path, capsys):
    """One message with the id, the reason and the remedy; nothing is written."""
    config = tmp_path / "config.py"
    config.write_text(
        "from internvlx_jax.core.data_config import DataConfig\n"
        "from internvlx_jax.core.run_config import TrainConfig\n"
        "def get_config():\n"
        "    return TrainConfig(output_dir='o', init_from='x', data=DataConfig(meta='m.json'))\n"
    )
    words = [word.format(name, config=config) for word in COMMANDS[command]]
    before = {file.name for file in tmp_path.iterdir()}
    assert main(words) == (2 if command == "verify" else 1)  # 1 is a difference there
    error = capsys.readouterr().err
    assert f"{name}: no such folder, and the Hugging Face hub did not deliver it" in error
    assert "offline, give the path of a downloaded copy" in error and "Traceback" not in error
    assert {file.name for file in tmp_path.iterdir()} == before


def test_a_revision_of_python_calls(cache):
    with pytest.raises(ConfigError, match="owner/name: no such folder, and the Hugging Face hub"):
        load("owner/name", revision="v2")
