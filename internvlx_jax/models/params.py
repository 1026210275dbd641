"""Parameters as a plain dict, apart from the module structure (design: platform.md 3).

A model is split once into `graphdef` (static structure) and parameters; `nnx.merge(graphdef,
params)` inside a jitted function gives the module back. Freezing, sharding, checkpoints, moments
and the name table all speak of parameters by dotted path: `decoder.layers.attn.qkv.kernel`.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from jax.typing import DTypeLike

from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.models.attention import Backend
from internvlx_jax.models.internvlx import ActivationShardings, InternVLX
from internvlx_jax.models.layers import ShapesOnly, uniform_fan_in
from internvlx_jax.models.lora import is_adapter

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """Holds everything about a model but its weights.

    Attributes:
        graphdef: Module structure for nnx.merge.
        shapes: Dotted path -> jax.ShapeDtypeStruct.
        axes: Dotted path -> logical axis name of each dim.
        inits: Dotted path -> distribution of fresh values, in words.
    """

    graphdef: nnx.GraphDef
    shapes: dict[str, jax.ShapeDtypeStruct]
    axes: dict[str, tuple[str | None, ...]]
    inits: dict[str, str]

    @classmethod
    def of(cls, model: InternVLX) -> AbstractModel:
        """Takes a model that has jax.ShapeDtypeStruct in place of arrays apart."""
        graphdef, state = nnx.split(model)
        variables = {
            ".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)
        }
        return cls(
            graphdef,
            {path: variable.get_value() for path, variable in variables.items()},
            {path: variable.get_metadata("axes") for path, variable in variables.items()},
            {path: variable.get_metadata("init") for path, variable in variables.items()},
        )


def abstract_model(
    config: ModelConfig,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike = "float32",
    remat: str = "none",
    attention: Backend = "auto",
    shardings: ActivationShardings | None = None,
    lora: Sequence[LoraConfig] = (),
    frozen_layers: int = 0,
) -> AbstractModel:
    """Describes a model without allocating it; arguments are those of `InternVLX`."""
    return AbstractModel.of(
        jax.eval_shape(
            lambda: InternVLX(
                config,
                rngs=ShapesOnly(),
                dtype=dtype,
                param_dtype=param_dtype,
                remat=remat,
                attention=attention,
                shardings=shardings,
                lora=lora,
                frozen_layers=frozen_layers,
            )
        )
    )


def init_params(
    config: ModelConfig,
    seed: int,
    *,
    param_dtype: DTypeLike = "float32",
    shardings: dict[str, Sharding] | None = None,
    paths: Collection[str] | None = None,
) -> dict[str, Any]:
    """Draws random parameters (model.md 12), on the devices that hold them.

    A parameter's values depend on the config and the seed alone, not on `paths` or `shardings`.

    Args:
        config: Of the model; adapters are the business of `init_adapters`.
        seed: Of the draw.
        param_dtype: Of the parameters.
        shardings: Dotted path -> where it lives; None is the default device.
        paths: The parameters that are returned; None is all of them.

    Returns:
        Dotted path -> array.
    """

    def init():
        model = InternVLX(config, rngs=nnx.Rngs(seed), param_dtype=param_dtype)
        params = flatten(nnx.to_pure_dict(nnx.state(model)))
        return params if paths is None else {path: params[path] for path in paths}

    if shardings is not None and paths is not None:
        shardings = {path: shardings[path] for path in paths}
    return jax.jit(init, out_shardings=shardings)()


def without_adapters(abstract: AbstractModel) -> AbstractModel:
    """Returns what a checkpoint to start from has to fill; the structure keeps its adapters."""
    shapes = {path: leaf for path, leaf in abstract.shapes.items() if not is_adapter(path)}
    return dataclasses.replace(abstract, shapes=shapes)


def init_adapters(
    abstract: AbstractModel, seed: int, shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
    """Draws fresh adapters by dotted path, on the devices that hold them.

    The values of an adapter depend on its path, its shape and the seed alone, so that adapters of
    one part are the same whether or not the other part has some.
    """
    shapes = {path: leaf for path, leaf in abstract.shapes.items() if is_adapter(path)}

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if ".lora_b" in path:
            return jnp.zeros(leaf.shape, leaf.dtype)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        return uniform_fan_in(math.prod(leaf.shape[1:-1])).draw(key, leaf.shape, leaf.dtype)

    init = jax.jit(
        lambda: {path: draw(path, leaf) for path, leaf in shapes.items()},
        out_shardings={path: shardings[path] for path in shapes},
    )
    return init()


def flatten(params: Params) -> dict[str, Any]:
    """Turns a nested dict into {dotted path: leaf}."""
    return flatten_dict(params, sep=".")


def unflatten(flat: dict[str, Any]) -> Params:
    """Turns {dotted path: leaf} into a nested dict."""
    return unflatten_dict(flat, sep=".")
