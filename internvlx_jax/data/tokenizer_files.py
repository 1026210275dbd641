"""The files that a tokenizer folder may hold, and which of them is opened (design: data.md 5)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvlx_jax.core.uploads import local_folder

# What `find_tokenizer` opens, the first of them that a folder has.
VOCABULARY_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
# The flags of an added token that stands for itself and nothing around it.
PLAIN_FLAGS: Mapping[str, bool] = {
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
    "normalized": False,
    "special": True,
}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the vocabulary of a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def find_tokenizer(path: str | os.PathLike) -> Path:
    """Returns the vocabulary file of a folder, or the file itself.

    A SentencePiece model comes first: `tokenizer.json` beside it is a translation.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = local_folder(path)
    if path.is_dir():
        names = [name for name in VOCABULARY_FILES if (path / name).is_file()]
        if names:
            return path / names[0]
        path = path / VOCABULARY_FILES[0]
    elif path.is_file():
        return path
    raise FileNotFoundError(
        f"{path} does not exist. Name a folder with tokenizer.model, tokenizer.json, or vocab.json "
        "and merges.txt; or one of these files."
    )


def token_text(value: Any) -> str | None:
    """Returns the text of a token that a config gives as a string, an object, or null."""
    return value.get("content") if isinstance(value, Mapping) else value
