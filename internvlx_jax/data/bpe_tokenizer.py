"""Byte-level BPE tokenizers: Qwen2, Qwen2.5, Qwen3, Llama 3 (design: data.md 5)."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import written_aside
from internvlx_jax.core.paths import as_path
from internvlx_jax.data.bpe_files import BpeFiles, read_bpe_files
from internvlx_jax.data.tokenizer import GROUNDING, Tokenizer
from internvlx_jax.data.tokenizer_files import TOKENIZER_FILES


class BpeTokenizer(Tokenizer):
    """Vocabulary and merges with added tokens, from tokenizer.json or the older files."""

    def __init__(self, files: BpeFiles):
        tokens = files.tokens.values()
        super().__init__(
            files.path,
            {token.text: token.id for token in tokens},
            add_bos=bool(files.config.get("add_bos_token")),
            # Tokens that are not special, such as <think>, are text that a model writes.
            free=GROUNDING | {token.text for token in tokens if not token.special},
            swallowing=[token.text for token in tokens if token.swallows],
        )
        self._model = files.open_model()
        self._control = frozenset(token.id for token in tokens if token.special)
        self.vocab_size = files.size
        bos = files.names["bos"]
        if self.add_bos and bos is None:
            raise ConfigError(
                f"{self.path.parent / 'tokenizer_config.json'}: add_bos_token is true, but "
                "bos_token is not set. Correct one."
            )
        self.bos_id = None if bos is None else self._named(bos, "bos_token")
        self.eos_id = self._named(files.names["eos"], "eos_token")
        self.pad_id = self._named(files.names["pad"] or files.names["eos"], "pad_token")

    @classmethod
    def open(cls, path: Path) -> BpeTokenizer:
        """Opens tokenizer.json, or vocab.json and merges.txt; see `Tokenizer.load`."""
        return cls(read_bpe_files(path))

    @functools.cached_property
    def _model(self) -> tokenizers.Tokenizer:
        return read_bpe_files(self.path).open_model()  # only in an unpickled copy

    def _named(self, text: str | None, field: str) -> int:
        """Returns the id of a token that tokenizer_config.json names."""
        id = None if text is None else self.added.get(text, self._model.token_to_id(text))
        if id is None:
            raise ConfigError(
                f"{self.path.parent / 'tokenizer_config.json'}: {field} is {text!r}, which is no "
                f"token of {self.path.name}. Set it to the token that ends a text, such as "
                '"<|im_end|>".'
            )
        return id

    def encode_plain(self, head: str, text: str) -> tuple[list[int], int]:
        """Encodes head + text; as many ids are not supervised as `head` has on its own."""
        if not head and not text:
            return [], 0
        ids = self._ids(head + text)
        if not text:
            return ids, len(ids)
        return ids, min(len(self._ids(head)), len(ids)) if head else 0

    def _ids(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of ids; see `Tokenizer.decode`.

        Added tokens that are not special, such as <think>, are always written out.
        """
        text, run = "", []
        for id in map(int, ids):
            if not 0 <= id < self.vocab_size:
                raise IndexError(f"id {id} is outside of the vocabulary of {self.vocab_size} ids")
            if id not in self._texts:
                run.append(id)
            elif not (skip_special and id in self._control):
                text += self._model.decode(run, skip_special_tokens=False) + self._texts[id]
                run = []
        return text + self._model.decode(run, skip_special_tokens=False)

    def piece(self, id: int) -> str:
        """Returns an id as the vocabulary writes it; see `Tokenizer.piece`."""
        text = self._texts.get(id) or self._model.id_to_token(id)
        if text is None:
            raise IndexError(f"id {id} is outside of the vocabulary of {self.path}")
        return text

    def fingerprint(self) -> str:
        """Returns the sha256 of what decides the ids; both forms of the files give the same."""
        files = read_bpe_files(self.path)
        model = files.fast["model"]
        merges = [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]
        steps = [files.fast.get("normalizer"), files.fast.get("pre_tokenizer")]
        rules = [model.get("unk_token"), bool(model.get("ignore_merges"))]
        added = [sorted(self.added.items()), sorted(self._control), sorted(self.swallowing)]
        content = [sorted(model["vocab"].items()), merges, steps, rules, added, self.add_bos]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Copies the tokenizer's own files to a folder, unchanged."""
        folder = as_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            file = self.path.parent / name
            if file.is_file():
                with written_aside(folder / name) as aside:
                    aside.write_bytes(file.read_bytes())
