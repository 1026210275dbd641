"""The small files around the weights of a PyTorch checkpoint (design: checkpoints.md 6)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvlx_jax.core.uploads import copy_file
from internvlx_jax.data.tokenizer_files import TOKENIZER_FILES, VOCABULARY_FILES

OTHER_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def copy_side_files(source: Path, target: Path, *, remote_code: bool = True) -> list[str]:
    """Copies the small files that a folder has, unchanged; returns their names.

    Args:
        source: folder to copy from.
        target: folder to copy to.
        remote_code: copy the *.py files that `auto_map` may name, too.
    """
    names = [name for name in (*TOKENIZER_FILES, *OTHER_FILES) if (source / name).is_file()]
    code = sorted(file.name for file in source.glob("*.py"))
    names += [name for name in code if remote_code or name.startswith("tokenization_")]
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        copy_file(source / name, target / name)
    return names


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies the tokenizer files of a folder; returns their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    names += sorted(file.name for file in source.glob("tokenization_*.py"))
    if names:
        target.mkdir(parents=True, exist_ok=True)
    for name in names:
        copy_file(source / name, target / name)
    return names


def same_tokenizer(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same vocabulary file.

    That suffices: a run's tokenizer has the added tokens of its source.
    """
    return any(
        (other / name).is_file()
        and (folder / name).is_file()
        and (folder / name).read_bytes() == (other / name).read_bytes()
        for name in VOCABULARY_FILES
    )


def replace_tokenizer(source: Path, target: Path) -> None:
    """Replaces the tokenizer files of `target` with those of `source`."""
    for name in TOKENIZER_FILES:
        (target / name).unlink(missing_ok=True)
    copy_tokenizer(source, target)


def missing_remote_code(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns the files that `auto_map` names and the folder lacks.

    transformers cannot load the folder without them.
    """
    named = set()
    for section in (config, config.get("llm_config") or {}, config.get("vision_config") or {}):
        for value in (section.get("auto_map") or {}).values():
            for each in value if isinstance(value, list) else [value]:
                if each and "--" not in each:  # `owner/name--module.Class` lives elsewhere
                    named.add(each.partition(".")[0] + ".py")
    return sorted(name for name in named if not (folder / name).is_file())
