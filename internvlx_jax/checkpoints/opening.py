"""A checkpoint folder of either kind, opened: ours or Hugging Face's."""

from __future__ import annotations

from pathlib import Path

from internvlx_jax.checkpoints.hf_folder import HFFolder
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.core.errors import ConfigError


def open_checkpoint(path: str | Path, *, ema: bool = False) -> RunFolder | HFFolder:
    """Both have `config`, `tokenizer()` and `load(abstract, shardings)`. Raises FileNotFoundError.

    ema: load a run's average of its parameters. Raises ConfigError where there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder; give a Hugging Face checkpoint folder or a run folder of "
            "train.py"
        )
    if RunFolder.is_one(path):
        return RunFolder(path, ema=ema)
    if ema:
        raise ConfigError(
            f"{path} is no run folder of train.py, so it holds no average of parameters (ema)"
        )
    return HFFolder(path)
