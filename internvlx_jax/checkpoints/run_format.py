"""The format of run folders: what a training run leaves behind (design: training.md 10, platform.md 5).

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
import logging
from collections.abc import Mapping
from typing import Any

import jax

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every file at INFO and WARNING

GROUP_BYTES = (
    2**28
)  # small parameters are written and read together: each call of orbax takes tens of milliseconds


def collect(nbytes: int) -> None:
    """Free what orbax leaves in reference cycles: the arrays of its last call. Takes long in a process with many objects."""
    if nbytes > GROUP_BYTES // 16:
        gc.collect()


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves of any pytree by the text of their path, in tree order."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def mismatches(
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
