"""PyTorch checkpoints -> our parameters, strict about every name, shape, dtype and value (design: checkpoints.md 6, 8)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from internvlx_jax.checkpoints.hf_config import model_config
from internvlx_jax.checkpoints.lora_files import (
    Adapter,
    Lora,
    find_adapters,
    in_place_names,
    part_prefixes,
    read_adapter_folder,
)
from internvlx_jax.checkpoints.name_table import IGNORED_SOURCES, Entry, name_table, tensor_shapes
from internvlx_jax.checkpoints.safetensors_folder import FLOAT_TYPES, SafetensorsFolder
from internvlx_jax.checkpoints.side_files import copy_side_files, missing_remote_code
from internvlx_jax.checkpoints.tensors import (
    Changed,
    ProtocolSpec,
    Tensors,
    aligned_empty,
    changed_by_cast,
    copy_strided,
    count_not_finite,
    difference,
)
from internvlx_jax.checkpoints.torch_bin import BinFolder
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import read_json_object, write_json
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.params import AbstractModel, init_params
from internvlx_jax.models.vit import resize_positions

NESTED = {
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allowed:
    """What may differ between a checkpoint and its model, as regular expressions from the beginning of a name.

    Attributes:
        ignore_source: tensors that are not read.
        init_missing: parameters, by dotted path, that start fresh where the checkpoint has no tensor for them.
        seed: of the fresh parameters.
    """

    ignore_source: tuple[str, ...] = ()
    init_missing: tuple[str, ...] = ()
    seed: int = 0


class TorchCheckpoint:
    """Tensors under their PyTorch names, with the config they belong to: one folder, or parts put together.

    Attributes:
        path: for messages, and where side files are.
        fields: the parsed config.json.
        layout: internvl-x, internvl or hf.
        config: the model.
        tensors: base weights, under the names of `layout`.
        lora: adapters of the vision and the decoder part, merged into the weights as they are read.
        notes: what a report should mention.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, Any],
        layout: str,
        config: ModelConfig,
        tensors: Tensors,
        folders: Sequence[SafetensorsFolder | BinFolder],
        allowed: Allowed = Allowed(),
    ):
        self.path, self.fields, self.layout, self.config = path, fields, layout, config
        self.tensors, self.allowed, self._folders = tensors, allowed, folders
        self.lora: list[Lora] = []
        self.notes = [note for folder in folders for note in folder.notes]
        self.rounded: dict[str, int] = {}  # parameter -> values that a cast has changed
        self._not_finite: dict[str, int] = {}

    @functools.cached_property
    def table(self) -> list[Entry]:
        return name_table(self.config, self.layout)

    @functools.cached_property
    def entries(self) -> dict[str, Entry]:
        return {entry.target: entry for entry in self.table}

    @functools.cached_property
    def _adapters(self) -> dict[str, tuple[Lora, Adapter]]:
        return {
            adapter.base.target: (lora, adapter) for lora in self.lora for adapter in lora.adapters
        }

    def load(
        self, abstract: AbstractModel, shardings: Mapping[str, Sharding]
    ) -> dict[str, jax.Array]:
        """Parameters by dotted path, in the dtypes of `abstract`, each placed as its sharding says.

        A process reads the slices of its own devices only, one parameter at a time. Raises CheckpointError listing
        every unused tensor, unfilled parameter, and shape or dtype mismatch before anything is read, and every tensor
        with values that are not finite.
        """
        fresh = self.check(abstract)
        dtype = next(iter(abstract.shapes.values())).dtype
        params = {}
        if fresh:
            params = init_params(
                self.config,
                self.allowed.seed,
                param_dtype=dtype,
                shardings=dict(shardings),
                paths=fresh,
            )
        for path, leaf in abstract.shapes.items():
            if path not in params:
                params[path] = self._place(path, leaf, shardings[path])
        self.check_finite()
        return params

    def _place(self, path: str, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        """One parameter on its devices; what several devices of this process hold alike is read once."""
        read = functools.cache(
            lambda bounds: self.read(path, leaf.dtype, tuple(slice(*each) for each in bounds))
        )
        return jax.make_array_from_callback(
            leaf.shape,
            sharding,
            lambda index: read(
                tuple(each.indices(size)[:2] for each, size in zip(index, leaf.shape, strict=True))
            ),
        )

    def read(
        self, path: str, dtype: np.dtype | None = None, index: tuple[slice, ...] | None = None
    ) -> np.ndarray:
        """One parameter, or `index` of it, with its adapters merged; dtype None keeps the stored one."""
        entry = self.entries[path]
        dtype = self.dtype(path) if dtype is None else np.dtype(dtype)
        index = index or ()
        if entry.layers is None:
            array = self._read_layer(entry, 0, index)
            result = aligned_empty(array.shape, dtype)
            self._fill(entry, 0, result, array)
            return result
        layers = range(entry.layers)[index[0]] if index else range(entry.layers)
        stack = None
        for n, layer in enumerate(layers):
            array = self._read_layer(entry, layer, index[1:])
            if stack is None:
                stack = aligned_empty((len(layers), *array.shape), dtype)
            self._fill(entry, layer, stack[n], array)
        return stack

    def read_all(self, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """(path, parameter in its stored dtype), one at a time."""
        return ((path, self.read(path)) for path in paths)

    def differences(self, path: str, found: Any) -> list[str]:
        """Where an array is not, bit for bit, this parameter in its dtype; of a stack both are read layer by layer."""
        if self.entries[path].layers is None:
            return difference(path, self.read(path, found.dtype), np.asarray(found))
        rest = (slice(None),) * (len(found.shape) - 1)
        return [
            problem
            for layer in range(len(found))
            for problem in difference(
                f"{path}, layer {layer}",
                self.read(path, found.dtype, (slice(layer, layer + 1), *rest))[0],
                found[layer],
            )
        ]

    def dtype(self, path: str) -> np.dtype:
        """Stored dtype of a parameter: the smallest that holds all its tensors exactly."""
        entry = self.entries[path]
        names = {name for layer in range(entry.layers or 1) for name in entry.sources(layer)}
        kinds = {FLOAT_TYPES[self.tensors.dtype(name)] for name in names}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def shape(self, path: str) -> tuple[int, ...]:
        entry = self.entries[path]
        views = [
            np.broadcast_to(np.uint8(0), self.tensors.shape(name)) for name in entry.sources(0)
        ]
        shape = entry.to_target(views).shape
        return shape if entry.layers is None else (entry.layers, *shape)

    def check(self, abstract: AbstractModel) -> list[str]:
        """Compare names, shapes and dtypes with the model -> parameters that start fresh, as `allowed` asks.

        Raises CheckpointError with everything that does not fit.
        """
        wanted = dict(expected_tensors(self.table, abstract))
        names = self.tensors.names()
        ignored, unmatched = _matching(self.allowed.ignore_source, names)
        problems = [f"--ignore_source {pattern!r} matches no tensor" for pattern in unmatched]
        stored = {name for name in names if name not in ignored and not IGNORED_SOURCES.match(name)}
        absent = {name for name in wanted if name not in stored}
        missing = [entry.target for entry in self.table if _names(entry) <= absent]
        fresh, unmatched = _matching(self.allowed.init_missing, missing)
        problems += [
            f"--init_missing {pattern!r} matches no parameter that the checkpoint lacks"
            for pattern in unmatched
        ]
        fillable = {name for entry in self.table if entry.target in fresh for name in _names(entry)}
        problems += [
            f"missing tensor {name} {list(wanted[name])}"
            for name in wanted
            if name in absent - fillable
        ]
        problems += [
            f"unused tensor {name} {list(self.tensors.shape(name))}: no parameter of this model takes it"
            for name in sorted(stored - wanted.keys())
        ]
        for name in wanted:
            if name in stored and self.tensors.shape(name) != wanted[name]:
                problems.append(
                    f"tensor {name} has shape {list(self.tensors.shape(name))}, config.json implies "
                    f"{list(wanted[name])}"
                )
            if name in stored and self.tensors.dtype(name) not in FLOAT_TYPES:
                problems.append(
                    f"tensor {name} has dtype {self.tensors.dtype(name)}, expected one of "
                    f"{', '.join(FLOAT_TYPES)}"
                )
        if problems:
            raise CheckpointError(self.path, problems)
        return [path for path in missing if path in fresh]

    def check_sums(self) -> None:
        """Compare the files with their SHA-256 where it is known. Raises CheckpointError naming the damaged ones."""
        if checked := sum(folder.check_sums() for folder in self._folders):
            self.notes.append(f"SHA-256 compared, files as they should be: {checked}")

    def check_finite(self) -> None:
        """Raises CheckpointError for tensors read so far that hold NaN or infinity."""
        if self._not_finite:
            raise CheckpointError(
                self.path,
                [
                    f"tensor {name} holds {count} values that are NaN or infinite"
                    for name, count in self._not_finite.items()
                ],
            )

    def resize(self, image_size: int) -> None:
        """Fit the position table, and config, to another tile size (model.md 3); once, before training starts."""
        patch = self.config.vision.patch_size
        if image_size < patch or image_size % patch:
            raise ConfigError(
                f"image size {image_size} is not a multiple of the patch size {patch}"
            )
        (name,) = self.entries["vision.position_embedding"].sources(0)
        grid = image_size // patch
        self.tensors = Changed(
            self.tensors,
            {
                name: (
                    (1, 1 + grid**2, self.config.vision.width),
                    lambda array: np.asarray(resize_positions(jnp.asarray(array[0]), (grid, grid)))[
                        None
                    ],
                )
            },
        )
        tiles = dataclasses.replace(self.config.prompt.tiles, tile_size=image_size)
        self.config = dataclasses.replace(
            self.config,
            vision=dataclasses.replace(self.config.vision, image_size=image_size),
            prompt=dataclasses.replace(self.config.prompt, tiles=tiles),
        )
        self.notes.append(
            f"position table resized to {grid} x {grid} patches, image size {image_size}"
        )
        self.__dict__.pop("table", None)
        self.__dict__.pop("entries", None)

    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer, or None where it holds no tokenizer files."""
        return Tokenizer.load(self.path) if (self.path / "tokenizer.model").is_file() else None

    def write_side_files(self, folder: Path) -> list[str]:
        """config.json, tokenizer, remote code and what else PyTorch users need, into `folder` -> notes on them."""
        copy_side_files(self.path, folder)
        write_json(folder / "config.json", self.fields)
        if missing := missing_remote_code(self.fields, self.path):
            return [
                f"config.json names {', '.join(missing)}, which the folder does not hold: PyTorch users cannot load "
                "an export without them"
            ]
        return []

    def _read_layer(self, entry: Entry, layer: int, index: tuple[slice, ...]) -> np.ndarray:
        tensors = [self.tensors.read(name) for name in entry.sources(layer)]
        if entry.target in self._adapters:
            lora, adapter = self._adapters[entry.target]
            array = lora.merged(adapter, layer, entry.to_target(tensors))[index]
        else:
            array = entry.to_target(tensors, index)
        return array

    def _fill(self, entry: Entry, layer: int, target: np.ndarray, array: np.ndarray) -> None:
        """Cast one layer into its place; keep count of what the cast changes and of what is not finite."""
        copy_strided(target, array)
        if target.dtype != array.dtype:
            changed = changed_by_cast(array, target)
            self.rounded[entry.target] = self.rounded.get(entry.target, 0) + changed
        # A cast keeps NaN and infinity, and makes infinity of what is too large for it.
        if bad := count_not_finite(target):
            name = ", ".join(dict.fromkeys(entry.sources(layer)))
            self._not_finite[name] = self._not_finite.get(name, 0) + bad


class HFFolder(TorchCheckpoint):
    """A checkpoint folder: config.json with safetensors (or .bin) files, in any layout that is read.

    fields: internvl_chat fields that replace or complete those of config.json.
    image_size: of the tiles, where it shall not be the stored one.
    adapters: LoRA folders of peft, one part each.
    keep_lora: leave all adapters out of the weights; they are in `kept` then.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fields: Mapping[str, Any] | None = None,
        image_size: int | None = None,
        adapters: Sequence[Path] = (),
        keep_lora: bool = False,
        allowed: Allowed = Allowed(),
    ):
        path = Path(path)
        stored = read_config(path)
        if image_size is not None:
            fields = {**(fields or {}), "force_image_size": None}
        folder = open_tensors(path)
        tensors, lora_tensors = _plain_names(stored, folder)
        try:
            config = model_config(stored, tensors.names(), fields)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{path / 'config.json'}: {error}") from error
        if stored["model_type"] == "internvl":
            layout = "hf"
        else:
            layout = "internvl" if config.projector.kind == "mlp1" else "internvl-x"
        super().__init__(path, stored, layout, config, tensors, [folder], allowed)
        if image_size is not None:
            self.resize(image_size)
        found = _in_place(self, lora_tensors)
        found += [
            read_adapter_folder(each, self.table, layout, open_tensors(each, "adapter_model"))
            for each in adapters
        ]
        parts = [lora.config.part for lora in found]
        if len(set(parts)) < len(parts):
            raise ConfigError(
                f"{path}: two sets of adapters for one part ({', '.join(parts)}); merge one of them first"
            )
        self.kept: list[Lora] = found if keep_lora else []
        if not keep_lora:
            self.lora.extend(found)


def expected_tensors(
    table: Sequence[Entry], abstract: AbstractModel
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(tensor name, shape) of the checkpoint that `table` writes for `abstract`, in file order, without any weights."""
    yield from tensor_shapes(
        table, {path: leaf.shape for path, leaf in abstract.shapes.items()}
    ).items()


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder. Raises FileNotFoundError, or ConfigError naming the file."""
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: a Hugging Face checkpoint folder has one")
    return read_json_object(file)


def open_tensors(path: Path, stem: str = "model") -> SafetensorsFolder | BinFolder:
    """The weight files of a folder; safetensors come first. Raises CheckpointError."""
    has_safetensors = any(
        (path / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json")
    )
    pickled = stem if stem != "model" else "pytorch_model"
    if not has_safetensors and BinFolder.is_one(path, pickled):
        return BinFolder(path, pickled)
    return SafetensorsFolder(path, stem)


def _plain_names(config: Mapping[str, Any], folder: Tensors) -> tuple[ProtocolSpec, ProtocolSpec]:
    """(base weights, adapters) of a folder, without what nested spellings and peft put into the names."""
    stored = {}
    for name in folder.names():
        plain = name
        if config.get("model_type") == "internvl":
            prefix = next((prefix for prefix in NESTED if name.startswith(prefix)), None)
            plain = name if prefix is None else NESTED[prefix] + name.removeprefix(prefix)
        if plain in stored:
            raise CheckpointError(
                getattr(folder, "path", ""),
                [
                    f"tensors {stored[plain]} and {name} are the same one "
                    "in two spellings; remove one of them"
                ],
            )
        stored[plain] = name
    names = list(in_place_names(list(stored)))
    weights = {plain: (folder, stored[name]) for plain, name, is_adapter in names if not is_adapter}
    return ProtocolSpec(weights), ProtocolSpec(
        {plain: (folder, stored[name]) for plain, name, is_adapter in names if is_adapter}
    )


def _in_place(checkpoint: TorchCheckpoint, tensors: ProtocolSpec) -> list[Lora]:
    """Adapters that a training run with LoRA has left in the checkpoint; alpha is twice the rank there."""
    found, problems = [], []
    for part, field in (("vision", "use_backbone_lora"), ("decoder", "use_llm_lora")):
        prefix = part_prefixes(checkpoint.layout)[part]
        own = tensors.starting_with(prefix)
        rank = checkpoint.fields.get(field) or 0
        if bool(rank) != bool(own.names()):
            problems.append(
                f"config.json: {field} is {rank}, but the checkpoint holds {len(own.names())} LoRA tensors "
                f"under {prefix}"
            )
        elif rank:
            config = LoraConfig(part=part, rank=rank, alpha=2 * rank)
            adapters, wrong = find_adapters(checkpoint.table, config, own)
            problems += wrong
            found.append(Lora(config, tuple(adapters), own))
    if problems:
        raise CheckpointError(checkpoint.path, problems)
    return found


def _names(entry: Entry) -> set[str]:
    return {name for layer in range(entry.layers or 1) for name in entry.sources(layer)}


def _matching(patterns: Sequence[str], names: Sequence[str]) -> tuple[set[str], list[str]]:
    """(names that any pattern matches, patterns that match none). Raises ConfigError for a malformed pattern."""
    matched, unmatched = set(), []
    for pattern in patterns:
        try:
            found = {name for name in names if re.match(pattern, name)}
        except re.error as error:
            raise ConfigError(f"{pattern!r} is not a regular expression ({error})") from error
        matched |= found
        if not found:
            unmatched.append(pattern)
    return matched, unmatched
