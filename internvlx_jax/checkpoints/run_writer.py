"""Writing run folders: the asynchronous saves of a run, and imported parameters one at a time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils

from internvlx_jax.checkpoints import run_format
from internvlx_jax.checkpoints.agreement import on_first_process
from internvlx_jax.checkpoints.checkpoint import Checkpoint
from internvlx_jax.checkpoints.run_format import (
    by_path,
    finished_steps,
    free_cycles,
    join_average,
    mismatches,
    split_average,
)
from internvlx_jax.checkpoints.run_lock import LOCK
from internvlx_jax.checkpoints.staging import IDENTITY, remove_unfinished
from internvlx_jax.core.disk import full_disk_named, is_full
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.core.json_text import read_json_file
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import with_defaults
from internvlx_jax.core.paths import is_remote
from internvlx_jax.core.remote import explained
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.sharding import spread

CONFIGS = {"train": TrainConfig, "model": ModelConfig}  # what config.json of a run holds

# Settings that a resumed run may change: none of them alters what is computed.
MAY_CHANGE = {
    "train.output_dir",
    "train.mesh",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_last",
    "train.local_checkpoint_dir",
    "train.compute.remat",
    "train.data.num_workers",
    "train.data.val_meta",
    "train.data.index_dir",
    "train.data.faults.max_share",
    "train.evaluation",
    "train.stability",
    "train.compute.peak_tflops",
}

REMOVALS = 20  # tries to remove what a failed save has left

# The replicas of an array share the writing of it. The slices of each shape are compiled, which
# pays for large arrays only.
SHARED_WRITING = ocp.Context()
SHARED_WRITING.array.saving.min_slice_bytes_for_replica_parallel = 2**20

# Without a bound, orbax writes the arrays of an item in one transaction. That fails in an object
# store when the answer to its last request gets lost: sent again, it meets its own result. Single
# writes are tried again as often as they have to be. No checkpoint is as large as this bound.
WRITING_TO_STORES = ocp.Context(SHARED_WRITING)
WRITING_TO_STORES.memory.write_concurrent_bytes = 2**50


class CheckpointWriter:
    """Saves the steps of one run asynchronously and keeps the newest `keep_last`.

    Use it as a context manager: leaving the block waits for the last save.
    """

    def __init__(self, run: Path, keep_last: int):
        self._run = run
        self._folder = run / "checkpoints"
        self._saving: tuple[int, Any] | None = None  # step and orbax's response
        self._failed: int | None = None  # step for which the disk had no room
        # orbax declares its own policies for another type of metadata than the checkpointer's.
        every: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)  # the loop decides
        newest: Any = ocp.training.preservation_policies.LatestN(keep_last)
        if is_remote(run):  # orbax would do it while it lists them, and a listing may fail
            on_first_process(lambda: remove_unfinished(run))
        with explained(run, "written"):
            self._checkpointer = ocp.training.Checkpointer(
                str(run / "checkpoints"),
                # Those of earlier starts: the run has the lock.
                cleanup_tmp_directories=not is_remote(run),
                context=WRITING_TO_STORES if is_remote(run) else SHARED_WRITING,
                save_decision_policy=every,
                preservation_policy=newest,
            )

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            with self._named(), explained(self._run, "written"):
                self._checkpointer.close()
        except Exception:
            if kind is None:  # the error that ends the block says more than its consequences
                raise
        finally:
            # Others may still be writing; their next start removes what is left.
            if self._failed is not None and jax.process_count() == 1:
                _remove(self._folder, f"{self._failed}.*")

    def check(self) -> None:
        """Raises the error of the save under way as soon as it has one; waits for nothing.

        Raises:
            OSError: the disk is full; names the step, the free space and the last complete one.
        """
        if self._saving is None:
            return
        with self._named():
            try:
                self._saving[1].result(timeout=0)
            except TimeoutError:
                return
        self._saving = None

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Names the step of a save that fails for lack of space."""
        if self._saving is None:
            yield
            return
        step = self._saving[0]
        complete = [int(each.name) for each in self._folder.glob("[0-9]*") if each.name.isdigit()]
        last = (
            f"the last complete checkpoint is {max(complete)}" if complete else "none is complete"
        )
        try:
            with full_disk_named(self._folder / str(step), f"; {last}"):
                yield
        except OSError as error:
            self._failed = step if is_full(error) else self._failed
            raise

    @property
    def latest_step(self) -> int | None:
        """The newest complete step; None in a run without one."""
        return on_first_process(lambda: max(finished_steps(self._run), default=None))

    def save(
        self,
        step: int,
        params: Mapping[str, jax.Array],
        opt_state: Any,
        metadata: Mapping[str, Any],
    ) -> None:
        """Saves one step; returns once the arrays are copied to the host.

        Writing goes on while the next steps are computed.

        Args:
            step: updates that led to these parameters.
            params: arrays by dotted path.
            opt_state: any pytree; the average in it, if there is one, becomes the item `ema`.
            metadata: configs and the position in the data, as JSON can hold them.
        """
        rest, average = split_average(opt_state)
        items = {"params": dict(params), "opt_state": by_path(rest)}
        if average is not None:
            items["ema"] = dict(average)
        with self._named(), explained(self._run, "written"):  # orbax waits for the save before
            if self._saving is not None:
                self._saving[1].result()
        self._saving = (step, None)
        with self._named(), explained(self._run, "written"):
            response = self._checkpointer.save_checkpointables_async(
                step, items, custom_metadata=dict(metadata)
            )
        self._saving = None if response is None else (step, response)

    def load(
        self,
        step: int,
        params: Mapping[str, jax.ShapeDtypeStruct],
        opt_state: Any,
        data: Mapping[str, Any],
    ) -> tuple[dict[str, jax.Array], Any]:
        """Loads one step to go on from.

        Args:
            step: one of the run's steps.
            params: abstract parameters by dotted path, which carry their shardings.
            opt_state: abstract optimizer state, the same way.
            data: the position that the data pipeline would go on from.

        Returns:
            Parameters by dotted path, and the optimizer state.

        Raises:
            CheckpointError: lists every mismatch, or says that the data would not go on in the
                saved order.
        """
        stored = self._checkpointer.checkpointables_metadata(step)
        # Version 0.1 kept the average inside opt_state (run_format.find_average).
        separate = "ema" in stored.metadata
        rest, average = split_average(opt_state) if separate else (opt_state, None)
        items = {"params": dict(params), "opt_state": by_path(rest)}
        if separate:
            items["ema"] = average or {}
        problems = [
            problem
            for name, leaves in items.items()
            for problem in mismatches(name, stored.metadata[name], leaves)
        ]
        saved = stored.custom_metadata
        problems += changed_data(saved.get("data") if isinstance(saved, dict) else None, data)
        if problems:
            raise CheckpointError(str(self._checkpointer.directory / str(step)), problems)
        with explained(self._run):
            loaded = self._checkpointer.load_checkpointables(step, items)
        leaves = [loaded["opt_state"][path] for path in items["opt_state"]]
        state = jax.tree.unflatten(jax.tree.structure(rest), leaves)
        return loaded["params"], join_average(state, loaded["ema"]) if separate else state


