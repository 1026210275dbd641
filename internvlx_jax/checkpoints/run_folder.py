"""Run folders: what a training run leaves behind and how it is read again (spec: training.md 10, platform.md 5).

    RUN/config.json            resolved run config and model config
    RUN/tokenizer/             tokenizer files, so that the folder stands alone
    RUN/source/                small files of the PyTorch checkpoint that the run began with, for its export
    RUN/metrics.jsonl, tensorboard/
    RUN/checkpoints/STEP/      orbax: `params` and `opt_state` as separate items, by dotted path; its metadata holds
                               the configs again and the position in the data

orbax writes a step aside and renames it, so a step that is there is complete. An imported checkpoint (convert/import_hf.py)
is such a folder with one step, 0: parameters only, in orbax's item for a single tree.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from internvlx_jax.checkpoints.lora_files import merge_params
from internvlx_jax.checkpoints.side_files import replace_tokenizer, same_tokenizer
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.core.overrides import from_dict
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.lora import is_adapter
from internvlx_jax.models.params import AbstractModel
from internvlx_jax.models.sharding import replicated, spread, spread_sharding

# Settings that a resumed run may change: none of them touches what is computed.
MAY_CHANGE = {
    "train.output_dir",
    "train.mesh",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_last",
    "train.compute.remat",
    "train.data.num_workers",
    "train.data.val_meta",
    "train.data.index_dir",
    "train.data.faults.max_share",
    "train.evaluation",
    "train.stability",
    "train.compute.peak_tflops",
}

# The replicas of an array share the writing of it. Their slices are compiled a shape each, which pays for large arrays.
SHARED_WRITING = ocp.Context()
SHARED_WRITING.array.saving.min_slice_bytes_for_replica_parallel = 2**20

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every file at INFO and WARNING


class CheckpointWriter:
    """Asynchronous saves of one run; keeps the newest `keep_last`. Close it (or use `with`) to finish the last one."""

    def __init__(self, run: Path, keep_last: int):
        self._checkpointer = ocp.training.Checkpointer(
            run / "checkpoints",
            cleanup_tmp_directories=True,
            context=SHARED_WRITING,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(
                1
            ),  # the loop decides
            preservation_policy=ocp.training.preservation_policies.LatestN(keep_last),
        )

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(
        self,
        step: int,
        params: Mapping[str, jax.Array],
        opt_state: Any,
        metadata: Mapping[str, Any],
    ) -> None:
        """Returns once the arrays are copied to the host; writing goes on behind the next steps."""
        items = {"params": dict(params), "opt_state": _by_path(opt_state)}
        self._checkpointer.save_checkpointables_async(step, items, custom_metadata=dict(metadata))

    def load(
        self,
        step: int,
        params: Mapping[str, jax.ShapeDtypeStruct],
        opt_state: Any,
        data: Mapping[str, Any],
    ) -> tuple[dict[str, jax.Array], Any]:
        """Parameters and optimiser state after `step` updates, placed as the abstract leaves' shardings say.

        data: the position that the data pipeline would go on from.

        Raises CheckpointError with every mismatch, or when the data would not go on in the saved order.
        """
        stored = self._checkpointer.checkpointables_metadata(step)
        items = {"params": dict(params), "opt_state": _by_path(opt_state)}
        problems = [
            problem
            for name, leaves in items.items()
            for problem in _mismatches(name, stored.metadata[name], leaves)
        ]
        saved = stored.custom_metadata.get("data", {})
        if saved.get("plan_hash") != data["plan_hash"]:
            changed = [
                name
                for name, part in data["parts"].items()
                if saved.get("parts", {}).get(name) != part
            ]
            problems.append(
                f"the data ({'; '.join(changed)}) changed since this checkpoint, so its order cannot go on; "
                "restore it, or start a new output_dir with init_from"
            )
        if problems:
            raise CheckpointError(self._checkpointer.directory / str(step), problems)
        loaded = self._checkpointer.load_checkpointables(step, items)
        leaves = [loaded["opt_state"][path] for path in items["opt_state"]]
        return loaded["params"], jax.tree.unflatten(jax.tree.structure(opt_state), leaves)


def saved_metadata(run: Path) -> dict[str, Any]:
    """Of the newest checkpoint of a run: the position in its `data`, its `clocks`; empty without a checkpoint."""
    steps = [int(step.name) for step in (run / "checkpoints").glob("[0-9]*") if step.name.isdigit()]
    return (
        dict(ocp.checkpointables_metadata(run / "checkpoints" / str(max(steps))).custom_metadata)
        if steps
        else {}
    )


GROUP_BYTES = (
    2**28
)  # small parameters are written and read together: each call of orbax takes tens of milliseconds


def _collect(nbytes: int) -> None:
    """Free what orbax leaves in reference cycles: the arrays of its last call. Takes long in a process with many objects."""
    if nbytes > GROUP_BYTES // 16:
        gc.collect()


class ParamsWriter:
    """Writes one step of parameters, a few at a time, so that they need not be in memory together.

    What it needs beside the parameter in hand is small where the process has several CPU devices: orbax copies an array
    as it writes, but no more than `write_concurrent_bytes` at once, counted in shards.

    `finish` makes the step appear; without it there is none.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self._path, self._metadata = path, dict(metadata)
        self._waiting: dict[str, jax.Array] = {}
        self._context = ocp.Context()
        self._context.array.saving.storage_options.chunk_byte_size = (
            2**26
        )  # so that a reader needs little more, too
        self._context.array.saving.use_compression = (
            False  # takes longer than the disk, and wins little
        )

    def add(self, path: str, array: np.ndarray | jax.Array) -> None:
        """The array may be written later, and must not change."""
        if array.nbytes + sum(each.nbytes for each in self._waiting.values()) > GROUP_BYTES:
            self._flush()
        large = array.nbytes > GROUP_BYTES
        self._waiting[path] = spread(array) if large else jax.device_put(array, may_alias=True)
        if large:
            self._flush()

    def finish(self) -> None:
        self._flush()
        with self._context:
            ocp.partial.finalize(self._path)

    def _flush(self) -> None:
        if not self._waiting:
            return
        largest = max(
            shard.data.nbytes
            for array in self._waiting.values()
            for shard in array.addressable_shards
        )
        self._context.memory.write_concurrent_bytes = max(
            largest + 1, GROUP_BYTES
        )  # orbax wants more than it needs
        with self._context:
            ocp.partial.save(self._path, self._waiting, custom_metadata=self._metadata)
        nbytes = sum(array.nbytes for array in self._waiting.values())
        self._waiting = {}
        _collect(nbytes)


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
        problems = _mismatches("params", stored, abstract.shapes)
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
            if group and (path is None or size + nbytes > GROUP_BYTES):
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
            if math.prod(self.shape(path)) * self.dtype(path).itemsize > GROUP_BYTES
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
        context.memory.read_concurrent_bytes = max(*shards, GROUP_BYTES) + 1
        _collect(sum(shards))
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


