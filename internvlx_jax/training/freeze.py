"""Which parameters a run trains (design: training.md 2)."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.run_config import FreezeConfig
from internvlx_jax.models.lora import is_adapter
from internvlx_jax.models.params import AbstractModel

TOWER_LAYERS = "vision.layers."
MODULES = {"vit": ("vision.",), "projector": ("projector.", "lvtc."), "llm": ("decoder.",)}
HEAD = "decoder.head"


@dataclasses.dataclass(frozen=True)
class ParameterPartition:
    """Describes which parameters are trained and which are frozen.

    A stack of layers can be divided too: its first layers are frozen, and both parts have the
    stack's path.

    Attributes:
        whole: jax.ShapeDtypeStruct of every parameter by dotted path, in the order of the model.
        trained: The trained part, in the dtype of the parameters.
        frozen: The frozen part, in the compute dtype.
        frozen_tower_layers: First layers of the tower that are frozen while its last are trained;
            0 where the tower is not divided.
    """

    whole: dict[str, jax.ShapeDtypeStruct]
    trained: dict[str, jax.ShapeDtypeStruct]
    frozen: dict[str, jax.ShapeDtypeStruct]
    frozen_tower_layers: int

    def split(
        self, params: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Splits whole parameters into (trained, frozen); `join` undoes it but for dtypes."""
        return (
            {
                path: params[path][-leaf.shape[0] :] if path in self.frozen else params[path]
                for path, leaf in self.trained.items()
            },
            {
                path: (
                    params[path][: leaf.shape[0]] if path in self.trained else params[path]
                ).astype(leaf.dtype)
                for path, leaf in self.frozen.items()
            },
        )


def join(trained: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Joins trained and frozen parameters; a divided stack gets the dtype of its trained layers."""
    divided = {
        path: jnp.concatenate([frozen[path].astype(trained[path].dtype), trained[path]])
        for path in trained.keys() & frozen.keys()
    }
    return {**frozen, **trained, **divided}


def divide(
    shapes: Mapping[str, jax.ShapeDtypeStruct], config: FreezeConfig, dtype: DTypeLike
) -> ParameterPartition:
    """Divides parameters into trained and frozen ones.

    Args:
        shapes: Whole parameters by dotted path.
        config: What is frozen.
        dtype: The compute dtype, which frozen parameters are stored in.

    Raises:
        ConfigError: An expression is malformed or matches nothing, the tower has fewer layers than
            are to be trained, an adapter's base is trained, or nothing is left to train.
    """
    beginnings = tuple(
        begin for module, begins in MODULES.items() if getattr(config, module) for begin in begins
    )
    listed, depth = _matched(shapes, config.paths), config.unfreeze_vit_last
    adapted = {path.rpartition(".")[0] + ".kernel" for path in shapes if is_adapter(path)}
    if config.train_lora_only and not adapted:
        raise ConfigError("freeze.train_lora_only, but the model has no adapters; set lora")
    still = {
        path
        for path in shapes
        if (config.train_lora_only or path.startswith(beginnings)) and not is_adapter(path)
    }
    if config.unfreeze_head:
        if HEAD not in shapes:
            raise ConfigError(
                "freeze.unfreeze_head: this decoder has no head of its own, its embeddings serve "
                "as one (model.decoder.tie_embeddings)"
            )
        still.remove(HEAD)

    trained, frozen, frozen_layers = {}, {}, 0
    for path, leaf in shapes.items():
        in_tower = path.startswith(TOWER_LAYERS) and path not in listed and not is_adapter(path)
        layers = leaf.shape[0] if depth and in_tower else 0
        if layers and depth > layers:
            raise ConfigError(f"freeze.unfreeze_vit_last is {depth}, the tower has {layers} layers")
        if layers:
            frozen_layers = layers - depth
            trained[path] = _layers(leaf, depth)
            if frozen_layers:
                frozen[path] = _layers(leaf, frozen_layers, dtype)
        elif path in still or path in listed:
            frozen[path] = jax.ShapeDtypeStruct(leaf.shape, dtype)
        else:
            trained[path] = leaf
    if not trained:
        raise ConfigError("freeze: every parameter is frozen, nothing is left to train")
    if adapted & trained.keys():
        raise ConfigError(
            f"lora: {min(adapted & trained.keys())} is trained, and so is its adapter; set "
            "freeze.vit, freeze.llm or freeze.train_lora_only"
        )
    whole = {path: leaf if path in trained else frozen[path] for path, leaf in shapes.items()}
    return ParameterPartition(whole, trained, frozen, frozen_layers)


def as_trained(
    build: Callable[..., AbstractModel],
    config: ModelConfig,
    partition: ParameterPartition,
    vit_mode: Literal["train", "eval"],
) -> AbstractModel:
    """Builds the model that a run trains.

    Args:
        build: `abstract_model` with the options of the run.
        config: The model.
        partition: Gradients end where it says that nothing below is trained; its dtypes are those
            of the result.
        vit_mode: `eval` takes the drop path from a tower that is frozen as a whole.
    """
    if vit_mode == "eval" and not any(
        path.startswith(MODULES["vit"]) for path in partition.trained
    ):
        vision = dataclasses.replace(config.vision, drop_path=0.0)
        config = dataclasses.replace(config, vision=vision)
    abstract = build(config, frozen_layers=partition.frozen_tower_layers)
    return dataclasses.replace(abstract, shapes=partition.whole)


def _layers(
    leaf: jax.ShapeDtypeStruct, count: int, dtype: DTypeLike | None = None
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), dtype or leaf.dtype)


def _matched(paths: Iterable[str], expressions: Iterable[str]) -> set[str]:
    """Returns paths that any expression matches from their beginning, e.g. `decoder.*norm`."""
    paths, matched = list(paths), set()
    for expression in expressions:
        found = match_paths("freeze.paths", expression, paths)
        if not found:
            raise ConfigError(
                f"freeze.paths: {expression!r} matches no parameter; paths begin with "
                f"{first_names(paths)}"
            )
        matched |= found
    return matched


def match_paths(field: str, expression: str, paths: Iterable[str]) -> set[str]:
    """Returns the paths that an expression matches from their beginning.

    Raises:
        ConfigError: The expression is malformed; the message begins with `field`.
    """
    try:
        return {path for path in paths if re.match(expression, path)}
    except re.error as error:
        raise ConfigError(
            f"{field}: {expression!r} is not a regular expression ({error})"
        ) from error


def first_names(paths: Iterable[str]) -> str:
    """Returns the first components of paths, as a list for messages."""
    return ", ".join(sorted({path.split(".")[0] for path in paths}))


def describe(partition: ParameterPartition) -> str:
    """Returns lines with the trained and frozen parameter counts per module, and of adapters."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for column, leaves in enumerate((partition.trained, partition.frozen)):
        for path, leaf in leaves.items():
            counts["lora" if is_adapter(path) else path.split(".")[0]][column] += leaf.size
    return "\n".join(
        f"{module:10} {trained:>13,} trained  {still:>13,} frozen"
        for module, (trained, still) in sorted(counts.items())
    )
