"""The format of run folders, which training leaves behind (design: training.md 10, platform.md 5).

    RUN/config.json            resolved run config and model config
    RUN/tokenizer/             tokenizer files, so that the folder is complete without its sources
    RUN/source/                small files of the PyTorch checkpoint that the run began with, for
                               its export
    RUN/metrics.jsonl, tensorboard/
    RUN/checkpoints/STEP/      written by orbax: the items `params`, `opt_state` and, where the run
                               keeps an average of its parameters, `ema`, each by path; metadata
                               repeats the configs and holds the position in the data

On a disk, orbax writes a step under another name and renames it, so a visible step is complete. In
an object store it writes a marker last (core/uploads.py), and a step without one is incomplete; the
files that grow by lines are folders of segments there (core/line_log.py). An imported checkpoint
(convert/import_hf.py) is a run folder with the single step 0, whose parameters are in orbax's item
for a single tree.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from internvlx_jax.core.paths import is_remote
from internvlx_jax.core.uploads import MARKER

# orbax reports every file at INFO and WARNING, and the traceback of an error before it raises it.
logging.getLogger("absl").setLevel(logging.CRITICAL)

# Small parameters are written and read together, because every call of orbax takes tens of
# milliseconds; a parameter with more bytes is written and read alone.
GROUP_BYTES = 2**28


class Ema(NamedTuple):
    """The average of the trained parameters within an optimizer state.

    Attributes:
        ema: dotted path -> float32 array; empty where `split_average` has taken the arrays out.
    """

    ema: dict[str, Any]


def split_average(opt_state: Any) -> tuple[Any, dict[str, Any] | None]:
    """Returns an optimizer state without its average, and the average or None.

    The two are saved as separate items, so that a reader of the average needs no optimizer.
    """
    found: list[dict[str, Any]] = []

    def take(node: Any) -> Any:
        if not isinstance(node, Ema):
            return node
        found.append(node.ema)
        return Ema({})

    rest = jax.tree.map(take, opt_state, is_leaf=lambda node: isinstance(node, Ema))
    return rest, found[0] if found else None


def join_average(rest: Any, average: Mapping[str, Any]) -> Any:
    """Returns the optimizer state that `split_average` divided into `rest` and `average`."""
    return jax.tree.map(
        lambda node: Ema(dict(average)) if isinstance(node, Ema) else node,
        rest,
        is_leaf=lambda node: isinstance(node, Ema),
    )


@dataclasses.dataclass(frozen=True)
class StoredAverage:
    """Where a step keeps its average.

    Attributes:
        item: the checkpoint item.
        names: dotted path of a parameter -> name of its average within the item.
    """

    item: str
    names: Mapping[str, str]


def find_average(items: Mapping[str, Mapping[str, Any]]) -> StoredAverage | None:
    """Locates the average among the items of a step; None where the run kept none.

    Version 0.1 stored the average inside `opt_state`, under the path of the optimizer state with
    the parameter's own in brackets, such as `[4].ema['decoder.head']`. Such steps are still read.

    Args:
        items: names (and what is known of each array) by item.
    """
    if "ema" in items:
        return StoredAverage("ema", {path: path for path in items["ema"]})
    earlier = {
        name.split(".ema['")[1].removesuffix("']"): name
        for name in items.get("opt_state", {})
        if ".ema['" in name
    }
    return StoredAverage("opt_state", earlier) if earlier else None


def finished_steps(run: Path) -> list[int]:
    """Returns the complete steps of a run folder, in order; none without the folder."""
    folder = run / "checkpoints"
    try:
        steps = list(folder.iterdir()) if folder.is_dir() else []
    except FileNotFoundError:  # a start of the run has just removed the last object in it
        steps = []
    return sorted(
        int(step.name)
        for step in steps
        if step.name.isdigit() and (not is_remote(step) or (step / MARKER).is_file())
    )


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of any pytree by the text of their path, in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def mismatches(
    item: str, stored: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> list[str]:
    """Describes every name or shape in which an item differs; dtypes may, since orbax casts."""
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


def free_cycles(nbytes: int) -> None:
    """Frees the arrays of orbax's last call, which it leaves in reference cycles.

    Small amounts are left to the interpreter: a collection takes long in a process with many
    objects.

    Args:
        nbytes: bytes of those arrays.
    """
    if nbytes > GROUP_BYTES // 16:
        gc.collect()
