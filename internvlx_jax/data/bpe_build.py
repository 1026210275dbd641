"""Byte-level BPE tokenizers from their parts: vocabulary, merges, added tokens (design: data.md 5).

Older folders and GGUF files hold the parts only; the rules that normalize and cut the text between
added tokens go by a name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError, did_you_mean
from internvlx_jax.core.files import write_json
from internvlx_jax.data.tokenizer_files import PLAIN_FLAGS


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is matched before the vocabulary sees the text.

    Attributes:
        text: what it stands for.
        id: its id.
        special: whether it is a control token, which decoding drops and users may not write.
        swallows: whether it takes the white space to its right with it.
    """

    text: str
    id: int
    special: bool = True
    swallows: bool = False

    def entry(self) -> dict[str, Any]:
        """Returns the token as tokenizer.json lists it."""
        flags = {**PLAIN_FLAGS, "rstrip": self.swallows, "special": self.special}
        return {"id": self.id, "content": self.text, **flags}


@dataclasses.dataclass(frozen=True)
class Pretokenizer:
    """How plain text is normalized and cut before merges apply.

    Attributes:
        pattern: regular expression of the stretches that merges do not leave; None takes GPT-2's,
            which the library knows.
        single_digits: whether each digit is cut off first.
        nfc: whether text is normalized to NFC.
        whole_words: whether a stretch that is a piece becomes it without merges.
    """

    pattern: str | None
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False

    def normalizer(self) -> dict[str, Any] | None:
        """Returns the `normalizer` of tokenizer.json."""
        return {"type": "NFC"} if self.nfc else None

    def steps(self, prefix_space: bool) -> dict[str, Any]:
        """Returns the `pre_tokenizer` of tokenizer.json."""
        steps: list[dict[str, Any]] = []
        if self.single_digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.pattern is not None:
            split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated"}
            steps.append({**split, "invert": False})
        use_regex = self.pattern is None
        steps.append({**_BYTE_LEVEL, "add_prefix_space": prefix_space, "use_regex": use_regex})
        return {"type": "Sequence", "pretokenizers": steps}


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Named as `tokenizer.ggml.pre` of GGUF files names them.
PRETOKENIZERS: Mapping[str, Pretokenizer] = {
    "qwen2": Pretokenizer(rf"{_WORDS}|\p{{N}}|{_REST}", nfc=True),
    "llama-bpe": Pretokenizer(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole_words=True),
    "smollm": Pretokenizer(None, single_digits=True),
    "gpt-2": Pretokenizer(None),
}


def byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[AddedToken],
    *,
    pretokenizer: str,
    prefix_space: bool = False,
) -> dict[str, Any]:
    """Returns the tokenizer.json of a byte-level BPE tokenizer.

    Args:
        vocabulary: piece -> id, in the letters that stand for bytes.
        merges: pairs of pieces, the first one first.
        added: added tokens, which may be pieces of the vocabulary, too.
        pretokenizer: a name in PRETOKENIZERS.
        prefix_space: whether a space is put before each stretch of plain text.

    Raises:
        ConfigError: the name is unknown.
    """
    if pretokenizer not in PRETOKENIZERS:
        raise ConfigError(
            f'pre-tokenizer "{pretokenizer}" is unknown.{did_you_mean(pretokenizer, PRETOKENIZERS)}'
            f" Known are {', '.join(PRETOKENIZERS)}; use a folder with tokenizer.json instead."
        )
    rules = PRETOKENIZERS[pretokenizer]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.entry() for token in sorted(added, key=lambda token: token.id)],
        "normalizer": rules.normalizer(),
        "pre_tokenizer": rules.steps(prefix_space),
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rules.whole_words,
            "vocab": dict(vocabulary),
            "merges": [list(pair) for pair in merges],
        },
    }


def write_bpe_tokenizer(
    folder: Path,
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Sequence[AddedToken],
    *,
    pretokenizer: str,
    eos: str,
    pad: str | None = None,
    bos: str | None = None,
    add_bos: bool = False,
    chat_template: str | None = None,
) -> None:
    """Writes tokenizer.json and tokenizer_config.json of a tokenizer that has no files.

    Args:
        folder: where the files go.
        vocabulary: piece -> id, in the letters that stand for bytes.
        merges: pairs of pieces, the first one first.
        added: added tokens; control tokens that are pieces of the vocabulary belong here, too.
        pretokenizer: a name in PRETOKENIZERS.
        eos: token at the end of a text.
        pad: token of padding; None takes `eos`.
        bos: token at the beginning of a text, if there is one.
        add_bos: whether `bos` is put before every text.
        chat_template: Jinja source of the prompts, kept for users of transformers.

    Raises:
        ConfigError: the pre-tokenizer is unknown.
    """
    fast = byte_level_bpe(vocabulary, merges, added, pretokenizer=pretokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad or eos,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", fast)
    write_json(folder / "tokenizer_config.json", config)
