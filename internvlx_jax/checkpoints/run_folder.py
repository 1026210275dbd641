"""Reading run folders (checkpoints/run_format.py says what they hold)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import Sharding

from internvlx_jax.checkpoints import run_format
from internvlx_jax.checkpoints.lora_files import merge_params
from internvlx_jax.checkpoints.run_format import collect, mismatches
from internvlx_jax.checkpoints.side_files import replace_tokenizer, same_tokenizer
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.core.overrides import from_dict
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.lora import is_adapter
from internvlx_jax.models.params import AbstractModel
from internvlx_jax.models.sharding import replicated, spread_sharding


def saved_metadata(run: Path) -> dict[str, Any]:
    """Of the newest checkpoint of a run: the position in its `data`, its `clocks`; empty without a checkpoint."""
    steps = [int(step.name) for step in (run / "checkpoints").glob("[0-9]*") if step.name.isdigit()]
    return (
        dict(ocp.checkpointables_metadata(run / "checkpoints" / str(max(steps))).custom_metadata)
        if steps
        else {}
    )


class SplitArray:
    """An array on the host in parts of its leading dim, which it gives row by row; np.asarray joins (and copies) them.

    Large parameters are read so: orbax holds every part twice for a moment, and joining would double the whole.
    """

    def __init__(self, array: jax.Array):
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        self._parts = [np.asarray(shard.data) for shard in shards]
        self.shape, self.dtype = array.shape, array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        part, rest = divmod(row, len(self._parts[0]))
        return self._parts[part][rest]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)


class RunFolder:
    """The newest step of a run folder, or one step given as RUN/checkpoints/STEP.

    ema: load the average of the trained parameters in their place. Raises ConfigError for a run that kept none.
    """

    def __init__(self, path: str | Path, *, ema: bool = False):
        path = Path(path).resolve()
        self.run = path.parents[1] if path.parent.name == "checkpoints" else path
        steps = sorted(
            int(step.name) for step in (self.run / "checkpoints").iterdir() if step.name.isdigit()
        )
        if not steps:
            raise FileNotFoundError(f"{self.run / 'checkpoints'} holds no finished checkpoint")
        if path != self.run and path.name not in map(str, steps):
            raise FileNotFoundError(
                f"{path}: no finished checkpoint; the steps there are {', '.join(map(str, steps))}"
            )
        self.step = int(path.name) if path != self.run else steps[-1]
        self.path = self.run / "checkpoints" / str(self.step)
        self._stored = ocp.checkpointables_metadata(self.path)
        self._item = "params" if "params" in self._stored.metadata else "state"
        self.shapes: Mapping[str, Any] = self._stored.metadata[self._item]
        self.metadata: Mapping[str, Any] = self._stored.custom_metadata
        self.config = from_dict(ModelConfig, self.metadata["model"])
        self.lora = tuple(from_dict(LoraConfig, each) for each in self.metadata.get("lora", ()))

        stored = self._stored.metadata.get("opt_state", {})
        self._averages = (
            {name.split("['")[1][:-2]: name for name in stored if ".ema['" in name} if ema else {}
        )
        if ema and not self._averages:
            raise ConfigError(
                f"{self.path}: the run kept no average of its parameters (optimizer.ema_decay)"
            )

    @staticmethod
    def is_one(path: Path) -> bool:
        return (path / "checkpoints").is_dir() or path.resolve().parent.name == "checkpoints"

    def load(
        self, abstract: AbstractModel, shardings: Mapping[str, Sharding]
    ) -> dict[str, jax.Array]:
        """Parameters by dotted path, cast to the dtypes of `abstract`. Raises CheckpointError with every mismatch.

        Adapters that `abstract` has no place for are merged into the weights.
        """
        leaves = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
            for path, leaf in abstract.shapes.items()
        }
        self.check(abstract)
        merged = self._merged(abstract)
        for path in merged:
            whole = replicated(next(iter(shardings.values())).mesh)
            leaves[path] = jax.ShapeDtypeStruct(self.shape(path), np.float32, sharding=whole)
        params = ocp.load_checkpointables(self.path, {self._item: leaves})[self._item]
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

    def check(self, abstract: AbstractModel) -> None:
        """Raises CheckpointError with every parameter whose name or shape is not the model's."""
        merged = self._merged(abstract)
        stored = {path: leaf for path, leaf in self.shapes.items() if path not in merged}
        problems = mismatches("params", stored, abstract.shapes)
        if problems:
            raise CheckpointError(self.path, problems)

    def _load_averages(self, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """In the place and dtype of `params`. Of a stack whose first layers are frozen, the others have an average."""
        stored = self._stored.metadata["opt_state"] if self._averages else {}
        leaves = {
            name: jax.ShapeDtypeStruct(
                stored[name].shape, params[path].dtype, sharding=params[path].sharding
            )
            for path, name in self._averages.items()
        }
        if not leaves:
            return {}
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = ocp.load_checkpointables(self.path, {"opt_state": leaves})["opt_state"]
        return {
            path: params[path].at[-stored[name].shape[0] :].set(loaded[name])
            if params[path].shape != stored[name].shape
            else loaded[name]
            for path, name in self._averages.items()
        }

    def _merged(self, abstract: AbstractModel) -> set[str]:
        return {
            path
            for path in self.shapes
            if self.lora and is_adapter(path) and path not in abstract.shapes
        }

    def read(self, path: str) -> np.ndarray:
        """One parameter as it is stored."""
        ((_, array),) = self.read_all([path])
        return np.asarray(array)

    def read_all(self, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray | SplitArray]]:
        """(path, parameter as it is stored) in the given order; large ones one at a time, as a SplitArray.

        Raises CheckpointError when a file is damaged.
        """
        group: list[str] = []
        size = 0
        for path in [*paths, None]:
            nbytes = 0 if path is None else math.prod(self.shape(path)) * self.dtype(path).itemsize
            if group and (path is None or size + nbytes > run_format.GROUP_BYTES):
                arrays = self._read_group(group)
                while group:  # the caller may be done with one array before it takes the next
                    path_read = group.pop(0)
                    yield path_read, arrays.pop(path_read)
                size = 0
            if path is not None:
                group.append(path)
                size += nbytes

    def _read_group(self, paths: list[str]) -> dict[str, np.ndarray | SplitArray]:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        large = {
            path
            for path in paths
            if math.prod(self.shape(path)) * self.dtype(path).itemsize > run_format.GROUP_BYTES
        }
        leaves = {
            path: jax.ShapeDtypeStruct(
                self.shape(path),
                self.dtype(path),
                sharding=(spread_sharding(self.shape(path)) if path in large else sharding),
            )
            for path in paths
        }
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        shards = [
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in leaves.values()
        ]
        context.memory.read_concurrent_bytes = max(*shards, run_format.GROUP_BYTES) + 1
        collect(sum(shards))
        try:
            with context:
                loaded = ocp.load_checkpointables(self.path, {self._item: leaves})[self._item]
        except (ValueError, OSError) as error:
            raise CheckpointError(
                self.path, [f"{', '.join(paths)} cannot be read ({error}); restore the folder"]
            ) from error
        arrays = {
            path: (SplitArray if path in large else np.asarray)(loaded.pop(path)) for path in paths
        }
        return arrays | self._read_averages(arrays)

    def _read_averages(
        self, arrays: Mapping[str, np.ndarray | SplitArray]
    ) -> dict[str, np.ndarray]:
        """On the host; see _load_averages."""
        stored = self._stored.metadata.get("opt_state", {})
        names = {path: self._averages[path] for path in arrays if path in self._averages}
        if not names:
            return {}
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        leaves = {
            name: jax.ShapeDtypeStruct(stored[name].shape, self.dtype(path), sharding=sharding)
            for path, name in names.items()
        }
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = ocp.load_checkpointables(self.path, {"opt_state": leaves})["opt_state"]
        return {
            path: np.concatenate([np.asarray(arrays[path])[: -len(loaded[name])], loaded[name]])
            if arrays[path].shape != loaded[name].shape
            else np.asarray(loaded[name])
            for path, name in names.items()
        }

    def shape(self, path: str) -> tuple[int, ...]:
        return tuple(self.shapes[path].shape)

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(self.shapes[path].dtype)

    @property
    def fields(self) -> dict[str, Any] | None:
        """config.json of the PyTorch checkpoint that this one began with, if it did."""
        file = self.run / "source" / "config.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def write_side_files(self, folder: Path) -> list[str]:
        """The small files of that PyTorch checkpoint, and this run's tokenizer, into `folder`."""
        source, tokenizer = self.run / "source", self.run / "tokenizer"
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True)
        if not same_tokenizer(source, tokenizer):
            replace_tokenizer(tokenizer, folder)
        return []

    def tokenizer(self) -> Tokenizer | None:
        """The run's tokenizer, or None where an imported checkpoint had none."""
        folder = self.run / "tokenizer"
        return Tokenizer.load(folder) if (folder / "tokenizer.model").is_file() else None
