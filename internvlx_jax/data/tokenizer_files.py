"""Reading and writing the files of a tokenizer folder (design: data.md 5, checkpoints.md 7)."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import read_json_object, written_aside

INTERNLM2_PIECES = 92_544

# Ids of the InternLM2 family, where the token files do not say. The chat tokens are spare pieces of
# tokenizer.model renamed; the last nine are appended to the vocabulary of a base LLM.
_INTERNLM2_ADDED = {
    text: id
    for id, text in [
        *enumerate(("<unk>", "<s>", "</s>")),
        *enumerate(
            ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>"), start=92_538
        ),
        *enumerate(("<|im_end|>", "<|im_start|>"), start=92_542),
        *enumerate(
            ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"), start=INTERNLM2_PIECES
        ),
        *enumerate(("<ref>", "</ref>", "<box>", "</box>"), start=92_549),
    ]
}


def find_model(path: str | os.PathLike) -> Path:
    """The tokenizer.model of a folder, or the file itself.

    Raises FileNotFoundError, or ValueError for a folder with a tokenizer of another kind.
    """
    path = Path(path)
    model = path / "tokenizer.model" if path.is_dir() else path
    if model.is_file():
        return model
    for name in ("tokenizer.json", "vocab.json"):
        if (path / name).is_file():
            raise ConfigError(
                f"{path}: no tokenizer.model, but {name}: a byte-level BPE tokenizer (Qwen2), which is not "
                "supported yet. Use a checkpoint with an InternLM2 decoder (InternVL2-2B/8B, InternVL-X)."
            )
    raise FileNotFoundError(
        f"{model} does not exist. Name a folder with tokenizer.model, or that file."
    )


def open_model(path: Path) -> tuple[sentencepiece.SentencePieceProcessor, bool]:
    """(tokenizer.model opened so that it adds nothing to a text, whether on its own it puts a space before each).

    Raises ConfigError if it is no SentencePiece model.
    """
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:  # OSError up to SentencePiece 0.2.0
        raise ConfigError(
            f"{path} is not a SentencePiece model ({error}). Fetch the file itself, not its Git LFS pointer."
        ) from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    if not proto.normalizer_spec.add_dummy_prefix:
        return model, False
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()), True


class AddedTokens(NamedTuple):
    """What the files beside tokenizer.model say.

    Attributes
      ids: text -> id of the added tokens.
      add_bos: whether bos is added.
      legacy: with a model that puts a space before texts: before every stretch between added tokens, or once.
      swallowing: added tokens that take the white space to their right with them.
    """

    ids: dict[str, int]
    add_bos: bool
    legacy: bool
    swallowing: frozenset[str]


def read_added_tokens(folder: Path, *, pieces: int) -> AddedTokens:
    """The added tokens of a model of `pieces` pieces.

    Read from added_tokens.json and tokenizer_config.json; for InternLM2's 92,544 pieces the known ids fill
    gaps. Raises FileNotFoundError for another model without these files, ValueError if they contradict.
    """
    config_path, added_path = folder / "tokenizer_config.json", folder / "added_tokens.json"
    config = read_json_object(config_path)
    added = {
        entry["content"]: int(id) for id, entry in config.get("added_tokens_decoder", {}).items()
    }
    for text, id in read_json_object(added_path).items():
        if added.setdefault(text, id) != id:
            raise ConfigError(
                f'"{text}" has id {id} in {added_path}, but {added[text]} in {config_path}. Correct one.'
            )
    if pieces == INTERNLM2_PIECES:
        added = _INTERNLM2_ADDED | added
    elif not added:
        raise FileNotFoundError(
            f"{added_path} does not exist. tokenizer.model has {pieces} pieces, not InternLM2's "
            f"{INTERNLM2_PIECES}, so the ids of its added tokens are not known: copy added_tokens.json and "
            "tokenizer_config.json beside it."
        )
    ids = list(added.values())
    if twice := [text for text, id in added.items() if ids.count(id) > 1]:
        raise ConfigError(
            f"{folder}: added tokens share ids: {', '.join(twice)}. Correct added_tokens.json."
        )
    swallowing = frozenset(
        entry["content"]
        for entry in config.get("added_tokens_decoder", {}).values()
        if entry.get("rstrip")
    )
    return AddedTokens(
        added, config.get("add_bos_token", True), config.get("legacy", True), swallowing
    )


def write_tokenizer_files(
    folder: str | os.PathLike,
    model: bytes,
    added: Mapping[str, int],
    *,
    add_bos: bool,
    pieces: int,
    legacy: bool = True,
    swallowing: Collection[str] = (),
) -> None:
    """Writes the three files, each aside and then renamed, so that a reader never meets half a file.

    added_tokens.json lists the tokens beyond tokenizer.model, tokenizer_config.json all of them.
    """
    flags = {
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
        "special": True,
    }
    by_id = sorted(added.items(), key=lambda item: item[1])
    config = {
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(id): {"content": text, **flags, "rstrip": text in swallowing} for text, id in by_id
        },
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    } | ({} if legacy else {"legacy": False})
    files = {
        "tokenizer.model": model,
        "added_tokens.json": _dump({text: id for text, id in by_id if id >= pieces}),
        "tokenizer_config.json": _dump(config),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with written_aside(folder / name) as aside:
            aside.write_bytes(content)


def _dump(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
