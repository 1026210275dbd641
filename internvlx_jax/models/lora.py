"""LoRA: low-rank additions to the linear maps of the tower's and the decoder's layers (spec: training.md 11).

    y = x W + b + scale * (drop(x) A) B          A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: at first y is that of the base

An adapter of the linear map `M.kernel` is two parameters beside it, in the axes of that kernel:

    M.lora_a  [L, *in, r]     M.lora_b  [L, r, *out]

Checkpoints keep queries, keys and values of Llama and Qwen2 apart, so in their packed kernel each has an adapter of its
own: `M.lora_a_q`, `M.lora_b_q`, `M.lora_a_k`, ...
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.layers import Linear, uniform_fan_in
from internvlx_jax.models.params import AbstractModel, unflatten


@dataclasses.dataclass(frozen=True)
class Addition:
    """What a linear map computes besides its own product.

    sizes: ends of the adapters' names, and how much of the output's axis j each has; one of None has all.
    """

    scale: float
    dropout: float
    sizes: tuple[tuple[str, int | None], ...]

    def __call__(self, linear: Linear, x: jax.Array) -> jax.Array:
        to_rank, from_rank = _specs(linear.spec)
        if self.dropout and linear.dropout_key is not None:
            keep = jax.random.bernoulli(linear.dropout_key[...], 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / jnp.asarray(1 - self.dropout, x.dtype), 0)
        parts = []
        for end, _ in self.sizes:
            a, b = (getattr(linear, f"lora_{side}{end}")[...].astype(x.dtype) for side in "ab")
            parts.append(jnp.einsum(from_rank, jnp.einsum(to_rank, x, a), b))
        y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=linear.output.index("j"))
        return y * jnp.asarray(self.scale, y.dtype)


def is_adapter(path: str) -> bool:
    return ".lora_" in path


def without_adapters(abstract: AbstractModel) -> AbstractModel:
    """What a checkpoint to start from has to fill; the structure is not touched."""
    return dataclasses.replace(
        abstract,
        shapes={path: leaf for path, leaf in abstract.shapes.items() if not is_adapter(path)},
    )


def with_adapters(
    abstract: AbstractModel, config: ModelConfig, loras: Sequence[LoraConfig]
) -> AbstractModel:
    """The model with adapters, which are float32. Raises ConfigError for a part that is named twice."""
    parts = [lora.part for lora in loras]
    if len(set(parts)) != len(parts):
        raise ConfigError(f"lora: {', '.join(parts)} name a part twice; give one entry a part")
    model: InternVLX = nnx.merge(abstract.graphdef, unflatten(abstract.shapes))
    for lora in loras:
        apart = lora.part == "decoder" and config.decoder.family in ("llama", "qwen2")
        sizes = (("_q", config.decoder.group), ("_k", 1), ("_v", 1))
        for name, linear in _linears(model, lora.part):
            _add(linear, lora, sizes if apart and name == "attn.qkv" else (("", None),))
    return AbstractModel.of(model)


def init_adapters(
    abstract: AbstractModel, seed: int, shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
    """Fresh adapters by dotted path, on the devices that hold them; values depend on path, shape and seed alone."""
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


def draw_dropout(model: InternVLX, key: jax.Array) -> None:
    """Give every adapter of a model the randomness of one step, a key a layer; `model` is changed."""
    adapted = [
        linear
        for part in ("vision", "decoder")
        for _, linear in _linears(model, part)
        if linear.addition
    ]
    for linear, own in zip(adapted, jax.random.split(key, len(adapted)) if adapted else ()):
        linear.dropout_key = nnx.Variable(jax.random.split(own, linear.kernel.shape[0]))


def _linears(model: InternVLX, part: str) -> Iterator[tuple[str, Linear]]:
    layers = model.vision.layers if part == "vision" else model.decoder.layers
    for path, module in nnx.iter_modules(layers):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


def _add(linear: Linear, lora: LoraConfig, sizes: tuple[tuple[str, int | None], ...]) -> None:
    """Parameters are stacked as the kernel of `linear` is."""
    letters = linear.spec.split("->")[0].split(",")[1]
    kernel, axes = linear.kernel.get_value(), linear.kernel.get_metadata("axes")
    size, axis = dict(zip(letters, kernel.shape[1:])), dict(zip(letters, axes[1:]))
    inside, outside = _sides(linear.spec)
    fan_in = math.prod(size[letter] for letter in inside)

    def param(shape: Sequence[int], axes: Sequence[str | None], init: str) -> nnx.Param:
        leaf = jax.ShapeDtypeStruct((kernel.shape[0], *shape), jnp.float32)
        return nnx.Param(leaf, axes=("layers", *axes), init=init)

    for end, count in sizes:
        out = [count if count and letter == "j" else size[letter] for letter in outside]
        setattr(
            linear,
            f"lora_a{end}",
            param(
                [*(size[letter] for letter in inside), lora.rank],
                [*(axis[letter] for letter in inside), None],
                uniform_fan_in(fan_in).name,
            ),
        )
        setattr(
            linear,
            f"lora_b{end}",
            param([lora.rank, *out], [None, *(axis[letter] for letter in outside)], "0"),
        )
    linear.addition = Addition(lora.scale, lora.dropout, sizes)


def _sides(spec: str) -> tuple[str, str]:
    """Letters of a kernel that are summed over, and those of the output, in the kernel's order."""
    inputs, output = spec.split("->")
    kernel = inputs.split(",")[1]
    return "".join(x for x in kernel if x not in output), "".join(x for x in kernel if x in output)


def _specs(spec: str) -> tuple[str, str]:
    """`bsd,dkjh->bskjh` -> `bsd,dr->bsr`, `bsr,rkjh->bskjh`."""
    inputs, output = spec.split("->")
    x = inputs.split(",")[0]
    inside, outside = _sides(spec)
    hidden = "".join(letter for letter in x if letter not in inside) + "r"
    return f"{x},{inside}r->{hidden}", f"{hidden},r{outside}->{output}"
