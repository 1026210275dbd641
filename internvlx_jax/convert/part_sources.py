"""What a model is built from: folders of tower and decoder, a GGUF file, or a fresh tower."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from internvlx_jax.checkpoints.chat_template import find_chat_template
from internvlx_jax.checkpoints.decoder_fields import ARCHITECTURES
from internvlx_jax.checkpoints.gguf_file import GgufFile
from internvlx_jax.checkpoints.hf_config_write import vit_config
from internvlx_jax.checkpoints.hf_folder import open_tensors, read_config
from internvlx_jax.checkpoints.tensors import Tensors
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.core.model_config import VisionConfig
from internvlx_jax.core.presets import TOWER
from internvlx_jax.data.gguf_tokenizer import write_gguf_tokenizer

# Towers that start at random: what `--vit` takes besides a folder.
FRESH_TOWERS: Mapping[str, VisionConfig] = {
    "fresh": TOWER,
    "fresh-tiny": VisionConfig(width=64, layers=2, heads=4, mlp_width=128),
}


class PartTensors(Tensors, Protocol):
    """Tensors of one part, with what a report says about their files."""

    notes: list[str]

    def check_sums(self) -> int:
        """Compares the files with their checksums; returns how many had one."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """One part, opened.

    Attributes:
        path: what messages name.
        config: its config.json.
        tensors: its weights under their own names; None where they start fresh.
        folder: where its small files lie.
        template: fields of the chat config that its chat template decides.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: PartTensors | None
    folder: Path
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_tower(vit: str | Path) -> Part:
    """Opens the folder of a tower, or describes one that starts at random.

    Args:
        vit: the folder, or a name of FRESH_TOWERS.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ConfigError: the folder holds no tower.
        CheckpointError: weight files are missing, damaged, or contradict each other.
    """
    path = Path(vit)
    if str(vit) in FRESH_TOWERS:
        return Part(path, vit_config(FRESH_TOWERS[str(vit)], dtype="float32"), None, path)
    config = read_config(path)
    _expect(path, config.get("model_type"), ("intern_vit_6b",))
    return Part(path, config, open_tensors(path), path)


def open_decoder(llm: Path, *, keep_template: bool) -> tuple[Part, Any]:
    """Opens the folder of a decoder, or a GGUF file.

    Args:
        llm: folder or file.
        keep_template: whether the user has named the template, so that a chat template that is
            not known does not matter.

    Returns:
        The part, and what has to stay alive as long as its folder is needed.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ConfigError: there is no decoder that is computed here.
        CheckpointError: weights are missing, damaged, or contradict each other.
    """
    if not llm.is_file():
        config = read_config(llm)
        _expect(llm, (config.get("architectures") or [None])[0], tuple(ARCHITECTURES))
        return Part(llm, config, open_tensors(llm), llm), None
    if llm.suffix != ".gguf":
        raise ConfigError(f"--llm {llm}: give a decoder's folder, or a file that ends in .gguf")
    file = GgufFile(llm)
    aside = tempfile.TemporaryDirectory(prefix="gguf-tokenizer-")
    folder = Path(aside.name)
    tokenizer = {name: value for name, value in file.fields.items() if name.startswith("tokenizer")}
    write_gguf_tokenizer(folder, tokenizer, llm)
    write_json(folder / "config.json", file.config)
    template: dict[str, Any] = {}
    if not keep_template and (found := _chat_template(folder, llm)) is not None:
        template = {"template": found.name}
        if found.system_message is not None:
            template["system_message"] = found.system_message
    return Part(llm, file.config, file, folder, template), aside


def _chat_template(folder: Path, llm: Path) -> Any:
    try:
        return find_chat_template(folder, images=False)
    except ConfigError as error:
        text = str(error).removeprefix(f"{folder / 'tokenizer_config.json'}: ")
        raise ConfigError(f"{llm}: tokenizer.chat_template: {text}") from error


def _expect(folder: Path, found: str | None, known: tuple[str, ...]) -> None:
    """Raises ConfigError where a folder holds another part."""
    if found not in known:
        raise ConfigError(
            f"{folder / 'config.json'} describes {found!r}; expected one of {', '.join(known)}"
        )
