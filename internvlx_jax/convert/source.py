"""A checkpoint folder of either kind, opened: ours or Hugging Face's."""

from __future__ import annotations

from pathlib import Path

from internvlx_jax.convert.hf_folder import HFFolder
from internvlx_jax.training.checkpoint import RunFolder


def open_checkpoint(path: str | Path) -> RunFolder | HFFolder:
    """Both have `config`, `tokenizer()` and `load(abstract, shardings)`. Raises FileNotFoundError."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give a Hugging Face checkpoint folder or a run folder of "
                                "train.py")
    return RunFolder(path) if RunFolder.is_one(path) else HFFolder(path)
