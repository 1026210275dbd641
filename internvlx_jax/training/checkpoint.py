"""Run folders: what a training run leaves behind and how it is read again (spec: training.md 10, platform.md 5).

    RUN/config.json            resolved run config and model config
    RUN/tokenizer/             tokenizer files, so that the folder stands alone
    RUN/metrics.jsonl, tensorboard/
    RUN/checkpoints/STEP/      orbax: `params` and `opt_state` as separate items, by dotted path; its metadata holds
                               the configs again and the position in the data

orbax writes a step aside and renames it, so a step that is there is complete.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from internvlx_jax.config import from_dict
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.errors import CheckpointError, ConfigError
from internvlx_jax.files import write_json
from internvlx_jax.models.config import ModelConfig
from internvlx_jax.models.params import AbstractModel

# Settings that a resumed run may change: none of them touches what is computed.
MAY_CHANGE = {"train.output_dir", "train.mesh", "train.log_every", "train.eval_every", "train.save_every",
              "train.keep_last", "train.compute.remat", "train.data.num_workers", "train.data.val_meta",
              "train.data.index_dir", "train.data.faults.max_share", "train.evaluation", "train.stability",
              "train.compute.peak_tflops"}

# The replicas of an array share the writing of it. Their slices are compiled a shape each, which pays for large arrays.
SHARED_WRITING = ocp.Context()
SHARED_WRITING.array.saving.min_slice_bytes_for_replica_parallel = 2**20

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every file at INFO and WARNING


class CheckpointWriter:
    """Asynchronous saves of one run; keeps the newest `keep_last`. Close it (or use `with`) to finish the last one."""

    def __init__(self, run: Path, keep_last: int):
        self._checkpointer = ocp.training.Checkpointer(
            run / "checkpoints", cleanup_tmp_directories=True, context=SHARED_WRITING,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the loop decides
            preservation_policy=ocp.training.preservation_policies.LatestN(keep_last))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, params: Mapping[str, jax.Array], opt_state: Any, metadata: Mapping[str, Any]) -> None:
        """Returns once the arrays are copied to the host; writing goes on behind the next steps."""
        items = {"params": dict(params), "opt_state": _by_path(opt_state)}
        self._checkpointer.save_checkpointables_async(step, items, custom_metadata=dict(metadata))

    def load(self, step: int, params: Mapping[str, jax.ShapeDtypeStruct], opt_state: Any,
             data: Mapping[str, Any]) -> tuple[dict[str, jax.Array], Any]:
        """Parameters and optimiser state after `step` updates, placed as the abstract leaves' shardings say.

        data: the position that the data pipeline would go on from.

        Raises CheckpointError with every mismatch, or when the data would not go on in the saved order.
        """
        stored = self._checkpointer.checkpointables_metadata(step)
        items = {"params": dict(params), "opt_state": _by_path(opt_state)}
        problems = [problem for name, leaves in items.items()
                    for problem in _mismatches(name, stored.metadata[name], leaves)]
        saved = stored.custom_metadata.get("data", {})
        if saved.get("plan_hash") != data["plan_hash"]:
            changed = [name for name, part in data["parts"].items() if saved.get("parts", {}).get(name) != part]
            problems.append(f"the data ({'; '.join(changed)}) changed since this checkpoint, so its order cannot go on; "
                            "restore it, or start a new output_dir with init_from")
        if problems:
            raise CheckpointError(self._checkpointer.directory / str(step), problems)
        loaded = self._checkpointer.load_checkpointables(step, items)
        leaves = [loaded["opt_state"][path] for path in items["opt_state"]]
        return loaded["params"], jax.tree.unflatten(jax.tree.structure(opt_state), leaves)


def saved_metadata(run: Path) -> dict[str, Any]:
    """Of the newest checkpoint of a run: the position in its `data`, its `clocks`; empty without a checkpoint."""
    steps = [int(step.name) for step in (run / "checkpoints").glob("[0-9]*") if step.name.isdigit()]
    return dict(ocp.checkpointables_metadata(run / "checkpoints" / str(max(steps))).custom_metadata) if steps else {}


class RunFolder:
    """The newest step of a run folder, or one step given as RUN/checkpoints/STEP.

    ema: load the average of the trained parameters in their place. Raises ConfigError for a run that kept none.
    """

    def __init__(self, path: str | Path, *, ema: bool = False):
        path = Path(path).resolve()
        self.run = path.parents[1] if path.parent.name == "checkpoints" else path
        steps = sorted(int(step.name) for step in (self.run / "checkpoints").iterdir() if step.name.isdigit())
        if not steps:
            raise FileNotFoundError(f"{self.run / 'checkpoints'} holds no finished checkpoint")
        if path != self.run and path.name not in map(str, steps):
            raise FileNotFoundError(f"{path}: no finished checkpoint; the steps there are "
                                    f"{', '.join(map(str, steps))}")
        self.step = int(path.name) if path != self.run else steps[-1]
        self.path = self.run / "checkpoints" / str(self.step)
        self._stored = ocp.checkpointables_metadata(self.path)
        self.config = from_dict(ModelConfig, self._stored.custom_metadata["model"])

        stored = self._stored.metadata.get("opt_state", {})
        self._averages = {name.split("['")[1][:-2]: name for name in stored if ".ema['" in name} if ema else {}
        if ema and not self._averages:
            raise ConfigError(f"{self.path}: the run kept no average of its parameters (optimizer.ema_decay)")

    @staticmethod
    def is_one(path: Path) -> bool:
        return (path / "checkpoints").is_dir() or path.resolve().parent.name == "checkpoints"

    def load(self, abstract: AbstractModel, shardings: Mapping[str, Sharding]) -> dict[str, jax.Array]:
        """Parameters by dotted path, cast to the dtypes of `abstract`. Raises CheckpointError with every mismatch."""
        leaves = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
                  for path, leaf in abstract.shapes.items()}
        problems = _mismatches("params", self._stored.metadata["params"], leaves)
        if problems:
            raise CheckpointError(self.path, problems)
        params = ocp.load_checkpointables(self.path, {"params": leaves})["params"]
        return params | self._load_averages(params)

    def _load_averages(self, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """In the place and dtype of `params`. Of a stack whose first layers are frozen, the others have an average."""
        stored = self._stored.metadata["opt_state"] if self._averages else {}
        leaves = {name: jax.ShapeDtypeStruct(stored[name].shape, params[path].dtype, sharding=params[path].sharding)
                  for path, name in self._averages.items()}
        if not leaves:
            return {}
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = ocp.load_checkpointables(self.path, {"opt_state": leaves})["opt_state"]
        return {path: params[path].at[-stored[name].shape[0]:].set(loaded[name])
                if params[path].shape != stored[name].shape else loaded[name]
                for path, name in self._averages.items()}

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.run / "tokenizer")


def prepare_run_folder(run: Path, settings: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Create a run folder, or check that an existing one belongs to the same run -> whether there is a step to resume.

    Raises ConfigError for a folder of something else, or listing every setting that differs from the saved run.
    """
    # Every process looks, so that all refuse together; then one writes.
    steps = (run / "checkpoints").glob("[0-9]*") if run.exists() else ()
    resuming = any(step.name.isdigit() for step in steps)
    saved = run / "config.json"
    if saved.exists():
        differences = _differences(json.loads(saved.read_text()), settings)
        if differences:
            raise ConfigError(f"output_dir {run} holds a run with other settings (saved -> now); continue with the "
                              "saved ones or choose another output_dir:\n  " + "\n  ".join(differences))
    elif run.exists() and any(run.iterdir()):
        raise ConfigError(f"output_dir {run} is not empty and holds no run (no config.json); choose another folder")
    multihost_utils.sync_global_devices("run folder checked")
    if jax.process_index() == 0:
        run.mkdir(parents=True, exist_ok=True)
        tokenizer.save(run / "tokenizer")
        write_json(saved, settings)
    return resuming


def _differences(saved: Any, now: Any, path: str = "") -> list[str]:
    if path in MAY_CHANGE:
        return []
    if isinstance(saved, dict) and isinstance(now, dict):
        return [line for name in sorted(saved.keys() | now.keys())
                for line in _differences(saved.get(name), now.get(name), f"{path}.{name}" if path else name)]
    return [] if saved == now else [f"{path}: {saved!r} -> {now!r}"]


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves of any pytree by the text of their path, in tree order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _mismatches(item: str, stored: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """Names and shapes; dtypes may differ, orbax casts."""
    problems = [f"{item}: {name} is in the checkpoint, not in the model" for name in sorted(stored.keys() - wanted.keys())]
    for name, leaf in wanted.items():
        if name not in stored:
            problems.append(f"{item}: {name} {list(leaf.shape)} is in the model, not in the checkpoint")
        elif tuple(stored[name].shape) != tuple(leaf.shape):
            problems.append(f"{item}: {name} has shape {list(stored[name].shape)} in the checkpoint, "
                            f"{list(leaf.shape)} in the model")
    return problems
