"""A new model from a ViT folder, an LLM folder and, if there is one, a projector (design: checkpoints.md 8, model.md 12)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece

from internvlx_jax.checkpoints.hf_config import ARCHITECTURES, model_config
from internvlx_jax.checkpoints.hf_folder import Allowed, TorchCheckpoint, open_tensors, read_config
from internvlx_jax.checkpoints.safetensors_folder import SafetensorsFolder
from internvlx_jax.checkpoints.side_files import copy_side_files
from internvlx_jax.checkpoints.tensors import Changed, ProtocolSpec, Tensors
from internvlx_jax.checkpoints.torch_bin import BinFolder
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import read_json_object, write_json

NEW_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
TEMPLATES_OF = {"internlm2": "internlm2-chat", "qwen2": "internvl2_5", "phi3": "phi3-chat"}


class Parts(TorchCheckpoint):
    """Tower and decoder of two folders under the names of a whole checkpoint.

    The image tokens that the tokenizer lacks are appended, with a row each in embedding and output: the mean of the
    old output rows, and N(0, initializer_range) or, with mean_input_rows, the mean of the old input rows.

    vit, llm: folders; projector: folder or safetensors file, None for a new one of `kind`.
    fields: of the chat config, e.g. template, downsample_ratio, max_dynamic_patch.
    image_size: of the tiles; None is the tower's.
    """

    def __init__(
        self,
        vit: Path,
        llm: Path,
        projector: Path | None = None,
        *,
        kind: Literal["pvtc", "mlp1"] = "pvtc",
        fields: Mapping[str, Any] | None = None,
        image_size: int | None = None,
        mean_input_rows: bool = False,
        allowed: Allowed = Allowed(),
    ):
        vision, text = read_config(vit), read_config(llm)
        _expect(vit, vision.get("model_type"), ("intern_vit_6b",))
        _expect(llm, (text.get("architectures") or [None])[0], tuple(ARCHITECTURES))
        family = ARCHITECTURES[text["architectures"][0]]
        folders = [open_tensors(vit), open_tensors(llm)]
        where = {
            prefix + name: (folder, name)
            for prefix, folder in zip(("vision_model.", "language_model."), folders)
            for name in folder.names()
        }
        if projector is not None:
            folders.append(_open_projector(projector))
            where |= _projector_names(folders[-1])
        names = list(where)
        if projector is None:
            allowed = dataclasses.replace(
                allowed, init_missing=(*allowed.init_missing, r"projector\.")
            )
            names.append("mlp1.0.weight" if kind == "mlp1" else "projector.cls_scale")
        self._tokens = _Tokens(llm)
        rows = text.get("vocab_size")
        stored = {
            "model_type": "internvl_chat",
            "architectures": ["InternVLChatModel"],
            "vision_config": vision,
            "llm_config": {**text, "vocab_size": max(rows or 0, self._tokens.size)},
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
            **(fields or {}),
        }
        if stored["template"] is None:
            raise ConfigError(
                f"{llm}: no template is known for {family}; give it, e.g. --field template=internvl2_5"
            )
        config = model_config(stored, names)
        layout = "internvl" if config.projector.kind == "mlp1" else "internvl-x"
        super().__init__(llm, stored, layout, config, ProtocolSpec(where), folders, allowed)
        self._add_rows(rows, mean_input_rows)
        if image_size is not None:
            self.resize(image_size)

    def _add_rows(self, rows: int, mean_input_rows: bool) -> None:
        new, total = self._tokens.new_ids, self.config.decoder.vocab_size
        if not new:
            return
        (embedding,) = self.entries["decoder.embedding"].sources(0)
        decoder, known = self.config.decoder, min(new)

        def grown(random: bool):
            def grow(array: np.ndarray) -> np.ndarray:
                result = np.empty((total, array.shape[1]), array.dtype)
                result[: len(array)] = array
                if random:
                    rng = np.random.default_rng(self.allowed.seed)  # each read gives the same rows
                    result[new] = rng.normal(
                        0, decoder.initializer_range, (len(new), array.shape[1])
                    )
                else:
                    result[new] = array[:known].astype(np.float32).mean(axis=0)
                return result

            return grow

        random = not (mean_input_rows or decoder.tie_embeddings)
        changes = {embedding: ((total, decoder.width), grown(random))}
        if not decoder.tie_embeddings:
            (output,) = self.entries["decoder.head"].sources(0)
            changes[output] = ((total, decoder.width), grown(False))
        problems = [
            f"tensor {name} has {self.tensors.shape(name)[0]} rows, config.json says vocab_size {rows}"
            for name in changes
            if self.tensors.shape(name)[0] != rows
        ]
        if problems:
            raise CheckpointError(self.path, problems)
        self.tensors = Changed(self.tensors, changes)
        what = f"N(0, {decoder.initializer_range:g})" if random else "the mean of the old ones"
        self.notes.append(
            f"{len(new)} new tokens, ids {min(new)}..{max(new)}; {max(total - rows, 0)} rows added to "
            f"{rows:,}. Their input rows are {what}, their output rows the mean of the old ones"
        )

    def write_side_files(self, folder: Path) -> list[str]:
        copy_side_files(self.path, folder)
        write_json(folder / "config.json", self.fields)
        self._tokens.write(folder)
        return []


class _Tokens:
    """The image tokens of a tokenizer folder: which are there, and what ids the others get.

    Attributes:
        new_ids: of the tokens that are appended.
        size: number of ids with them; 0 where the folder has no tokenizer.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._config = read_json_object(folder / "tokenizer_config.json")
        self._fast = read_json_object(folder / "tokenizer.json")
        self._added = {
            entry["content"]: int(id)
            for id, entry in self._config.get("added_tokens_decoder", {}).items()
        }
        self._added |= {
            entry["content"]: entry["id"] for entry in self._fast.get("added_tokens", ())
        }
        self._added |= read_json_object(folder / "added_tokens.json")
        base = self._base_size()
        if base == 0:
            raise ConfigError(
                f"{folder}: no tokenizer.model, tokenizer.json or vocab.json; the ids of the image tokens "
                "follow from one of them"
            )
        size = max(base, *(id + 1 for id in self._added.values())) if self._added else base
        absent = [token for token in NEW_TOKENS if token not in self._added]
        self.new = {token: size + n for n, token in enumerate(absent)}
        self.new_ids = list(self.new.values())
        self.size = size + len(absent)

    def _base_size(self) -> int:
        if (self.folder / "tokenizer.model").is_file():
            path = str(self.folder / "tokenizer.model")
            return sentencepiece.SentencePieceProcessor(model_file=path).get_piece_size()
        vocabulary = self._fast.get("model", {}).get("vocab") or read_json_object(
            self.folder / "vocab.json"
        )
        return max(vocabulary.values()) + 1 if vocabulary else 0

    def write(self, folder: Path) -> None:
        """Add the new tokens to the copied files."""
        if not self.new:
            return
        flags = {
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        write_json(
            folder / "added_tokens.json", read_json_object(folder / "added_tokens.json") | self.new
        )
        decoder = dict(self._config.get("added_tokens_decoder", {}))
        decoder |= {str(id): {"content": token, **flags} for token, id in self.new.items()}
        special = [*self._config.get("additional_special_tokens", ()), *self.new]
        write_json(
            folder / "tokenizer_config.json",
            {**self._config, "added_tokens_decoder": decoder, "additional_special_tokens": special},
        )
        if self._fast:
            added = [
                *self._fast.get("added_tokens", ()),
                *({"id": id, "content": token, **flags} for token, id in self.new.items()),
            ]
            write_json(folder / "tokenizer.json", {**self._fast, "added_tokens": added})
        if special_map := read_json_object(folder / "special_tokens_map.json"):
            listed = [*special_map.get("additional_special_tokens", ()), *self.new]
            write_json(
                folder / "special_tokens_map.json",
                {**special_map, "additional_special_tokens": listed},
            )


def _expect(folder: Path, found: str | None, known: tuple[str, ...]) -> None:
    if found not in known:
        raise ConfigError(
            f"{folder / 'config.json'} describes {found!r}; expected one of {', '.join(known)}"
        )


def _open_projector(path: Path) -> SafetensorsFolder | BinFolder:
    if path.is_dir():
        return open_tensors(path)
    if path.suffix == ".safetensors":
        return SafetensorsFolder(path.parent, path.stem)
    raise ConfigError(f"{path}: give a folder, or a .safetensors file")


def _projector_names(tensors: Tensors) -> dict[str, tuple[Tensors, str]]:
    """PVTC tensors come with or without their prefix; those of `mlp1` never have one."""
    names = tensors.names()
    is_mlp1 = "mlp1.0.bias" in names and "cls_scale" not in names
    prefix = "" if is_mlp1 or any(name.startswith("projector.") for name in names) else "projector."
    return {prefix + name: (tensors, name) for name in names}
