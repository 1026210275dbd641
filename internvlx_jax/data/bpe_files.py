"""Reads the files of a byte-level BPE tokenizer, in either form (design: data.md 5).

Newer folders hold all in `tokenizer.json`; older ones hold `vocab.json`, `merges.txt` and
`added_tokens.json`, from which the same tokenizer is built.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import read_json_object, shown, text_lines
from internvlx_jax.data.bpe_build import AddedToken, byte_level_bpe
from internvlx_jax.data.tokenizer_files import added_entries, added_ids, check_id, token_text

# Classes of transformers whose vocabulary and merges are read -> how they cut plain text.
_PRETOKENIZER_OF = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}


@dataclasses.dataclass(frozen=True)
class BpeFiles:
    """What the files of a tokenizer say.

    Attributes:
        path: tokenizer.json, or vocab.json where there is none.
        fast: the content of tokenizer.json, or what it would be.
        config: the content of tokenizer_config.json.
        tokens: text -> added token, those of all files together.
        names: bos, eos and pad -> the token's text, or None.
    """

    path: Path
    fast: Mapping[str, Any]
    config: Mapping[str, Any]
    tokens: Mapping[str, AddedToken]
    names: Mapping[str, str | None]

    @property
    def size(self) -> int:
        """Number of ids, from 0 to the largest."""
        vocabulary = self.fast["model"]["vocab"]
        return 1 + max((*vocabulary.values(), *(token.id for token in self.tokens.values())))

    def open_model(self) -> tokenizers.Tokenizer:
        """Opens vocabulary and merges without added tokens, so that plain text gives none.

        Raises:
            ConfigError: merges and vocabulary contradict each other, or a part is not supported.
        """
        plain = dict.fromkeys(("truncation", "padding", "post_processor"))
        try:
            return tokenizers.Tokenizer.from_str(
                json.dumps({**self.fast, **plain, "added_tokens": []})
            )
        except Exception as error:  # the library raises no narrower class
            _check_merges(self.path, self.fast["model"])
            raise ConfigError(
                f"{self.path}: the tokenizers library cannot read it ({error}). Fetch it again, or "
                "upgrade the library: pip install -U tokenizers."
            ) from error


def read_bpe_files(path: Path) -> BpeFiles:
    """Reads the tokenizer that `path` belongs to.

    Args:
        path: tokenizer.json or vocab.json; the other files stand beside it.

    Raises:
        FileNotFoundError: merges.txt is missing beside vocab.json.
        ConfigError: a file is damaged, is no byte-level BPE tokenizer, or contradicts another.
    """
    folder = path.parent
    config_path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config, special_map = read_json_object(config_path), read_json_object(map_path)
    names = {
        name: token_text(config.get(f"{name}_token"), config_path, f"{name}_token")
        or token_text(special_map.get(f"{name}_token"), map_path, f"{name}_token")
        for name in ("bos", "eos", "pad")
    }
    if path.name == "vocab.json":
        model, listed = read_json_object(path), []
        _check_vocabulary(path, model)
        tokens = _added_tokens(folder, path, model, listed, config)
        fast = _read_older(path, model, tokens, config)
    else:
        fast = read_json_object(path)
        _expect_byte_level(path, fast)
        listed = fast.get("added_tokens") or []
        _check_added(path, listed)
        tokens = _added_tokens(folder, path, fast["model"]["vocab"], listed, config)
    return BpeFiles(path, fast, config, tokens, names)


def _expect_byte_level(path: Path, fast: Mapping[str, Any]) -> None:
    """Raises ConfigError where tokenizer.json holds another kind of tokenizer."""
    model = fast.get("model")
    model = model if isinstance(model, Mapping) else {}
    steps = fast.get("pre_tokenizer")
    steps = steps if isinstance(steps, Mapping) else {}
    parts = steps.get("pretokenizers")
    parts = parts if isinstance(parts, list) else []
    kinds = [step.get("type") for step in (steps, *parts) if isinstance(step, Mapping)]
    if model.get("type", "BPE") != "BPE" or "ByteLevel" not in kinds:
        raise ConfigError(
            f"{path}: model.type is {model.get('type')!r}, pre_tokenizer is {steps.get('type')!r}; "
            "only byte-level BPE is read from tokenizer.json. Copy tokenizer.model of the same "
            "checkpoint beside it if it is a SentencePiece tokenizer."
        )
    if not isinstance(model.get("vocab"), Mapping) or not isinstance(model.get("merges"), list):
        raise ConfigError(f"{path}: model.vocab or model.merges is missing. Fetch it again.")
    _check_vocabulary(path, model["vocab"])


def _check_vocabulary(path: Path, vocabulary: Mapping[str, Any]) -> None:
    """Raises ConfigError for the first piece whose id is none."""
    for piece, id in vocabulary.items():
        check_id(path, piece, id)


def _check_added(path: Path, listed: Any) -> None:
    """Raises ConfigError for the first entry of `added_tokens` that is none."""
    for number, entry in enumerate(listed if isinstance(listed, list) else [None]):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise ConfigError(
                f'{path}: added_tokens[{number}] is {shown(entry)}, expected an object with "id" '
                'and "content". Fetch it again.'
            )
        check_id(path, entry["content"], entry.get("id"))


def _read_older(
    path: Path,
    vocabulary: Mapping[str, int],
    tokens: Mapping[str, AddedToken],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the tokenizer.json that vocab.json and merges.txt stand for."""
    kind = str(config.get("tokenizer_class", "Qwen2Tokenizer")).removesuffix("Fast")
    if kind not in _PRETOKENIZER_OF:
        raise ConfigError(
            f"{path.with_name('tokenizer_config.json')}: tokenizer_class {kind!r}; vocab.json and "
            f"merges.txt are read for {', '.join(_PRETOKENIZER_OF)}. Copy the checkpoint's "
            "tokenizer.json beside them."
        )
    file = path.with_name("merges.txt")
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist, but vocab.json. Copy the merges.txt of the same checkpoint, "
            "or its tokenizer.json."
        )
    merges, made = [], set()
    for number, line in text_lines(file):
        if number == 1 and line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not all(pair):
            raise ConfigError(
                f"{file} line {number}: {shown(line)} is no pair of pieces. The file is cut off or "
                "damaged; fetch it again."
            )
        _check_pair(f"{file} line {number}", pair, vocabulary)
        merges.append(pair)
        made.add("".join(pair))
    unmade = [piece for piece in vocabulary if len(piece) > 1 and piece not in made | tokens.keys()]
    if unmade:
        raise ConfigError(
            f"{file} makes {len(made):,} pieces, but {path} has {len(unmade):,} more that no merge "
            f"makes, such as {shown(unmade[0])}. The file is cut off or of another checkpoint; "
            "fetch both again."
        )
    return byte_level_bpe(
        vocabulary,
        merges,
        list(tokens.values()),
        pretokenizer=_PRETOKENIZER_OF[kind],
        prefix_space=bool(config.get("add_prefix_space")),
    )