def changed_data(saved: Any, now: Mapping[str, Any]) -> list[str]:
    """Describes the parts of the data that changed since `saved`, empty if its order can go on.

    Args:
        saved: the position in the data that a checkpoint has stored; None without one.
        now: the position that the data pipeline would go on from.
    """
    saved = saved or {}  # an imported checkpoint has no position in any data
    if saved.get("plan_hash") == now["plan_hash"]:
        return []
    changed = [
        name for name, part in now["parts"].items() if saved.get("parts", {}).get(name) != part
    ]
    return [
        f"the data ({'; '.join(changed)}) changed since this checkpoint, so its order cannot go "
        "on; restore it, or start a new output_dir with init_from"
    ]


def _remove(folder: Path, pattern: str) -> None:
    """Removes folders that threads of orbax may still be writing to for a moment."""
    for _ in range(REMOVALS):
        rest = list(folder.glob(pattern))
        if not rest:
            return
        for each in rest:
            shutil.rmtree(each, ignore_errors=True)
        time.sleep(0.1)


def write_params(
    path: Path, metadata: Mapping[str, Any], params: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes one step of parameters, a few at a time, so that they are never in memory together.

    The memory needed beside the parameter in hand is small where the process has several CPU
    devices: orbax copies an array as it writes, at most `write_concurrent_bytes` at once, counted
    in shards.

    The step becomes visible after the last parameter; where `params` raises, it does not.

    Args:
        path: folder of the step.
        metadata: is stored beside the arrays.
        params: (dotted path, values in the dtype to store), which must not change afterwards.
    """
    writer = ParamsWriter(path, metadata)
    for name, array in params:
        writer.add(name, array)
        del array  # or it would stay in memory beside the next one
    writer.finish()


class ParamsWriter:
    """Collects parameters into groups, and writes a group at a time; see `write_params`."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self._path, self._metadata = path, dict(metadata)
        self._waiting: dict[str, jax.Array] = {}
        self._context = ocp.Context()
        saving = self._context.array.saving
        saving.storage_options.chunk_byte_size = 2**26  # so that a reader needs little memory, too
        saving.use_compression = False  # takes longer than the disk, and saves little

    def add(self, path: str, array: np.ndarray) -> None:
        """Adds a parameter, which may be written later and must not change until then.

        Args:
            path: dotted path.
            array: values in the dtype to store.
        """
        waiting = sum(each.nbytes for each in self._waiting.values())
        if array.nbytes + waiting > run_format.GROUP_BYTES:
            self._flush()
        large = array.nbytes > run_format.GROUP_BYTES
        self._waiting[path] = spread(array) if large else jax.device_put(array, may_alias=True)
        if large:
            self._flush()

    def finish(self) -> None:
        """Writes what is waiting and makes the step visible."""
        self._flush()
        with self._context, full_disk_named(self._path):
            ocp.partial.finalize(str(self._path))

    def _flush(self) -> None:
        if not self._waiting:
            return
        largest = max(
            shard.data.nbytes
            for array in self._waiting.values()
            for shard in array.addressable_shards
        )
        # orbax refuses a bound that a shard does not fit.
        bound = max(largest + 1, run_format.GROUP_BYTES)
        self._context.memory.write_concurrent_bytes = bound
        with self._context, full_disk_named(self._path):
            ocp.partial.save(str(self._path), self._waiting, custom_metadata=self._metadata)
        nbytes = sum(array.nbytes for array in self._waiting.values())
        self._waiting = {}
        free_cycles(nbytes)


def check_run_folder(
    run: Path, settings: Mapping[str, Any], checkpoints: Path | None = None
) -> bool:
    """Checks that a run can start or go on in a folder; writes nothing.

    Every process calls it, so that all refuse together.

    Args:
        run: the folder, which may not exist yet.
        settings: resolved configs of this start, as `write_run_folder` saves them.
        checkpoints: the folder with checkpoints/STEP, if it is another one.

    Returns:
        Whether there is a step to resume from.

    Raises:
        ConfigError: the folder holds something else, or a run with other settings; the message
            lists every setting that differs.
    """
    resuming = on_first_process(lambda: bool(finished_steps(checkpoints or run)))
    saved = run / "config.json"
    if saved.exists():
        stored = read_json_file(saved, remedy="restore the file, or choose another output_dir")
        differences = _differences(_filled(stored), _filled(settings))
        if differences:
            raise ConfigError(
                f"output_dir {run} holds a run with other settings (saved -> now); continue with "
                "the saved ones or choose another output_dir:\n  " + "\n  ".join(differences)
            )
    elif run.exists() and any(path.name not in (LOCK, IDENTITY) for path in run.iterdir()):
        raise ConfigError(
            f"output_dir {run} is not empty and holds no run (no config.json); choose another "
            "folder"
        )
    return resuming


def write_run_folder(
    run: Path, settings: Mapping[str, Any], tokenizer: Tokenizer, source: Checkpoint | None = None
) -> None:
    """Writes settings and tokenizer, in process 0 once all processes have checked the folder.

    Args:
        run: the folder.
        settings: resolved configs.
        tokenizer: the run's tokenizer.
        source: the checkpoint that the run begins with; its side files are kept for the export.
    """
    multihost_utils.sync_global_devices("run folder checked")
    if jax.process_index() == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", settings)  # first: it makes the folder one of a run
        tokenizer.save(run / "tokenizer")
        if source is not None:
            source.write_side_files(run / "source")


def _differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """Describes every setting that differs and may not, as `path: saved -> now`."""
    if path in MAY_CHANGE:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        prefix = f"{path}." if path else ""
        return [
            line
            for name in sorted(saved.keys() | now.keys())
            for line in _differences(saved.get(name), now.get(name), prefix + name)
        ]
    return [] if saved == now else [f"{path}: {saved!r} -> {now!r}"]


def _filled(settings: Any) -> Any:
    """Returns settings with fields that their version did not have yet, at their defaults."""
    if not isinstance(settings, Mapping):
        return settings
    return {
        name: with_defaults(CONFIGS[name], part)
        if name in CONFIGS and isinstance(part, Mapping)
        else part
        for name, part in settings.items()
    }
