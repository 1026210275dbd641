"""Writing run folders: the asynchronous saves of a run, and imported parameters one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils

from internvlx_jax.checkpoints import run_format
from internvlx_jax.checkpoints.run_format import by_path, collect, mismatches
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.sharding import spread

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
        items = {"params": dict(params), "opt_state": by_path(opt_state)}
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
        items = {"params": dict(params), "opt_state": by_path(opt_state)}
        problems = [
            problem
            for name, leaves in items.items()
            for problem in mismatches(name, stored.metadata[name], leaves)
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
        if (
            array.nbytes + sum(each.nbytes for each in self._waiting.values())
            > run_format.GROUP_BYTES
        ):
            self._flush()
        large = array.nbytes > run_format.GROUP_BYTES
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
            largest + 1, run_format.GROUP_BYTES
        )  # orbax wants more than it needs
        with self._context:
            ocp.partial.save(self._path, self._waiting, custom_metadata=self._metadata)
        nbytes = sum(array.nbytes for array in self._waiting.values())
        self._waiting = {}
        collect(nbytes)


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
