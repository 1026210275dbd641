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
from jax.sharding import Sharding

from internvlx_jax.config import from_dict
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.errors import CheckpointError
from internvlx_jax.models.config import ModelConfig
from internvlx_jax.models.params import AbstractModel

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every file at INFO and WARNING


class CheckpointWriter:
    """Asynchronous saves of one run; keeps the newest `keep_last`. Close it (or use `with`) to finish the last one."""

    def __init__(self, run: Path, keep_last: int):
        self._checkpointer = ocp.training.Checkpointer(
            run / "checkpoints", cleanup_tmp_directories=True,
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

    def save(self, step: int, items: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Returns once the arrays are copied to the host; writing goes on behind the next steps."""
        self._checkpointer.save_checkpointables_async(step, dict(items), custom_metadata=dict(metadata))

    def load(self, step: int, abstract_items: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Items of a step, placed as the abstract leaves' shardings say, and its metadata."""
        stored = self._checkpointer.checkpointables_metadata(step)
        problems = [problem for name, leaves in abstract_items.items()
                    for problem in _mismatches(name, stored.metadata[name], leaves)]
        if problems:
            raise CheckpointError(self._checkpointer.directory / str(step), problems)
        return self._checkpointer.load_checkpointables(step, dict(abstract_items)), stored.custom_metadata


class RunFolder:
    """The newest step of a run folder, or one step given as RUN/checkpoints/STEP."""

    def __init__(self, path: str | Path):
        path = Path(path).resolve()
        self.run = path.parents[1] if path.parent.name == "checkpoints" else path
        steps = sorted(int(step.name) for step in (self.run / "checkpoints").iterdir() if step.name.isdigit())
        if not steps:
            raise FileNotFoundError(f"{self.run / 'checkpoints'} holds no finished checkpoint")
        self.step = int(path.name) if path != self.run else steps[-1]
        if self.step not in steps:
            raise FileNotFoundError(f"{path}: no finished checkpoint; the steps there are "
                                    f"{', '.join(map(str, steps))}")
        self.path = self.run / "checkpoints" / str(self.step)
        self._stored = ocp.checkpointables_metadata(self.path)
        self.config = from_dict(ModelConfig, self._stored.custom_metadata["model"])

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
        return ocp.load_checkpointables(self.path, {"params": leaves})["params"]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.run / "tokenizer")


def write_json(path: Path, value: Any) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.rename(path)


def _mismatches(item: str, stored: Mapping[str, Any], wanted: Any) -> list[str]:
    """Names and shapes; dtypes may differ, orbax casts."""
    have = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(
        stored, is_leaf=lambda leaf: hasattr(leaf, "shape"))[0]}
    want = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(wanted)[0]}
    problems = [f"{item}{name}: in the checkpoint, not in the model" for name in sorted(have.keys() - want.keys())]
    for name, leaf in want.items():
        if name not in have:
            problems.append(f"{item}{name} {list(leaf.shape)}: in the model, not in the checkpoint")
        elif tuple(have[name].shape) != tuple(leaf.shape):
            problems.append(f"{item}{name}: shape {list(have[name].shape)} in the checkpoint, {list(leaf.shape)} in "
                            "the model")
    return problems
