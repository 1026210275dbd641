"""Opens Hugging Face folders, in any layout, with any adapters (design: checkpoints.md 6, 8, 9)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from internvlx_jax.checkpoints.adapters import (
    PARTS,
    AdapterTensors,
    Lora,
    find_adapters,
    part_prefixes,
)
from internvlx_jax.checkpoints.hf_config import model_config
from internvlx_jax.checkpoints.hf_processor import SideFields, read_side_fields
from internvlx_jax.checkpoints.name_entries import Entry
from internvlx_jax.checkpoints.name_table import NESTED, name_table
from internvlx_jax.checkpoints.peft_folder import read_peft_folder
from internvlx_jax.checkpoints.safetensors_folder import SafetensorsFolder
from internvlx_jax.checkpoints.tensors import ChangedTensors, RenamedTensors, Tensors
from internvlx_jax.checkpoints.torch_bin import BinFolder
from internvlx_jax.checkpoints.torch_checkpoint import STRICT, Allowed, TorchCheckpoint
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.json_text import read_json_object
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.uploads import local_folder
from internvlx_jax.models.vit import resize_positions

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")  # ends of names


class HFFolder(TorchCheckpoint):
    """A checkpoint folder: config.json with safetensors (or .bin) files, in any known layout.

    Attributes:
        kept: adapters that are left out of the weights; empty without `keep_lora`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fields: Mapping[str, Any] | None = None,
        image_size: int | None = None,
        adapters: Sequence[Path] = (),
        keep_lora: bool = False,
        allowed: Allowed = STRICT,
    ):
        """Opens a folder; no weights are read.

        Args:
            path: the folder.
            fields: internvl_chat fields that replace or complete those of config.json.
            image_size: pixels along a tile's side, where it differs from the stored one.
            adapters: LoRA folders of peft, one part each.
            keep_lora: leave all adapters out of the weights.
            allowed: what may differ between the folder and its model.

        Raises:
            FileNotFoundError: no config.json.
            ConfigError: config.json or the adapters ask for something that is not computed here.
            CheckpointError: the weight files are missing, damaged, or contradict each other.
        """
        home = as_path(path)
        path = local_folder(home, leave_out_files=WEIGHTS)  # small files of a remote one: a copy
        stored = read_config(path)
        folder = open_tensors(home)
        tensors, lora_tensors = _plain_names(stored, folder)
        side = SideFields({}, ())
        if stored.get("model_type") == "internvl":
            side = read_side_fields(path, stored, fields or ())
        if image_size is not None:
            fields = {**(fields or {}), "force_image_size": None}
        try:
            config = model_config({**side.fields, **stored}, tensors.names(), fields)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{path / 'config.json'}: {error}") from error
        if stored["model_type"] == "internvl":
            layout = "hf"
        else:
            layout = "internvl" if config.projector.kind == "mlp1" else "internvl-x"
        weights, notes = tensors, list(side.notes)
        if image_size is not None:
            weights, config, note = resized(tensors, name_table(config, layout), config, image_size)
            notes.append(note)
        table = name_table(config, layout)
        found = _in_place(path, stored, table, layout, lora_tensors, weights)
        for each in adapters:
            opened = open_tensors(each, "adapter_model")
            peft = read_peft_folder(each, table, layout, opened, weights, keep=keep_lora)
            weights = peft.replaced(weights)
            found += peft.loras
            notes += peft.notes
        parts = [lora.config.part for lora in found]
        if len(set(parts)) < len(parts):
            raise ConfigError(
                f"{path}: two sets of adapters for one part ({', '.join(parts)}); merge one of "
                "them first"
            )
        super().__init__(
            path,
            stored,
            layout,
            config,
            table,
            weights,
            [folder],
            allowed=allowed,
            lora=() if keep_lora else found,
            notes=notes,
        )
        self.kept: tuple[Lora, ...] = tuple(found) if keep_lora else ()


def resized(
    tensors: Tensors, table: Sequence[Entry], config: ModelConfig, image_size: int
) -> tuple[Tensors, ModelConfig, str]:
    """Fits the position table and the config to another tile size (design: model.md 3).

    This is done once, before training starts.

    Args:
        tensors: weights under the names of `table`.
        table: the name table of `config`.
        config: the model as it is stored.
        image_size: pixels along a tile's side.

    Returns:
        Tensors, config, and a note for the report.

    Raises:
        ConfigError: the size is no multiple of the patch size.
    """
    patch = config.vision.patch_size
    if image_size < patch or image_size % patch:
        raise ConfigError(
            f"--image_size {image_size} is not a multiple of the patch size {patch}; choose one "
            "that is"
        )
    (entry,) = (entry for entry in table if entry.target == "vision.position_embedding")
    (name,) = entry.sources(0)
    grid = image_size // patch

    def resize(array: np.ndarray) -> np.ndarray:
        return np.asarray(resize_positions(jnp.asarray(array[0]), (grid, grid)))[None]

    shape = (1, 1 + grid**2, config.vision.width)
    tiles = dataclasses.replace(config.prompt.tiles, tile_size=image_size)
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, image_size=image_size),
        prompt=dataclasses.replace(config.prompt, tiles=tiles),
    )
    note = f"position table resized to {grid} x {grid} patches, image size {image_size}"
    return ChangedTensors(tensors, {name: (shape, resize)}), config, note


