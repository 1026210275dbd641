"""Reading run folders (checkpoints/run_format.py describes what they hold)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from internvlx_jax.checkpoints import run_format
from internvlx_jax.checkpoints.adapters import Adapter, merge_params, stored_adapters
from internvlx_jax.checkpoints.agreement import on_first_process
from internvlx_jax.checkpoints.run_format import (
    find_average,
    finished_steps,
    free_cycles,
    mismatches,
)
from internvlx_jax.checkpoints.side_files import replace_tokenizer, same_tokenizer
from internvlx_jax.checkpoints.tensors import HostArray, SplitArray, difference
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.core.overrides import from_dict
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.remote import explained, protocol_of
from internvlx_jax.core.uploads import copy_tree, local_folder
from internvlx_jax.models.lora import is_adapter
from internvlx_jax.models.params import AbstractModel
from internvlx_jax.models.sharding import replicated, spread_sharding


def saved_metadata(run: Path) -> dict[str, Any]:
    """Returns the metadata of a run's newest step: the position in its `data`, its `clocks`.

    Empty for a run without a step.
    """
    steps = on_first_process(lambda: finished_steps(run))
    if not steps:
        return {}
    newest = run / "checkpoints" / str(steps[-1])
    with explained(newest):
        return _custom_metadata(ocp.checkpointables_metadata(_readable(newest)))


class RunFolder:
    """Reads the newest step of a run folder, or the step given as RUN/checkpoints/STEP.

    Attributes:
        run: the run folder.
        step: updates that led to the parameters.
        path: RUN/checkpoints/STEP.
        shapes: dotted path -> shape and dtype of every stored parameter, adapters included.
        metadata: configs and the position in the data.
        config: the model.
        lora: configs of the adapters that are stored beside the weights.
    """

    def __init__(self, path: str | Path, *, ema: bool = False):
        """Opens a step; no parameter is read.

        Args:
            path: run folder, or one step of it.
            ema: read the average of the trained parameters in their place.

        Raises:
            FileNotFoundError: no complete step there.
            ConfigError: the run kept no average.
        """
        path = as_path(path).resolve()
        self.run = path.parents[1] if path.parent.name == "checkpoints" else path
        self.step = _find_step(self.run, None if path == self.run else path)
        self.path = self.run / "checkpoints" / str(self.step)
        with explained(self.path):
            self._stored = _readable(self.path)
            stored = ocp.checkpointables_metadata(self._stored)
        self._items: Mapping[str, Any] = stored.metadata
        self._item = "params" if "params" in self._items else "state"
        self.shapes: Mapping[str, Any] = self._items[self._item]
        self.metadata: Mapping[str, Any] = _custom_metadata(stored)
        self.config = from_dict(ModelConfig, self.metadata["model"])
        self.lora = tuple(from_dict(LoraConfig, each) for each in self.metadata.get("lora", ()))
        self._average = find_average(self._items) if ema else None
        if ema and self._average is None:
            raise ConfigError(
                f"{self.path}: the run kept no average of its parameters (optimizer.ema_decay)"
            )

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder is a run folder, or is named as a step of one."""
        if (path / "checkpoints").is_dir():
            return True
        # A Hugging Face folder may be kept in a folder named checkpoints, too.
        return path.resolve().parent.name == "checkpoints" and not (path / "config.json").is_file()

    def load(
        self, abstract: AbstractModel, shardings: Mapping[str, Sharding]
    ) -> dict[str, jax.Array]:
        """Loads all parameters; see `Checkpoint.load`.

        Adapters that `abstract` has no place for are merged into the weights.
        """
        leaves = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
            for path, leaf in abstract.shapes.items()
        }
        self.check(abstract)
        merged = self._merged(abstract)
        for path in merged:
            sharding = next(iter(shardings.values()))
            assert isinstance(sharding, NamedSharding)  # load is given a mesh
            whole = replicated(sharding.mesh)
            leaves[path] = jax.ShapeDtypeStruct(self.shape(path), np.float32, sharding=whole)
        params = ocp.load_checkpointables(self._stored, {self._item: leaves})[self._item]
        params |= self._load_averages(params)
        if not merged:
            return params
        adapters = {path: params.pop(path) for path in merged}
        merge = jax.jit(
            lambda params, adapters: merge_params(params | adapters, self.config, self.lora),
            donate_argnums=0,
            out_shardings={path: shardings[path] for path in params},
        )
        return merge(params, adapters)

    def check(self, abstract: AbstractModel) -> list[str]:
        """Compares names and shapes with a model; see `Checkpoint.check`. Nothing starts fresh."""
        merged = self._merged(abstract)
        stored = {path: leaf for path, leaf in self.shapes.items() if path not in merged}
        problems = mismatches("params", stored, abstract.shapes)
        if problems:
            raise CheckpointError(self.path, problems)
        return []

    def _merged(self, abstract: AbstractModel) -> set[str]:
        """Returns the paths of the adapters that a model has no place for."""
        return {
            path
            for path in self.shapes
            if self.lora and is_adapter(path) and path not in abstract.shapes
        }

    def _load_averages(self, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Loads the averages in the place and dtype of `params`."""
        averages = self._averages_like(
            {
                path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
                for path, array in params.items()
            }
        )
        # Where the first layers of a stack are frozen, only the others have an average.
        return {
            path: average
            if average.shape == params[path].shape
            else params[path].at[-average.shape[0] :].set(average)
            for path, average in averages.items()
        }

    def _averages_like(self, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Loads the averages of some parameters, in the dtypes and places of `leaves`."""
        if self._average is None:
            return {}
        item, names = self._average.item, self._average.names
        stored = self._items[item]
        wanted = {
            names[path]: jax.ShapeDtypeStruct(
                stored[names[path]].shape, leaf.dtype, sharding=leaf.sharding
            )
            for path, leaf in leaves.items()
            if path in names
        }
        if not wanted:
            return {}
        with _partial_loading():
            loaded = ocp.load_checkpointables(self._stored, {item: wanted})[item]
        return {path: loaded[names[path]] for path in leaves if path in names}

    def read(self, path: str) -> np.ndarray:
        """Reads one parameter in its stored dtype."""
        ((_, array),) = self.read_all([path])
        return np.asarray(array)

    def read_all(self, paths: Iterable[str]) -> Iterator[tuple[str, HostArray]]:
        """Reads parameters in the given order, as (dotted path, array in its stored dtype).

        Large ones are read one at a time, as a SplitArray.

        Raises:
            CheckpointError: a file is damaged.
        """
        group: list[str] = []
        size = 0
        for path in paths:
            nbytes = self._nbytes(path)
            if group and size + nbytes > run_format.GROUP_BYTES:
                yield from self._read_group(group)
                group, size = [], 0
            group.append(path)
            size += nbytes
        if group:
            yield from self._read_group(group)

    def _read_group(self, paths: list[str]) -> Iterator[tuple[str, HostArray]]:
        arrays = self._read_together(paths)
        for path in paths:  # the caller may be done with one array before it takes the next
            yield path, arrays.pop(path)

    def _read_together(self, paths: list[str]) -> dict[str, HostArray]:
        """Reads a few small parameters, or a large one, onto the host."""
        one_device = SingleDeviceSharding(jax.local_devices()[0])
        large = {path for path in paths if self._nbytes(path) > run_format.GROUP_BYTES}
        leaves = {
            path: jax.ShapeDtypeStruct(
                self.shape(path),
                self.dtype(path),
                sharding=spread_sharding(self.shape(path)) if path in large else one_device,
            )
            for path in paths
        }
        shards = [
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in leaves.values()
        ]
        free_cycles(sum(shards))
        try:
            with _partial_loading(max(*shards, run_format.GROUP_BYTES) + 1):
                loaded = ocp.load_checkpointables(self._stored, {self._item: leaves})[self._item]
        except (ValueError, OSError) as error:
            raise CheckpointError(
                self.path, [f"{', '.join(paths)} cannot be read ({error}); restore the folder"]
            ) from error
        arrays: dict[str, HostArray] = {}
        for path in paths:
            array = loaded.pop(path)
            arrays[path] = SplitArray(array) if path in large else np.asarray(array)
        return arrays | self._read_averages(arrays)

    def _read_averages(self, arrays: Mapping[str, HostArray]) -> dict[str, np.ndarray]:
        """Reads the averages of some parameters onto the host, in the stored dtypes."""
        one_device = SingleDeviceSharding(jax.local_devices()[0])
        averages = self._averages_like(
            {
                path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=one_device)
                for path, array in arrays.items()
            }
        )
        return {
            path: np.asarray(average)
            if average.shape == arrays[path].shape
            else np.concatenate([np.asarray(arrays[path])[: -len(average)], average])
            for path, average in averages.items()
        }

    def differences(self, path: str, found: HostArray) -> list[str]:
        """Describes where an array is not, bit for bit, this parameter."""
        return difference(path, self.read(path), np.asarray(found))

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of one parameter."""
        return tuple(self.shapes[path].shape)

    def dtype(self, path: str) -> np.dtype:
        """Returns the stored dtype of one parameter."""
        return np.dtype(self.shapes[path].dtype)

    def _nbytes(self, path: str) -> int:
        return math.prod(self.shape(path)) * self.dtype(path).itemsize

    def separate_adapters(self) -> list[tuple[LoraConfig, list[Adapter]]]:
        """Returns the adapters that are stored beside the weights, by part."""
        return [(lora, stored_adapters(self.config, lora.part, self.shapes)) for lora in self.lora]

    def check_sums(self) -> list[str]:
        """Returns no notes: orbax compares its own checksums whenever it reads."""
        return []

    @property
    def fields(self) -> dict[str, Any] | None:
        """config.json of the PyTorch checkpoint that the run began with, if any."""
        file = self.run / "source" / "config.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def write_side_files(self, folder: Path) -> list[str]:
        """Writes small files into `folder`.

        They are those of the PyTorch checkpoint that the run began with, and the run's tokenizer.
        """
        source, tokenizer = self.run / "source", self.run / "tokenizer"
        if source.is_dir():
            copy_tree(source, folder)
        if not same_tokenizer(source, tokenizer):
            replace_tokenizer(tokenizer, folder)
        return []

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the run's tokenizer; empty where an imported checkpoint had none."""
        return self.run / "tokenizer"


