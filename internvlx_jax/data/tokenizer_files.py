"""The files that a tokenizer folder may hold, and which of them is opened (design: data.md 5)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import read_json_object, shown
from internvlx_jax.core.uploads import local_folder

# What `find_tokenizer` opens, the first of them that a folder has.
VOCABULARY_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")
MOST_IDS = 2**24  # larger ids are damage: every id needs a row of the embedding
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


def added_entries(config: Mapping[str, Any], path: Path) -> dict[int, Mapping[str, Any]]:
    """Returns the added tokens of a tokenizer_config.json by id, their form checked.

    Args:
        config: content of the file.
        path: the file, for messages.

    Raises:
        ConfigError: an entry is no object with a text, or its id is no number.
    """
    stored = config.get("added_tokens_decoder") or {}
    if not isinstance(stored, Mapping):
        raise ConfigError(f'{path}: "added_tokens_decoder" must be an object; fetch it again')
    entries: dict[int, Mapping[str, Any]] = {}
    for id, entry in stored.items():
        text = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(text, str) or not text or not (id.isascii() and id.isdigit()):
            raise ConfigError(
                f'{path}: "added_tokens_decoder" has {shown(id)}: {shown(entry)}; it maps ids to '
                'objects with "content". Fetch it again'
            )
        entries[check_id(path, text, int(id))] = entry
    return entries


def added_ids(path: Path) -> dict[str, int]:
    """Returns text -> id of an added_tokens.json; empty without the file.

    Raises:
        ConfigError: an id is no whole number.
    """
    return {text: check_id(path, text, id) for text, id in read_json_object(path).items()}


def check_id(path: Path, text: str, id: Any) -> int:
    """Returns the id of a token. Raises ConfigError for what is none."""
    if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < MOST_IDS or not text:
        raise ConfigError(f"{path}: the token {shown(text)} has id {shown(id)}; fetch it again")
    return id


def token_text(value: Any, path: Path, field: str) -> str | None:
    """Returns the text of a token that a config gives as a string, an object, or null.

    Args:
        value: what the config gives.
        path: the file, for messages.
        field: its name there.

    Raises:
        ConfigError: it is none of these.
    """
    text = value.get("content") if isinstance(value, Mapping) else value
    if text is not None and not isinstance(text, str):
        raise ConfigError(f'{path}: "{field}" is {shown(value)}, expected a text; fetch it again')
    return text
