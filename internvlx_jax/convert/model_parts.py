"""Builds a new model from a ViT folder, an LLM folder and, optionally, a projector.

(design: checkpoints.md 8, model.md 12)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from internvlx_jax.checkpoints.decoder_fields import ARCHITECTURES
from internvlx_jax.checkpoints.hf_config import model_config, with_fields
from internvlx_jax.checkpoints.hf_folder import open_tensors, resized
from internvlx_jax.checkpoints.name_table import name_table
from internvlx_jax.checkpoints.safetensors_folder import SafetensorsFolder
from internvlx_jax.checkpoints.side_files import copy_side_files
from internvlx_jax.checkpoints.tensors import Change, ChangedTensors, RenamedTensors, Tensors
from internvlx_jax.checkpoints.torch_bin import BinFolder
from internvlx_jax.checkpoints.torch_checkpoint import STRICT, Allowed, TorchCheckpoint
from internvlx_jax.convert.part_sources import open_decoder, open_tower
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.core.model_config import DecoderConfig, ModelConfig
from internvlx_jax.data.new_tokens import IMAGE_TOKENS, NewTokens

ProjectorKind = Literal["pvtc", "mlp1"]

TEMPLATES_OF = {
    "internlm2": "internlm2-chat",
    "qwen2": "internvl2_5",
    "qwen3": "internvl2_5",
    "phi3": "phi3-chat",
}


class Parts(TorchCheckpoint):
    """Tower and decoder of two folders under the names of a whole checkpoint.

    Image tokens that the tokenizer lacks are appended, with a row each in embedding and output. A
    new output row is the mean of the old ones; a new input row is N(0, initializer_range) or, with
    `mean_input_rows`, the mean of the old input rows.
    """

    def __init__(
        self,
        vit: str | Path,
        llm: Path,
        projector: Path | None = None,
        *,
        kind: ProjectorKind = "pvtc",
        fields: Mapping[str, Any] | None = None,
        image_size: int | None = None,
        mean_input_rows: bool = False,
        allowed: Allowed = STRICT,
    ):
        """Opens the folders; no weights are read.

        Args:
            vit: folder of the tower, or `fresh`: one of 300M parameters that starts at random.
            llm: folder of the decoder and its tokenizer, or a GGUF file, which holds both.
            projector: folder or safetensors file; None starts a new one of `kind`.
            kind: kind of a new projector.
            fields: fields of the chat config, e.g. template, downsample_ratio, max_dynamic_patch.
            image_size: pixels along a tile's side; None is the tower's.
            mean_input_rows: start new input rows as the mean of the old ones.
            allowed: what may differ between the folders and the model.

        Raises:
            FileNotFoundError: a folder has no config.json.
            ConfigError: a folder does not hold such a part, or the template is unknown.
            CheckpointError: weight files are missing, damaged, or contradict each other.
        """
        tower = open_tower(vit)
        decoder, self._alive = open_decoder(llm, keep_template="template" in (fields or {}))
        text = decoder.config
        folders = [part.tensors for part in (tower, decoder) if part.tensors is not None]
        where: dict[str, tuple[Tensors, str]] = {
            prefix + name: (part.tensors, name)
            for prefix, part in (("vision_model.", tower), ("language_model.", decoder))
            if part.tensors is not None
            for name in part.tensors.names()
        }
        if tower.tensors is None:
            allowed = dataclasses.replace(
                allowed, init_missing=(*allowed.init_missing, r"vision\.")
            )
        if projector is not None:
            folders.append(_open_projector(projector))
            where |= _projector_names(folders[-1])
        names = list(where)
        if projector is None:
            allowed = dataclasses.replace(
                allowed, init_missing=(*allowed.init_missing, r"projector\.")
            )
            names.append("mlp1.0.weight" if kind == "mlp1" else "projector.cls_scale")
        self._tokens = NewTokens(decoder.folder, IMAGE_TOKENS)
        _check_rows(llm, self._tokens.old_size, text.get("vocab_size"))
        stored = with_fields(
            _chat_fields(tower.config, text, kind, self._tokens.size) | {**decoder.template},
            fields or {},
        )
        if stored["template"] is None:
            family = ARCHITECTURES[text["architectures"][0]]
            raise ConfigError(
                f"{llm}: no template is known for {family}; give it, e.g. --field "
                "template=internvl2_5"
            )
        config = model_config(stored, names)
        layout = "internvl" if config.projector.kind == "mlp1" else "internvl-x"
        tensors, notes = _with_rows(
            RenamedTensors(where),
            config,
            self._tokens.new_ids,
            text.get("vocab_size") or 0,
            path=llm,
            seed=allowed.seed,
            random=not (mean_input_rows or config.decoder.tie_embeddings),
        )
        if image_size is not None:
            table = name_table(config, layout)
            tensors, config, note = resized(tensors, table, config, image_size)
            notes.append(note)
        super().__init__(
            decoder.folder,
            stored,
            layout,
            config,
            name_table(config, layout),
            tensors,
            folders,
            allowed=allowed,
            notes=notes,
        )

    def write_side_files(self, folder: Path) -> list[str]:
        """Writes config.json and the decoder's small files, with the new tokens among them."""
        copy_side_files(self.path, folder)
        write_json(folder / "config.json", self.fields)
        self._tokens.write(folder)
        return []


