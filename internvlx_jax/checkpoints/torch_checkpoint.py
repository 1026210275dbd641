"""Parameters from tensors under PyTorch names (design: checkpoints.md 6, 8).

Strict about every name, shape, dtype and value: nothing is skipped, renamed or filled in silently.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding

from internvlx_jax.checkpoints.adapters import Adapter, Lora
from internvlx_jax.checkpoints.name_entries import Entry, tensor_shapes
from internvlx_jax.checkpoints.name_table import IGNORED_SOURCES
from internvlx_jax.checkpoints.safetensors_folder import FLOAT_TYPES
from internvlx_jax.checkpoints.side_files import copy_side_files, missing_remote_code
from internvlx_jax.checkpoints.tensors import (
    HostArray,
    Tensors,
    changed_by_cast,
    copy_strided,
    count_not_finite,
    difference,
)
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.models.params import AbstractModel, init_params

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allowed:
    """What may differ between a checkpoint and its model.

    Attributes:
        ignore_source: tensors that are not read, as regular expressions that match from the
            beginning of a name.
        init_missing: parameters that start fresh where the checkpoint has no tensor for them, as
            regular expressions over dotted paths.
        seed: seed of the fresh parameters.
    """

    ignore_source: tuple[str, ...] = ()
    init_missing: tuple[str, ...] = ()
    seed: int = 0


STRICT = Allowed()


class WeightFiles(Protocol):
    """The files that a checkpoint's tensors come from, as reports speak of them."""

    notes: list[str]

    def check_sums(self) -> int:
        """Compares the files with their SHA-256; returns how many had one."""
        ...


