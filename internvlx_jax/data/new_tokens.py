"""Appends tokens to the files of a tokenizer of any kind (design: data.md 5, checkpoints.md 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.core.json_text import read_json_object
from internvlx_jax.data.bpe_build import AddedToken
from internvlx_jax.data.bpe_files import read_bpe_files
from internvlx_jax.data.sentencepiece_files import open_model
from internvlx_jax.data.tokenizer_files import find_tokenizer, has_tokenizer

# What InternVL adds to the vocabulary of a language model, in the order of their ids.
IMAGE_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)


class NewTokens:
    """The wanted tokens of a tokenizer folder: those it has, and the ids that the others get.

    Attributes:
        folder: the tokenizer folder.
        old_size: number of ids without the new tokens.
        new: token -> id, of the tokens that are appended.
        new_ids: their ids.
        size: number of ids with them.
    """

    def __init__(self, folder: Path, wanted: Sequence[str]):
        """Reads the files of a folder; nothing is written.

        Args:
            folder: the tokenizer folder.
            wanted: tokens that are appended where the tokenizer lacks them, in this order.

        Raises:
            ConfigError: the folder has no tokenizer, or its files are damaged or contradict each
                other.
        """
        self.folder = folder
        if not has_tokenizer(folder):
            raise ConfigError(
                f"{folder}: no tokenizer.model, tokenizer.json or vocab.json; the ids of the image "
                "tokens follow from one of them"
            )
        self._config = read_json_object(folder / "tokenizer_config.json")
        self._fast = read_json_object(folder / "tokenizer.json")
        path = find_tokenizer(folder)
        if path.suffix == ".json":
            files = read_bpe_files(path)
            files.open_model()  # fails where merges and vocabulary contradict each other
            self._fast = dict(files.fast)
            self._old = {text: token.entry() for text, token in files.tokens.items()}
            base = files.size
        else:
            self._old = self._entries_beside_model()
            base = open_model(path)[0].get_piece_size()
        self.old_size = max((base, *(entry["id"] + 1 for entry in self._old.values())))
        absent = [token for token in wanted if token not in self._old]
        self.new = {token: self.old_size + n for n, token in enumerate(absent)}
        self.new_ids = list(self.new.values())
        self.size = self.old_size + len(absent)

    def _entries_beside_model(self) -> dict[str, dict[str, Any]]:
        """Returns text -> entry of the added tokens that stand beside a tokenizer.model."""
        ids = {
            entry["content"]: int(id)
            for id, entry in self._config.get("added_tokens_decoder", {}).items()
        }
        ids |= {entry["content"]: entry["id"] for entry in self._fast.get("added_tokens", ())}
        ids |= read_json_object(self.folder / "added_tokens.json")
        return {text: AddedToken(text, id).entry() for text, id in ids.items()}

    def write(self, folder: Path) -> None:
        """Adds the new tokens to the tokenizer files that were copied to `folder`.

        tokenizer.json and the older files then list the same tokens.
        """
        if not self.new:
            return
        entries = [AddedToken(token, id).entry() for token, id in self.new.items()]
        write_json(
            folder / "added_tokens.json", read_json_object(folder / "added_tokens.json") | self.new
        )
        write_json(folder / "tokenizer_config.json", self._with_entries(entries))
        if self._fast:
            listed = list(self._fast.get("added_tokens") or ())
            known = {entry["content"] for entry in listed}
            listed += [entry for text, entry in self._old.items() if text not in known]
            write_json(
                folder / "tokenizer.json", {**self._fast, "added_tokens": [*listed, *entries]}
            )
        if special_map := read_json_object(folder / "special_tokens_map.json"):
            write_json(folder / "special_tokens_map.json", self._with_names(special_map))

    def _with_entries(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns tokenizer_config.json with all added tokens."""
        decoder = dict(self._config.get("added_tokens_decoder", {}))
        for entry in (*self._old.values(), *entries):
            flags = {name: value for name, value in entry.items() if name != "id"}
            decoder.setdefault(str(entry["id"]), flags)
        return self._with_names({**self._config, "added_tokens_decoder": decoder})

    def _with_names(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a config whose list of special tokens has the new ones."""
        listed = [*(config.get("additional_special_tokens") or ()), *self.new]
        return {**config, "additional_special_tokens": listed}