def _chat_fields(
    vision: Mapping[str, Any], text: Mapping[str, Any], kind: ProjectorKind, ids: int
) -> dict[str, Any]:
    """Returns the chat config of tower and decoder; `ids` counts the tokens with the new ones."""
    family = ARCHITECTURES[text["architectures"][0]]
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "vision_config": vision,
        "llm_config": {**text, "vocab_size": max(text.get("vocab_size") or 0, ids)},
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6 if kind == "pvtc" else 12,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "force_image_size": vision.get("image_size", 224),
        "template": TEMPLATES_OF.get(family),
        "torch_dtype": text.get("torch_dtype"),
    }


def _with_rows(
    tensors: Tensors,
    config: ModelConfig,
    new: list[int],
    rows: int,
    *,
    path: Path,
    seed: int,
    random: bool,
) -> tuple[Tensors, list[str]]:
    """Appends the rows of new tokens to embedding and output.

    Args:
        tensors: weights under the names of the original release.
        config: the model, whose vocabulary has the new tokens.
        new: ids of the new tokens.
        rows: vocabulary size without them, by the decoder's config.json.
        path: folder that messages name.
        seed: seed of random rows.
        random: draw the new input rows; else they are the mean of the old ones.

    Returns:
        Tensors, and notes for the report.
    """
    if not new:
        return tensors, []
    decoder, total = config.decoder, config.decoder.vocab_size
    entries = {entry.target: entry for entry in name_table(config)}
    shape = (total, decoder.width)
    (embedding,) = entries["decoder.embedding"].sources(0)
    changes: dict[str, Change] = {embedding: (shape, _grow(decoder, new, seed if random else None))}
    if not decoder.tie_embeddings:
        (output,) = entries["decoder.head"].sources(0)
        changes[output] = (shape, _grow(decoder, new, None))
    problems = [
        f"tensor {name} has {tensors.shape(name)[0]} rows, config.json says vocab_size {rows}"
        for name in changes
        if tensors.shape(name)[0] != rows
    ]
    if problems:
        raise CheckpointError(path, problems)
    what = f"N(0, {decoder.initializer_range:g})" if random else "the mean of the old ones"
    note = (
        f"{len(new)} new tokens, ids {min(new)}..{max(new)}; {max(total - rows, 0)} rows added to "
        f"{rows:,}. Their input rows are {what}, their output rows the mean of the old ones"
    )
    return ChangedTensors(tensors, changes), [note]


def _grow(
    decoder: DecoderConfig, new: list[int], seed: int | None
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function that fills the rows `new`: random with a seed, else the mean."""

    def grow(array: np.ndarray) -> np.ndarray:
        result = np.empty((decoder.vocab_size, array.shape[1]), array.dtype)
        result[: len(array)] = array
        if seed is None:
            result[new] = array[: min(new)].astype(np.float32).mean(axis=0)
        else:
            rng = np.random.default_rng(seed)  # each read gives the same rows
            result[new] = rng.normal(0, decoder.initializer_range, (len(new), array.shape[1]))
        return result

    return grow


def _check_rows(folder: Path, ids: int, rows: int | None) -> None:
    """Raises ConfigError where a tokenizer has ids that the decoder has no rows for."""
    if rows is not None and ids > rows:
        raise ConfigError(
            f"{folder}: the tokenizer has {ids:,} ids, but config.json says vocab_size {rows:,}. "
            "Use the tokenizer files of this model."
        )


def _open_projector(path: Path) -> SafetensorsFolder | BinFolder:
    if path.is_dir():
        return open_tensors(path)
    if path.suffix == ".safetensors":
        return SafetensorsFolder(path.parent, path.stem)
    raise ConfigError(f"--projector {path}: give a folder, or a .safetensors file")


def _projector_names(tensors: Tensors) -> dict[str, tuple[Tensors, str]]:
    """Returns a projector's tensors under their names in a whole checkpoint.

    PVTC tensors come with or without their prefix; those of `mlp1` never have one.
    """
    names = tensors.names()
    is_mlp1 = "mlp1.0.bias" in names and "cls_scale" not in names
    prefix = "" if is_mlp1 or any(name.startswith("projector.") for name in names) else "projector."
    return {prefix + name: (tensors, name) for name in names}
