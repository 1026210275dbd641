"""Opening a checkpoint of any kind by its path or its Hugging Face id."""

from __future__ import annotations

from pathlib import Path

from internvlx_jax.checkpoints.checkpoint import Checkpoint
from internvlx_jax.checkpoints.hf_folder import HFFolder, has_weights, read_config
from internvlx_jax.checkpoints.hub import resolve
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.core.errors import ConfigError

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
