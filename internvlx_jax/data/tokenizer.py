"""What every tokenizer of a model does, whatever files it comes from (design: data.md 5)."""

from __future__ import annotations

import abc
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.data.tokenizer_files import find_tokenizer, has_tokenizer

SpecialText = Literal["allow", "reject", "escape"]

# Added tokens that users may write: references and boxes of grounding data.
GROUNDING = frozenset({"<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"})


class Tokenizer(abc.ABC):
    """Turns text into ids and back.

    Added tokens are matched first, the longest at each place; what stands between two of them is
    plain text. A pickled copy in a worker carries the path and the ids, and opens the vocabulary on
    first use.

    Attributes:
        path: the file that was opened, which messages name.
        added: text -> id of the tokens that are matched before the vocabulary sees the text.
        free: those of them that users may write.
        add_bos: whether the tokenizer's own configuration puts bos first (templates may overrule
            it).
        swallowing: ids of the added tokens that take the white space to their right with them.
        start_text: what is put in front of a text that begins with plain text.
        start_ids: ids in front of a text that begins with an added token.
        vocab_size: number of ids, which is the number of embedding rows that are needed.
        bos_id: id of bos; None where the vocabulary has none.
        eos_id, pad_id: ids of the end of a text, and of padding.
        img_start, img_end, image_token_id: ids around image tokens, and of each of them.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int

    def __init__(
        self,
        path: Path,
        added: Mapping[str, int],
        *,
        add_bos: bool,
        free: Collection[str] = GROUNDING,
        swallowing: Collection[str] = (),
        reserved_pattern: str | None = None,
    ):
        """Stores what the files say, and finds the image tokens.

        Args:
            path: the file that was opened.
            added: text -> id.
            add_bos: whether bos is added.
            free: added tokens that users may write.
            swallowing: added tokens that take the white space to their right with them.
            reserved_pattern: regular expression of further text that users may not write.

        Raises:
            ConfigError: an image token is missing.
        """
        self.path, self.added, self.add_bos = path, dict(added), add_bos
        self.free = frozenset(free)
        self.swallowing = frozenset(self.added[text] for text in swallowing)
        self.start_text: str = ""
        self.start_ids: list[int] = []
        self._texts = {id: text for text, id in self.added.items()}
        # The longest match wins.
        literals = map(re.escape, sorted(self.added, key=len, reverse=True))
        self._added_pattern = re.compile("|".join(literals))
        users = [self._added_pattern.pattern, *([reserved_pattern] if reserved_pattern else [])]
        self._user_pattern = re.compile("|".join(users))
        self.img_start, self.img_end = self.token_id("<img>"), self.token_id("</img>")
        self.image_token_id = self.token_id("<IMG_CONTEXT>")

    @staticmethod
    def load(path: str | os.PathLike) -> Tokenizer:
        """Loads a tokenizer of either kind; its added tokens are read from the files beside it.

        Args:
            path: folder with tokenizer.model, tokenizer.json, or vocab.json and merges.txt; or one
                of these files.

        Raises:
            FileNotFoundError: a file is missing.
            ConfigError: a file is damaged or not supported, or an image token is missing.
        """
        # Both kinds extend this class, so they cannot be imported before it is defined.
        from internvlx_jax.data.bpe_tokenizer import BpeTokenizer
        from internvlx_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer

        file = find_tokenizer(path)
        is_bpe = file.suffix == ".json"
        return BpeTokenizer.open(file) if is_bpe else SentencePieceTokenizer.open(file)

    @staticmethod
    def find(folder: Path) -> Tokenizer | None:
        """Loads the tokenizer of a folder, as `load` does; None where it holds no such files."""
        return Tokenizer.load(folder) if has_tokenizer(folder) else None

    def __getstate__(self) -> dict[str, Any]:
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
                "tokenizer was trained with. `convert import --vit VIT --llm LLM` adds the image "
                "tokens to the tokenizer of a language model."
            )
        return self.added[text]

    def check_rows(self, rows: int) -> None:
        """Checks that a model has a row of its embedding for every id.

        Args:
            rows: model.decoder.vocab_size.

        Raises:
            ConfigError: the model has fewer.
        """
        if self.vocab_size > rows:
            last = self._texts.get(self.vocab_size - 1)
            named = f' (the last is "{last}")' if last else ""
            raise ConfigError(
                f"{self.path}: the tokenizer has {self.vocab_size} ids, model.decoder.vocab_size "
                f"is {rows}{named}. Use the tokenizer files of this model; `convert import --vit "
                "VIT --llm LLM` adds tokens together with their rows."
            )

    def split(self, text: str, special: SpecialText = "allow") -> list[int | str]:
        """Cuts text at added tokens.

        Reserved text is every added token that is not `free`, and what else becomes a control id.

        Args:
            text: what to cut.
            special: what happens to reserved text. "allow" takes it as the token, which trusted
                text needs; "reject" raises; "escape" gives its first character and its rest as
                separate stretches, which have no reserved id.

        Returns:
            Ids, and stretches of plain text that are encoded in one call each.

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
            if special == "allow" or literal in self.free:
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

    def encode(self, text: str, special: SpecialText = "allow") -> list[int]:
        """Returns the ids of text, without bos and eos; `special` is that of `split`."""
        ids, before = [], None
        for i, atom in enumerate(self.split(text, special)):
            if isinstance(atom, int):
                ids += [atom] if i else [*self.start_ids, atom]
            elif before in self.swallowing:
                ids += self.encode_plain("", atom.lstrip())[0]
            else:
                ids += self.encode_plain("", atom if i else self.start_text + atom)[0]
            before = atom
        return ids

    @abc.abstractmethod
    def encode_plain(self, head: str, text: str) -> tuple[list[int], int]:
        """Encodes head + text in ONE call, because a token may hold the end of one and the start
        of the other.

        Args:
            head: plain text that is not supervised.
            text: plain text that is.

        Returns:
            Ids, and how many of them are not supervised.
        """

    @abc.abstractmethod
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of ids; U+FFFD stands for bytes that are no character.

        Args:
            ids: what to decode.
            skip_special: whether control tokens are dropped instead of written out.

        Raises:
            IndexError: an id is outside the vocabulary.
        """

    @abc.abstractmethod
    def piece(self, id: int) -> str:
        """Returns an id as the vocabulary writes it, also where it is no text, such as a byte."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns the sha256 of what decides the ids: vocabulary, added tokens, bos rule."""

    @abc.abstractmethod
    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files that `load` needs to a folder, each of them whole or not at all."""