def check_run_folder(run: Path, settings: Mapping[str, Any]) -> bool:
    """Whether there is a step to resume. Every process looks, so that all refuse together; nothing is written.

    Raises ConfigError for a folder of something else, or listing every setting that differs from the saved run.
    """
    steps = (run / "checkpoints").glob("[0-9]*") if run.exists() else ()
    resuming = any(step.name.isdigit() for step in steps)
    saved = run / "config.json"
    if saved.exists():
        differences = _differences(json.loads(saved.read_text()), settings)
        if differences:
            raise ConfigError(
                f"output_dir {run} holds a run with other settings (saved -> now); continue with the "
                "saved ones or choose another output_dir:\n  " + "\n  ".join(differences)
            )
    elif run.exists() and any(run.iterdir()):
        raise ConfigError(
            f"output_dir {run} is not empty and holds no run (no config.json); choose another folder"
        )
    return resuming


def write_run_folder(
    run: Path, settings: Mapping[str, Any], tokenizer: Tokenizer, source: Any | None = None
) -> None:
    """Settings and tokenizer, by the first process once all have checked the folder.

    source: the checkpoint that the run begins with; its side files are kept for the export.
    """
    multihost_utils.sync_global_devices("run folder checked")
    if jax.process_index() == 0:
        run.mkdir(parents=True, exist_ok=True)
        tokenizer.save(run / "tokenizer")
        if source is not None:
            source.write_side_files(run / "source")
        write_json(run / "config.json", settings)


def _differences(saved: Any, now: Any, path: str = "") -> list[str]:
    if path in MAY_CHANGE:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            line
            for name in sorted(saved.keys() | now.keys())
            for line in _differences(
                saved.get(name), now.get(name), f"{path}.{name}" if path else name
            )
        ]
    return [] if saved == now else [f"{path}: {saved!r} -> {now!r}"]


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves of any pytree by the text of their path, in tree order."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _mismatches(
    item: str, stored: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> list[str]:
    """Names and shapes; dtypes may differ, orbax casts."""
    problems = [
        f"{item}: {name} is in the checkpoint, not in the model"
        for name in sorted(stored.keys() - wanted.keys())
    ]
    for name, leaf in wanted.items():
        if name not in stored:
            problems.append(
                f"{item}: {name} {list(leaf.shape)} is in the model, not in the checkpoint"
            )
        elif tuple(stored[name].shape) != tuple(leaf.shape):
            problems.append(
                f"{item}: {name} has shape {list(stored[name].shape)} in the checkpoint, "
                f"{list(leaf.shape)} in the model"
            )
    return problems
