"""The tokenizer that a GGUF file holds in its own fields, as files (design: data.md 5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import shown
from internvlx_jax.data.bpe_build import PRETOKENIZERS, AddedToken, write_bpe_tokenizer

T = TypeVar("T")
_KINDS = {str: "text", int: "a whole number", list: "a list"}
# Values of `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
# Names of `tokenizer.ggml.pre` that cut text as another one does.
_SAME_AS = {"deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def write_gguf_tokenizer(folder: Path, fields: Mapping[str, Any], source: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json from the fields of a GGUF file.

    Args:
        folder: where the files go.
        fields: name -> value of the file's `tokenizer.*` fields, as Python values.
        source: the file, which messages name.

    Raises:
        ConfigError: a field is missing or contradicts another, or the tokenizer is of a kind that
            is not known.
    """
    kind = _field(fields, source, "tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise ConfigError(
            f'{source}: tokenizer.ggml.model is "{kind}"; only "gpt2", byte-level BPE, is rebuilt '
            "from a GGUF file. Use the checkpoint's own folder with its tokenizer files."
        )
    named = _field(fields, source, "tokenizer.ggml.pre", str)
    pretokenizer = _SAME_AS.get(named, named)
    if pretokenizer not in PRETOKENIZERS:
        raise ConfigError(
            f'{source}: tokenizer.ggml.pre is "{named}"; known are {", ".join(PRETOKENIZERS)}. Use '
            "the checkpoint's own folder with its tokenizer files."
        )
    pieces = _list(fields, source, "tokenizer.ggml.tokens", str)
    types = _list(fields, source, "tokenizer.ggml.token_type", int)
    if len(types) != len(pieces):
        raise ConfigError(
            f"{source}: tokenizer.ggml.token_type has {len(types)} entries, tokenizer.ggml.tokens "
            f"{len(pieces)}. The file is damaged; fetch it again."
        )
    added = [
        AddedToken(piece, id, special=type == _CONTROL)
        for id, (piece, type) in enumerate(zip(pieces, types))
        if type in (_CONTROL, _USER_DEFINED)
    ]
    vocabulary = {
        piece: id for id, (piece, type) in enumerate(zip(pieces, types)) if type != _UNUSED
    }
    write_bpe_tokenizer(
        folder,
        vocabulary,
        _merges(fields, source, vocabulary),
        added,
        pretokenizer=pretokenizer,
        eos=_named(fields, source, pieces, "eos"),
        pad=_named(fields, source, pieces, "padding", required=False),
        bos=_named(fields, source, pieces, "bos", required=False),
        add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _field(fields: Mapping[str, Any], source: Path, name: str, kind: type[T]) -> T:
    if name not in fields:
        raise ConfigError(
            f"{source}: the field {name} is missing, so the tokenizer cannot be rebuilt. Use the "
            "checkpoint's own folder with its tokenizer files."
        )
    if not isinstance(value := fields[name], kind):
        raise _wrong_kind(source, name, value, _KINDS[kind])
    return value


def _list(fields: Mapping[str, Any], source: Path, name: str, kind: type[T]) -> list[T]:
    values = _field(fields, source, name, list)
    for number, value in enumerate(values):
        if not isinstance(value, kind):
            raise _wrong_kind(source, f"{name}[{number}]", value, _KINDS[kind])
    return values


def _wrong_kind(source: Path, name: str, value: Any, kind: str) -> ConfigError:
    return ConfigError(
        f"{source}: {name} is {shown(value)}, not {kind}. The file is damaged; fetch it again."
    )


def _merges(
    fields: Mapping[str, Any], source: Path, vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    merges = []
    for number, text in enumerate(_list(fields, source, "tokenizer.ggml.merges", str)):
        first, _, second = text.partition(" ")
        if any(piece not in vocabulary for piece in (first, second, first + second)):
            raise ConfigError(
                f"{source}: tokenizer.ggml.merges[{number}] {text!r} needs a piece that "
                "tokenizer.ggml.tokens does not have. The file is damaged; fetch it again."
            )
        merges.append((first, second))
    return merges


def _named(
    fields: Mapping[str, Any], source: Path, pieces: list[str], role: str, required: bool = True
) -> Any:
    """Returns the text of the token that a field names by its id, or None."""
    name = f"tokenizer.ggml.{role}_token_id"
    if not required and name not in fields:
        return None
    id = _field(fields, source, name, int)
    if not 0 <= id < len(pieces):
        raise ConfigError(
            f"{source}: {name} is {id}, but tokenizer.ggml.tokens has {len(pieces)} entries. The "
            "file is damaged; fetch it again."
        )
    return pieces[id]
