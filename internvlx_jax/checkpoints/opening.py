"""Opening a checkpoint of any kind by its path or its Hugging Face id."""

from __future__ import annotations

import re
from pathlib import Path

from internvlx_jax.checkpoints.checkpoint import Checkpoint
from internvlx_jax.checkpoints.hf_folder import HFFolder, has_safetensors, has_weights, read_config
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.uploads import local_folder

# What is fetched of a repository.
FILES = ("*.json", "*.safetensors", "*.model", "*.py", "merges.txt", "*.jinja")
LISTED = 8  # entries of a folder that an error message names


def open_checkpoint(path: str | Path, *, ema: bool = False) -> Checkpoint:
    """Opens a run folder or a Hugging Face folder; no parameter is read yet.

    Args:
        path: a run folder of train.py, one step of it (RUN/checkpoints/STEP), a Hugging Face
            folder, a gs:// or s3:// URL of either, or a Hugging Face id (OWNER/NAME).
        ema: read a run's average of its parameters in their place.

    Raises:
        FileNotFoundError: no such folder, or one of another kind; the message lists what was
            looked for and what was found.
        ConfigError: the id cannot be fetched, config.json asks for something that is not computed
            here, or the run kept no average.
        CheckpointError: the weight files are damaged or contradict each other.
    """
    folder = resolve(path)
    if RunFolder.is_one(folder):
        return RunFolder(folder, ema=ema)
    if not _is_hf_folder(folder):
        raise FileNotFoundError(_not_a_checkpoint(folder))
    if ema:
        raise ConfigError(
            f"{folder} is no run folder of train.py, so it holds no average of parameters (ema)"
        )
    return HFFolder(folder)


def resolve(name: str | Path, revision: str | None = None, *, by_range: bool = False) -> Path:
    """Returns an existing folder, or a local copy of the repository OWNER/NAME.

    A run folder behind a URL is read where it is; any other is copied, unless `by_range`.

    huggingface_hub is imported only for a repository; files that it has downloaded before are
    taken from its cache.

    Args:
        name: path, or Hugging Face id, which may carry its revision: OWNER/NAME@REVISION.
        revision: branch, tag or commit of the repository; None is its main branch.
        by_range: return a folder of safetensors files behind a URL as it is; its tensors are then
            read one by one, each as often as it is asked for.

    Raises:
        FileNotFoundError: no such path, and `name` is no id.
        ConfigError: the repository cannot be fetched; the message says why.
    """
    path = as_path(name)
    if path.exists():
        # Weight files are mapped into memory, so those of an object store are copied to the disk.
        if RunFolder.is_one(path) or (by_range and has_safetensors(path, "model")):
            return path
        return local_folder(path)
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(name))
    if found is None:
        raise FileNotFoundError(
            f"{name}: no such folder; give a checkpoint folder or a Hugging Face id (OWNER/NAME)"
        )
    owned, revision = found.group(1), revision or found.group(2)
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"{name}: no such folder, and fetching it as a Hugging Face id needs huggingface_hub. "
            "Install it (pip install 'internvlx-jax[hub]'), or give the path of a downloaded copy"
        ) from None
    try:
        folder = Path(snapshot_download(owned, revision=revision, allow_patterns=list(FILES)))
        if not any(folder.glob("*.safetensors")):  # older repositories have pickle files only
            patterns = [*FILES, "*.bin"]
            folder = Path(snapshot_download(owned, revision=revision, allow_patterns=patterns))
        return folder
    except Exception as error:  # no connection, repository or access: huggingface_hub says which
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{name}: no such folder, and the Hugging Face hub did not deliver it ({reason}). "
            "Check the name and the connection; offline, give the path of a downloaded copy"
        ) from error


def _is_hf_folder(folder: Path) -> bool:
    """Whether a folder is one of Hugging Face's, be it with weights missing."""
    if not (folder / "config.json").is_file():
        return False
    return has_weights(folder) or "model_type" in read_config(folder)


def _not_a_checkpoint(folder: Path) -> str:
    """Says what a checkpoint would hold and what the folder holds instead."""
    if not folder.is_dir():
        return f"{folder} is a file; give the checkpoint folder that it belongs to"
    found = sorted(each.name + "/" * each.is_dir() for each in folder.iterdir())
    listed = ", ".join(found[:LISTED]) or "nothing"
    if len(found) > LISTED:
        listed += f" and {len(found) - LISTED} more"
    return (
        f"{folder} is no checkpoint folder. A Hugging Face folder holds config.json and "
        "model*.safetensors (or pytorch_model*.bin); a run folder of train.py holds config.json "
        f"and checkpoints/STEP. Found: {listed}. Give one of these, or a Hugging Face id "
        "(OWNER/NAME)"
    )
