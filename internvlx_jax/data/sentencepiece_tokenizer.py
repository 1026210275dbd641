"""SentencePiece tokenizers plus added tokens: InternLM2, Llama, Phi-3 (design: data.md 5)."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal

import sentencepiece

from internvlx_jax.data.sentencepiece_files import (
    open_model,
    read_added_tokens,
    write_tokenizer_files,
)
from internvlx_jax.data.tokenizer import Tokenizer

# Where a model of the Llama family puts a space before a text.
Prefix = Literal["none", "every", "first"]

# InternLM2's spare pieces. Its chat tokens are such pieces renamed, so this literal text is a
# control id.
_UNUSED_PIECE = r"\[UNUSED_TOKEN_\d+\]"


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model with the added tokens of the files beside it.

    Attributes:
        prefix: before which stretches of plain text a space is put: none (InternLM2), every one
            (Llama), or only the first, on its own if the text begins with an added token (Phi-3).
    """

    def __init__(
        self,
        path: Path,
        model: sentencepiece.SentencePieceProcessor,
        added: Mapping[str, int],
        add_bos: bool,
        prefix: Prefix = "none",
        swallowing: Collection[str] = (),
    ):
        super().__init__(
            path, added, add_bos=add_bos, swallowing=swallowing, reserved_pattern=_UNUSED_PIECE
        )
        self._model, self.prefix = model, prefix
        self.start_text = " " if prefix == "first" else ""
        self.start_ids = model.encode(" ") if prefix == "first" else []
        self._pieces = model.get_piece_size()
        self.vocab_size = max(self._pieces, *(id + 1 for id in self.added.values()))
        self.bos_id, self.eos_id = self.token_id("<s>"), self.token_id("</s>")
        self.pad_id = self.eos_id

    @classmethod
    def open(cls, path: Path) -> SentencePieceTokenizer:
        """Opens a tokenizer.model and the files beside it; see `Tokenizer.load`."""
        model, has_prefix = open_model(path)
        added = read_added_tokens(path.parent, pieces=model.get_piece_size())
        prefix = "none" if not has_prefix else "every" if added.legacy else "first"
        return cls(path, model, added.ids, added.add_bos, prefix, added.swallowing)

    @functools.cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        return open_model(self.path)[0]  # only in an unpickled copy, which comes without it

    def encode_plain(self, head: str, text: str) -> tuple[list[int], int]:
        """Encodes head + text; ids that hold any byte of `head` are not supervised."""
        if not head and not text:
            return [], 0
        space = " " if self.prefix == "every" else ""
        ids = self._model.encode(space + head + text)
        if not text:
            return ids, len(ids)
        head_ids, missing = 0, len((space + head).encode()) if head else 0
        while missing > 0 and head_ids < len(ids):
            missing -= self._byte_length(ids[head_ids])
            head_ids += 1
        return ids, head_ids

    def _byte_length(self, id: int) -> int:
        if self._model.is_byte(id):
            return 1
        return len(self._model.id_to_piece(id).replace("▁", " ").encode())

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of ids; see `Tokenizer.decode`. Every added token is a control token."""
        text, run, prefix = "", [], ""
        for id in map(int, ids):
            if id not in self._texts:
                run.append(id)
            elif not skip_special:
                text += self._model.decode(run).removeprefix(prefix) + self._texts[id]
                # What follows an added token was encoded with a space in front, which is not part
                # of the text.
                run, prefix = [], " " if self.prefix == "every" else ""
        return text + self._model.decode(run).removeprefix(prefix)

    def piece(self, id: int) -> str:
        """Returns an id as the vocabulary writes it; see `Tokenizer.piece`."""
        return self._texts.get(id) or self._model.id_to_piece(id)

    def fingerprint(self) -> str:
        """Returns the sha256 of what decides the ids: model file, added tokens, bos rule."""
        rest = json.dumps(
            [sorted(self.added.items()), self.add_bos, self.prefix, sorted(self.swallowing)]
        )
        return hashlib.sha256(self.path.read_bytes() + rest.encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.model, added_tokens.json and tokenizer_config.json to a folder."""
        model = self.path.read_bytes()
        write_tokenizer_files(
            folder,
            model,
            self.added,
            add_bos=self.add_bos,
            legacy=self.prefix != "first",
            swallowing=[self._texts[id] for id in self.swallowing],
            pieces=self._pieces,
        )
