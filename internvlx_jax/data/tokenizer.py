"""SentencePiece tokenizers plus added tokens: InternLM2, Llama, Phi-3 (design: data.md 5)."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal

import sentencepiece

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.data.tokenizer_files import (
    find_model,
    open_model,
    read_added_tokens,
    write_tokenizer_files,
)

SpecialText = Literal["allow", "reject", "escape"]
# Where a model of the Llama family puts a space before a text.
Prefix = Literal["none", "every", "first"]

# Added tokens that users may write: references and boxes of grounding data.
_GROUNDING = frozenset({"<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"})
# InternLM2's spare pieces. Its chat tokens are such pieces renamed, so this literal text is a
# control id.
_UNUSED_PIECE = r"\[UNUSED_TOKEN_\d+\]"


class Tokenizer:
    """Turns text into ids and back.

    A pickled copy in a worker carries the path and the ids, and opens the model on first use.

    Attributes:
        path: the tokenizer.model file.
        added: text -> id of the tokens that are matched before SentencePiece sees the text.
        add_bos: whether the tokenizer's own configuration puts bos first (templates may overrule
            it).
        prefix: before which stretches of plain text a space is put: none (InternLM2), every one
            (Llama), or only the first, on its own if the text begins with an added token (Phi-3).
        swallowing: ids of the added tokens that take the white space to their right with them (chat
            tokens of Phi-3).
        start_ids: ids in front of a text that begins with an added token.
        vocab_size: number of ids, which is the number of embedding rows.
        bos_id, eos_id, pad_id: ids of the control tokens; padding uses eos.
        img_start, img_end, image_token_id: ids around image tokens, and of each of them.
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
        self.path, self._model, self.added, self.add_bos = path, model, dict(added), add_bos
        self.prefix, self.swallowing = prefix, frozenset(self.added[text] for text in swallowing)
        self.start_ids = model.encode(" ") if prefix == "first" else []
        self._pieces = model.get_piece_size()
        self.vocab_size = max(self._pieces, *(id + 1 for id in self.added.values()))
        self._texts = {id: text for text, id in self.added.items()}
        # The longest match wins.
        literals = map(re.escape, sorted(self.added, key=len, reverse=True))
        self._added_pattern = re.compile("|".join(literals))
        self._user_pattern = re.compile(f"{self._added_pattern.pattern}|{_UNUSED_PIECE}")
        self.bos_id, self.eos_id = self.token_id("<s>"), self.token_id("</s>")
        self.pad_id = self.eos_id
        self.img_start, self.img_end = self.token_id("<img>"), self.token_id("</img>")
        self.image_token_id = self.token_id("<IMG_CONTEXT>")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Loads a tokenizer; its added tokens are read from the files beside tokenizer.model.

        Args:
            path: folder with tokenizer.model, or that file itself.

        Raises:
            FileNotFoundError: a file is missing.
            ConfigError: a file is damaged or not supported.
        """
        path = find_model(path)
        model, has_prefix = open_model(path)
        added = read_added_tokens(path.parent, pieces=model.get_piece_size())
        prefix = "none" if not has_prefix else "every" if added.legacy else "first"
        return cls(path, model, added.ids, added.add_bos, prefix, added.swallowing)

    @functools.cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        return open_model(self.path)[0]  # only in an unpickled copy, which comes without it

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_model"}

    def token_id(self, text: str) -> int:
        """Returns the id of an added token.

        Raises:
            ConfigError: the tokenizer does not have it.
        """
        if text not in self.added:
            raise ConfigError(
                f'{self.path.parent}: the tokenizer has no added token "{text}". Add it to '
                "added_tokens.json (and a row to the embedding), or use the template this "
                "tokenizer was trained with."
            )
        return self.added[text]

    def split(self, text: str, special: SpecialText = "allow") -> list[int | str]:
        """Cuts text at added tokens.

        Reserved text is every added token but the grounding ones, and "[UNUSED_TOKEN_<n>]".

        Args:
            text: what to cut.
            special: what happens to reserved text. "allow" takes it as the token, which trusted
                text needs; "reject" raises; "escape" gives its first character and its rest as
                separate stretches, which have no reserved id.

        Returns:
            Ids, and plain stretches that are one SentencePiece call each.

        Raises:
            SampleError: "reserved_text" with the policy "reject".
            ValueError: the policy is unknown.
        """
        if special not in ("allow", "reject", "escape"):
            raise ValueError(
                f'special text policy "{special}" is unknown. Use allow, reject or escape.'
            )
        atoms, start = [], 0
        pattern = self._added_pattern if special == "allow" else self._user_pattern
        for match in pattern.finditer(text):
            literal = match.group()
            before = text[start : match.start()]
            start = match.end()
            if special == "allow" or literal in _GROUNDING:
                atoms += [before, self.added[literal]] if before else [self.added[literal]]
            elif special == "escape":
                atoms += [before, literal[0], literal[1:]]
            else:
                raise SampleError(
                    "reserved_text",
                    f'the text holds "{literal}", which would become a control token.',
                    'Remove it, or set special_text="escape" to keep it as ordinary text.',
                )
        return [*atoms, text[start:]] if text[start:] else atoms

    def encode_plain(self, head: str, text: str) -> tuple[list[int], int]:
        """Encodes head + text in ONE call; also returns how many ids hold any byte of `head`."""
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

    def encode(self, text: str, special: SpecialText = "allow") -> list[int]:
        """Returns the ids of text, without bos and eos; `special` is that of `split`."""
        ids, before = [], None
        for i, atom in enumerate(self.split(text, special)):
            if isinstance(atom, int):
                ids += [atom] if i else [*self.start_ids, atom]
            elif before in self.swallowing:
                ids += self.encode_plain("", atom.lstrip())[0]
            else:
                ids += self.encode_plain("", atom if i or self.prefix != "first" else " " + atom)[0]
            before = atom
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of ids.

        Args:
            ids: what to decode.
            skip_special: whether added tokens are dropped instead of written out.

        Raises:
            IndexError: an id is outside the vocabulary.
        """
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
        """Returns an id as the vocabulary writes it, also where it is no text, such as a byte."""
        return self._texts.get(id) or self._model.id_to_piece(id)

    def fingerprint(self) -> str:
        """Returns the sha256 of what decides the ids: model file, added tokens, bos rule."""
        rest = json.dumps(
            [sorted(self.added.items()), self.add_bos, self.prefix, sorted(self.swallowing)]
        )
        return hashlib.sha256(self.path.read_bytes() + rest.encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files that `load` needs to a folder."""
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