def _readable(step: Path) -> str:
    """Returns where orbax can read a step; one in s3:// is fetched to the disk."""
    return str(local_folder(step) if protocol_of(step) == "s3" else step)


def _custom_metadata(stored: ocp.CheckpointMetadata) -> dict[str, Any]:
    """Returns what CheckpointWriter and ParamsWriter stored beside the arrays."""
    assert isinstance(stored.custom_metadata, dict)  # JSON of any kind, as orbax declares it
    return dict(stored.custom_metadata)


def _find_step(run: Path, wanted: Path | None) -> int:
    """Returns the step named by `wanted`, or the newest. Raises FileNotFoundError."""
    steps = on_first_process(lambda: finished_steps(run))
    if not steps:
        raise FileNotFoundError(
            f"{run / 'checkpoints'} holds no finished checkpoint; let the run reach its first save "
            "(save_every)"
        )
    if wanted is None:
        return steps[-1]
    if wanted.name not in map(str, steps):
        raise FileNotFoundError(
            f"{wanted}: no finished checkpoint; the steps there are {', '.join(map(str, steps))}"
        )
    return int(wanted.name)


def _partial_loading(read_concurrent_bytes: int | None = None) -> ocp.Context:
    """Returns the orbax context that loads some arrays of an item."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    if read_concurrent_bytes is not None:
        context.memory.read_concurrent_bytes = read_concurrent_bytes
    return context
