"""Folders by path, or by Hugging Face id."""

from __future__ import annotations

import re
from pathlib import Path

from internvlx_jax.core.errors import ConfigError

FILES = ("*.json", "*.safetensors", "*.model", "*.py", "merges.txt", "*.jinja")


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """A folder that is there, or a local copy of the repository OWNER/NAME (huggingface_hub is asked for that only).

    Raises FileNotFoundError, or ConfigError saying why the repository cannot be had.
    """
    path = Path(name)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(
            f"{name}: no such folder; give a checkpoint folder or a Hugging Face id (OWNER/NAME)"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{name}: no such folder, and fetching it from the Hugging Face hub needs huggingface_hub. "
            "Install it (pip install 'internvlx-jax[hub]'), or give the path of a downloaded copy"
        ) from None
    try:
        folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=list(FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(str(name), revision=revision, allow_patterns=[*FILES, "*.bin"])
            )
        return folder
    except (
        Exception
    ) as error:  # no connection, no such repository, no access: the hub's own words say which
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{name}: no such folder, and the Hugging Face hub did not give it ({reason}). Without a "
            "connection, download it elsewhere and give the path of the copy"
        ) from error
