"""Loads a checkpoint into a model with another LVTC (design: lvtc.md 2, checkpoints.md 8).

The model may have other presets, layers or grids, or the checkpoint no LVTC at all. A projector is
taken over whole or not at all. What the checkpoint lacks is initialized, and the report says so.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from internvlx_jax.checkpoints.checkpoint import Checkpoint
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.projector_sites import released_site
from internvlx_jax.models.params import AbstractModel, abstract_model, init_params
from internvlx_jax.models.sharding import param_shardings

# What a model may change without changing the meaning of its weights.
MAY_DIFFER = {
    "prompt",
    "lvtc",
    "vision.drop_path",
    "vision.layer_scale_init",
    "projector.drop_path",
    "decoder.initializer_range",
    "decoder.rope.allow_longer",
}
PART = re.compile(r"projector|lvtc\.low|lvtc\.high\.projector|lvtc\.inject_\d+\.projector")


@dataclasses.dataclass(frozen=True)
class Transferred:
    """Parameters in their new model.

    Attributes:
        params: arrays by dotted path.
        report: lines on what became of the checkpoint's projectors; empty without a change.
    """

    params: dict[str, jax.Array]
    report: tuple[str, ...]


def check_same_model(wanted: ModelConfig, stored: ModelConfig, checkpoint: Path) -> None:
    """Checks that a run's model is that of its checkpoint.

    Args:
        wanted: the run's model.
        stored: the checkpoint's model.
        checkpoint: its folder.

    Raises:
        ConfigError: lists every setting in which they contradict each other.
    """
    if wanted.projector.kind != stored.projector.kind:
        # Another compressor on a released tower and decoder: it starts fresh, and is reported.
        stored = dataclasses.replace(stored, projector=wanted.projector)
    differences = list(_differences(to_dict(wanted), to_dict(stored)))
    if differences:
        raise ConfigError(
            f"model is not that of the checkpoint {checkpoint} (config, checkpoint); correct "
            "model, or set it to none to take the checkpoint's:\n  " + "\n  ".join(differences)
        )


def transfer(
    source: Checkpoint,
    config: ModelConfig,
    abstract: AbstractModel,
    mesh: Mesh,
    *,
    seed: int,
) -> Transferred:
    """Loads `source` into a model of `config`, which may differ in projector and LVTC only.

    Args:
        source: the opened checkpoint.
        config: the model.
        abstract: its structure, whose dtypes are those of the result.
        mesh: the devices.
        seed: seed of new parameters.

    Raises:
        CheckpointError: as `source.load` does.
    """
    shardings = param_shardings(abstract.shapes, abstract.axes, mesh)
    same_projector = config.projector.kind == source.config.projector.kind
    if same_projector and config.lvtc == source.config.lvtc:
        return Transferred(source.load(abstract, shardings), ())
    dtype = jnp.result_type(*{leaf.dtype for leaf in abstract.shapes.values()})
    stored = abstract_model(source.config, dtype=dtype, param_dtype=dtype)
    loaded = source.load(stored, param_shardings(stored.shapes, stored.axes, mesh))

    ours, theirs = _parts(abstract.shapes), _parts(stored.shapes)
    taken = [part for part in ours if ours[part] == theirs.get(part)]
    params = {path: loaded[path] for part in taken for path in ours[part]}
    new = [path for path in abstract.shapes if path not in params]
    if new:
        params |= init_params(config, seed, param_dtype=dtype, shardings=dict(shardings), paths=new)
    params = {path: array.astype(abstract.shapes[path].dtype) for path, array in params.items()}
    return Transferred(
        params, tuple(_report(config, abstract, source, new, theirs.keys() - set(taken), seed))
    )


def _report(
    config: ModelConfig,
    abstract: AbstractModel,
    source: Checkpoint,
    new: Iterable[str],
    left: Iterable[str],
    seed: int,
) -> Iterable[str]:
    site, lvtc = released_site(config), config.lvtc
    kind = source.config.projector.kind
    if config.projector.kind != kind:
        yield f"projector.* is a new {config.projector.kind}; {source.path} holds {kind}"
    elif lvtc is None:
        yield (
            f"LVTC is off: projector.* of {source.path} makes the {config.tokens_per_tile} tokens "
            "of a tile"
        )
    elif site is not None:
        where = (
            "decoder layer 0"
            if site.name == "low"
            else f"the residual before decoder layer {lvtc.expand_layer}"
        )
        yield (
            f"projector.* of {source.path} is the {site.name} projector: {site.grid**2} tokens per "
            f"tile for {where}"
        )
    else:
        yield (
            "projector.* has no role: no LVTC projector is a pvtc of "
            f"{config.token_grid**2} tokens per tile"
        )
    for path in new:
        shape = list(abstract.shapes[path].shape)
        yield f"new, seed {seed}: {path} {shape} ~ {abstract.inits[path]}"
    for part in sorted(left):
        yield f"not taken over from {source.path}: {part} (absent here, or of another grid or kind)"


def _parts(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns shapes by path: each projector together, every other parameter by itself."""
    parts: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for path, leaf in shapes.items():
        part = PART.match(path)
        parts[part.group() if part else path][path] = leaf.shape
    return dict(parts)


def _differences(wanted: Any, stored: Any, path: str = "") -> Iterable[str]:
    if path in MAY_DIFFER:
        return
    if isinstance(wanted, dict) and isinstance(stored, dict):
        for name in wanted:
            yield from _differences(wanted[name], stored[name], f"{path}.{name}" if path else name)
    elif wanted != stored:
        yield f"model.{path}: {wanted!r}, {stored!r}"