def read_config(path: Path) -> dict[str, Any]:
    """Reads config.json of a folder.

    Raises:
        FileNotFoundError: the folder has none.
        ConfigError: it is no JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: a Hugging Face checkpoint folder has one")
    return read_json_object(file)


def open_tensors(path: Path, stem: str = "model") -> SafetensorsFolder | BinFolder:
    """Opens the weight files of a folder; safetensors come first.

    Args:
        path: the folder.
        stem: the files are STEM.safetensors, or shards that an index of this name lists.

    Raises:
        CheckpointError: files are missing, unreadable, or contradict each other.
    """
    pickled = stem if stem != "model" else "pytorch_model"
    if not has_safetensors(path, stem) and BinFolder.is_one(path, pickled):
        return BinFolder(path, pickled)
    return SafetensorsFolder(path, stem)


def has_weights(path: Path) -> bool:
    """Whether a folder holds the weight files of a model, or their index."""
    return has_safetensors(path, "model") or BinFolder.is_one(path)


def has_safetensors(path: Path, stem: str) -> bool:
    """Returns whether a folder holds STEM.safetensors, or an index of its shards."""
    return any((path / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))


def _plain_names(
    config: Mapping[str, Any], folder: SafetensorsFolder | BinFolder
) -> tuple[Tensors, RenamedTensors]:
    """Returns (base weights, adapters) without what nested spellings and peft add to the names."""
    stored: dict[str, str] = {}
    for name in folder.names():
        plain = name
        if config.get("model_type") == "internvl":
            prefix = next((prefix for prefix in NESTED if name.startswith(prefix)), None)
            plain = name if prefix is None else NESTED[prefix] + name.removeprefix(prefix)
        if plain in stored:
            raise CheckpointError(
                folder.path,
                [
                    f"tensors {stored[plain]} and {name} are the same one "
                    "in two spellings; remove one of them"
                ],
            )
        stored[plain] = name
    names = list(_in_place_names(list(stored)))
    if all(plain == stored[name] and not is_adapter for plain, name, is_adapter in names):
        return folder, RenamedTensors({})
    weights = {plain: (folder, stored[name]) for plain, name, is_adapter in names if not is_adapter}
    adapters = {plain: (folder, stored[name]) for plain, name, is_adapter in names if is_adapter}
    return RenamedTensors(weights), RenamedTensors(adapters)


def _in_place_names(names: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """Yields (plain name, stored name, whether it is an adapter's).

    The names are those of a checkpoint that was trained with LoRA in place, or of any other.
    """
    for name in names:
        plain = name.replace(".base_model.model.", ".", 1)
        if ".lora_" in plain:
            plain = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", plain)
            yield plain, name, True
        else:
            yield re.sub(r"\.base_layer\.(weight|bias)$", r".\1", plain), name, False


def _in_place(
    path: Path,
    fields: Mapping[str, Any],
    table: Sequence[Entry],
    layout: str,
    tensors: RenamedTensors,
    weights: Tensors,
) -> list[Lora]:
    """Finds the adapters that a training run with LoRA has left in the checkpoint.

    That run's alpha is twice the rank; config.json has no field for it.
    """
    found, problems = [], []
    for part, field in zip(PARTS, ("use_backbone_lora", "use_llm_lora"), strict=True):
        prefix = part_prefixes(layout)[part]
        own = tensors.starting_with(prefix)
        rank = fields.get(field) or 0
        if bool(rank) != bool(own.names()):
            problems.append(
                f"config.json: {field} is {rank}, but the checkpoint holds {len(own.names())} LoRA "
                f"tensors under {prefix}"
            )
        elif rank:
            config = LoraConfig(part=part, rank=rank, alpha=2 * rank)
            adapters, wrong = find_adapters(table, config, own)
            problems += wrong
            found.append(Lora(config, tuple(adapters), AdapterTensors(own, weights, config)))
    if problems:
        raise CheckpointError(path, problems)
    return found