def _check_merges(path: Path, model: Mapping[str, Any]) -> None:
    """Raises ConfigError for the first merge that the vocabulary does not have."""
    for number, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(piece, str) for piece in pair):
            raise ConfigError(
                f"{path}: model.merges[{number}] {shown(merge)} is no pair of pieces. Fetch it "
                "again."
            )
        _check_pair(f"{path}: model.merges[{number}]", pair, model["vocab"])


def _check_pair(where: str, pair: Sequence[str], vocabulary: Mapping[str, int]) -> None:
    for piece in (*pair, "".join(pair)):
        if piece not in vocabulary:
            raise ConfigError(
                f"{where}: {shown(' '.join(pair))} needs the piece {shown(piece)}, which the "
                "vocabulary does not have. Merges and vocabulary are of different checkpoints; "
                "fetch both again."
            )


def _added_tokens(
    folder: Path,
    path: Path,
    vocabulary: Mapping[str, int],
    listed: list[Mapping[str, Any]],
    config: Mapping[str, Any],
) -> dict[str, AddedToken]:
    """Returns text -> added token of all files.

    Args:
        folder: where the files are.
        path: tokenizer.json or vocab.json.
        vocabulary: piece -> id.
        listed: `added_tokens` of tokenizer.json.
        config: content of tokenizer_config.json.

    Raises:
        ConfigError: two files give a token or an id twice, or a token needs what is not supported.
    """
    config_path, older = folder / "tokenizer_config.json", folder / "added_tokens.json"
    found = [(path, entry["content"], entry["id"], entry) for entry in listed]
    found += [
        (config_path, entry["content"], id, entry)
        for id, entry in added_entries(config, config_path).items()
    ]
    found += [(older, text, id, {}) for text, id in added_ids(older).items()]
    tokens: dict[str, AddedToken] = {}
    places: dict[str, Path] = {}
    texts = {id: text for text, id in vocabulary.items()}
    if len(texts) < len(vocabulary):
        raise ConfigError(f"{path}: the vocabulary gives one id to two pieces. Fetch it again.")
    for place, text, id, flags in found:
        if text in tokens and tokens[text].id == id:
            continue
        known = tokens[text].id if text in tokens else vocabulary.get(text, id)
        if known != id:
            raise ConfigError(
                f'"{text}" has id {id} in {place}, but {known} in {places.get(text, path)}. '
                "Correct one."
            )
        if texts.setdefault(id, text) != text:
            raise ConfigError(
                f'id {id} is "{text}" in {place}, but "{texts[id]}" in '
                f"{places.get(texts[id], path)}. Correct one."
            )
        for flag in ("lstrip", "single_word"):
            if flags.get(flag):
                raise ConfigError(f'{place}: {flag} of "{text}" is true, which is not supported.')
        tokens[text] = AddedToken(
            text, id, bool(flags.get("special", True)), bool(flags.get("rstrip"))
        )
        places[text] = place
    if not tokens:
        raise ConfigError(
            f"{path}: no added tokens are listed in it or in tokenizer_config.json and "
            "added_tokens.json beside it. Copy these files of the checkpoint, too."
        )
    return tokens
