"""A Hugging Face folder -> our parameters, strict about every name, shape and dtype (spec: checkpoints.md 6, 8)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Sharding

from internvlx_jax.convert.hf_config import model_config
from internvlx_jax.convert.names import IGNORED_SOURCES, Entry, name_table
from internvlx_jax.convert.safetensors_folder import FLOAT_TYPES, SafetensorsFolder
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.errors import CheckpointError, ConfigError
from internvlx_jax.models.config import ModelConfig
from internvlx_jax.models.params import AbstractModel


class HFFolder:
    """config.json and safetensors of one checkpoint; `config` is the model it describes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        config_file = self.path / "config.json"
        if not config_file.is_file():
            raise FileNotFoundError(f"{config_file} not found: a Hugging Face checkpoint folder has one")
        self.tensors = SafetensorsFolder(self.path)
        try:
            self.config: ModelConfig = model_config(json.loads(config_file.read_text()), self.tensors.names())
        except (json.JSONDecodeError, ConfigError, ValueError) as error:
            raise ConfigError(f"{config_file}: {error}") from error

    def load(self, abstract: AbstractModel, shardings: dict[str, Sharding] | None = None) -> dict[str, jax.Array]:
        """Parameters by dotted path, in the dtypes of `abstract`, each placed as its sharding says.

        One parameter at a time is in host memory. Raises CheckpointError listing every unused tensor, unfilled
        parameter, and shape or dtype mismatch, before anything is read.
        """
        table = name_table(self.config)
        self._check(table, abstract)
        params = {}
        for entry in table:
            leaf = abstract.shapes[entry.target]
            array = self._read(entry, leaf)
            if shardings is None:
                params[entry.target] = jax.numpy.asarray(array)
            else:
                params[entry.target] = jax.make_array_from_callback(leaf.shape, shardings[entry.target],
                                                                    lambda index: array[index])
        return params

    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer, or None where it holds no tokenizer files."""
        return Tokenizer.load(self.path) if (self.path / "tokenizer.model").is_file() else None

    def _read(self, entry: Entry, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if entry.layers is None:
            return np.asarray(self._read_layer(entry, 0), leaf.dtype, order="C")
        stack = np.empty(leaf.shape, leaf.dtype)
        for layer in range(entry.layers):
            stack[layer] = self._read_layer(entry, layer)
        return stack

    def _read_layer(self, entry: Entry, layer: int) -> np.ndarray:
        return entry.to_target([self.tensors.read(name) for name in entry.sources(layer)])

    def _check(self, table: list[Entry], abstract: AbstractModel) -> None:
        wanted = dict(expected_tensors(table, abstract))
        stored = {name for name in self.tensors.names() if not IGNORED_SOURCES.match(name)}
        problems = [f"missing tensor {name} {list(shape)}" for name, shape in wanted.items() if name not in stored]
        problems += [f"unused tensor {name} {list(self.tensors.shape(name))}: no parameter of this model takes it"
                     for name in sorted(stored - wanted.keys())]
        for name in wanted.keys() & stored:
            if self.tensors.shape(name) != wanted[name]:
                problems.append(f"tensor {name} has shape {list(self.tensors.shape(name))}, config.json implies "
                                f"{list(wanted[name])}")
            if self.tensors.dtype(name) not in FLOAT_TYPES:
                problems.append(f"tensor {name} has dtype {self.tensors.dtype(name)}, expected one of "
                                f"{', '.join(FLOAT_TYPES)}")
        if problems:
            raise CheckpointError(self.path, problems)


def expected_tensors(table: list[Entry], abstract: AbstractModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(tensor name, shape) of the checkpoint that `table` writes for `abstract`, without any weights."""
    for entry in table:
        leaf = abstract.shapes[entry.target]
        layer = jax.ShapeDtypeStruct(leaf.shape[0 if entry.layers is None else 1 :], leaf.dtype)
        shapes = [source.shape for source in jax.eval_shape(entry.to_sources, layer)]
        for number in range(entry.layers or 1):
            yield from zip(entry.sources(number), shapes)