class TorchCheckpoint:
    """Tensors under their PyTorch names, with the config they belong to.

    Attributes:
        path: the folder that messages name, and that holds the side files.
        fields: the parsed config.json.
        layout: internvl-x, internvl or hf.
        config: the model.
        table: the name table of `config` and `layout`.
        tensors: base weights, under the names of `layout`.
        allowed: what may differ between the tensors and the model.
        lora: adapters that are merged into the weights as they are read.
        notes: what a report should mention.
        rounded: dotted path -> how many values a cast has changed in the reads so far.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, Any],
        layout: str,
        config: ModelConfig,
        table: Sequence[Entry],
        tensors: Tensors,
        folders: Sequence[WeightFiles],
        *,
        allowed: Allowed = STRICT,
        lora: Sequence[Lora] = (),
        notes: Sequence[str] = (),
    ):
        self.path, self.fields, self.layout, self.config = path, fields, layout, config
        self.table, self.tensors, self.allowed, self._folders = table, tensors, allowed, folders
        self.lora = tuple(lora)
        self.notes = [*(note for folder in folders for note in folder.notes), *notes]
        self.rounded: dict[str, int] = {}
        self._not_finite: dict[str, int] = {}

    @functools.cached_property
    def entries(self) -> dict[str, Entry]:
        """The entry of each parameter, by dotted path."""
        return {entry.target: entry for entry in self.table}

    @functools.cached_property
    def _adapters(self) -> dict[str, tuple[Lora, Adapter]]:
        """The adapters that are merged, by the path of the parameter that they change."""
        return {
            adapter.base.target: (lora, adapter) for lora in self.lora for adapter in lora.adapters
        }

    def load(
        self, abstract: AbstractModel, shardings: Mapping[str, Sharding]
    ) -> dict[str, jax.Array]:
        """Loads all parameters; see `Checkpoint.load`.

        A process reads the slices of its own devices only, one parameter at a time. Names, shapes
        and dtypes are checked before anything is read; values that are not finite are reported
        after all is read.
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
        """Places one parameter; a slice that several devices of this process hold is read once."""
        read = functools.cache(
            lambda bounds: self.read(path, leaf.dtype, tuple(slice(*each) for each in bounds))
        )
        return jax.make_array_from_callback(
            leaf.shape,
            sharding,
            lambda index: read(
                tuple(
                    each.indices(size)[:2]
                    for each, size in zip(index or (), leaf.shape, strict=True)
                )
            ),
        )

    def read(
        self, path: str, dtype: np.dtype | None = None, index: Index | None = None
    ) -> np.ndarray:
        """Reads one parameter with its adapters merged.

        Args:
            path: dotted path.
            dtype: what to cast to; None keeps the stored dtype.
            index: which slice of the parameter to read; None is all of it.
        """
        entry = self.entries[path]
        dtype = self.dtype(path) if dtype is None else np.dtype(dtype)
        index = index or ()
        if entry.layers is None:
            array = self._read_layer(entry, 0, index)
            result = _aligned_empty(array.shape, dtype)
            self._fill(entry, 0, result, array)
            return result
        layers = range(entry.layers)[index[0]] if index else range(entry.layers)
        first = self._read_layer(entry, layers[0], index[1:])
        stack = _aligned_empty((len(layers), *first.shape), dtype)
        for n, layer in enumerate(layers):
            array = first if n == 0 else self._read_layer(entry, layer, index[1:])
            self._fill(entry, layer, stack[n], array)
        return stack

    def read_all(self, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Reads parameters one at a time, as (dotted path, array in its stored dtype)."""
        return ((path, self.read(path)) for path in paths)

    def differences(self, path: str, found: HostArray) -> list[str]:
        """Describes where an array is not, bit for bit, this parameter in the array's dtype.

        A stack is read and compared layer by layer.
        """
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
        """Returns the smallest dtype that holds all tensors of a parameter exactly."""
        kinds = {FLOAT_TYPES[self.tensors.dtype(name)] for name in self.entries[path].sources()}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of a parameter, from those of its tensors."""
        entry = self.entries[path]
        placeholders = [
            np.broadcast_to(np.uint8(0), self.tensors.shape(name)) for name in entry.sources(0)
        ]
        shape = entry.to_target(placeholders).shape
        return shape if entry.layers is None else (entry.layers, *shape)

    def check(self, abstract: AbstractModel) -> list[str]:
        """Compares names, shapes and dtypes with a model; see `Checkpoint.check`."""
        wanted = expected_tensors(self.table, abstract)
        names = self.tensors.names()
        ignored, unmatched = _matching(self.allowed.ignore_source, names)
        problems = [f"--ignore_source {pattern!r} matches no tensor" for pattern in unmatched]
        stored = {name for name in names if name not in ignored and not IGNORED_SOURCES.match(name)}
        absent = {name for name in wanted if name not in stored}
        missing = [entry.target for entry in self.table if absent.issuperset(entry.sources())]
        fresh, unmatched = _matching(self.allowed.init_missing, missing)
        problems += [
            f"--init_missing {pattern!r} matches no parameter that the checkpoint lacks"
            for pattern in unmatched
        ]
        fillable = {
            name for entry in self.table if entry.target in fresh for name in entry.sources()
        }
        problems += [
            f"missing tensor {name} {list(wanted[name])}{self._remedy(name)}"
            for name in wanted
            if name in absent - fillable
        ]
        problems += [
            f"unused tensor {name} {list(self.tensors.shape(name))}: no parameter of this model "
            "takes it"
            for name in sorted(stored - wanted.keys())
        ]
        problems += self._wrong_types({name: wanted[name] for name in wanted if name in stored})
        if problems:
            raise CheckpointError(self.path, problems)
        return [path for path in missing if path in fresh]

    def _remedy(self, name: str) -> str:
        """Says what to do about a missing output head: nothing else has a second home."""
        if "decoder.head" not in self.entries or name not in self.entries["decoder.head"].sources(
            0
        ):
            return ""
        part = "text_config" if self.layout == "hf" else "llm_config"
        return (
            f"; if the output is tied to the embedding, set {part}.tie_word_embeddings to true in "
            f"config.json, or give --field {part}.tie_word_embeddings=true"
        )

    def _wrong_types(self, wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """Describes the stored tensors whose shape or dtype is not the wanted one."""
        for name, shape in wanted.items():
            if self.tensors.shape(name) != shape:
                yield (
                    f"tensor {name} has shape {list(self.tensors.shape(name))}, config.json "
                    f"implies {list(shape)}"
                )
            if self.tensors.dtype(name) not in FLOAT_TYPES:
                yield (
                    f"tensor {name} has dtype {self.tensors.dtype(name)}, expected one of "
                    f"{', '.join(FLOAT_TYPES)}"
                )

    def check_sums(self) -> list[str]:
        """Compares the files with their SHA-256 where it is known; see `Checkpoint.check_sums`."""
        checked = sum(folder.check_sums() for folder in self._folders)
        return [f"SHA-256 compared, files as they should be: {checked}"] if checked else []

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

    def separate_adapters(self) -> list[tuple[LoraConfig, list[Adapter]]]:
        """Returns none: adapters are merged as the weights are read."""
        return []

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer files: the checkpoint's own."""
        return self.path

    def write_side_files(self, folder: Path) -> list[str]:
        """Writes config.json, tokenizer, remote code and other small files into `folder`.

        Returns:
            Notes for a report.
        """
        copy_side_files(self.path, folder)
        write_json(folder / "config.json", self.fields)
        if missing := missing_remote_code(self.fields, self.path):
            return [
                f"config.json names {', '.join(missing)}, which the folder does not hold: PyTorch "
                "users cannot load an export without them"
            ]
        return []

    def _read_layer(self, entry: Entry, layer: int, index: Index) -> np.ndarray:
        tensors = [self.tensors.read(name) for name in entry.sources(layer)]
        if entry.target in self._adapters:
            lora, adapter = self._adapters[entry.target]
            return lora.merged(adapter, layer, entry.to_target(tensors))[index]
        return entry.to_target(tensors, index)

    def _fill(self, entry: Entry, layer: int, target: np.ndarray, array: np.ndarray) -> None:
        """Casts one layer into its place; counts changed values and values that are not finite."""
        copy_strided(target, array)
        if target.dtype != array.dtype:
            changed = changed_by_cast(array, target)
            self.rounded[entry.target] = self.rounded.get(entry.target, 0) + changed
        # A cast keeps NaN and infinity, and turns what is too large for it into infinity.
        if bad := count_not_finite(target):
            name = ", ".join(dict.fromkeys(entry.sources(layer)))
            self._not_finite[name] = self._not_finite.get(name, 0) + bad


def expected_tensors(table: Sequence[Entry], abstract: AbstractModel) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the checkpoint that `table` writes for a model, in file order."""
    return tensor_shapes(table, {path: leaf.shape for path, leaf in abstract.shapes.items()})


def _matching(patterns: Sequence[str], names: Sequence[str]) -> tuple[set[str], list[str]]:
    """Returns (names that any pattern matches, patterns that match none). Raises ConfigError."""
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


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array that jax takes without a copy.

    On CPU, jax copies arrays that do not begin at a multiple of 64 bytes.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)
