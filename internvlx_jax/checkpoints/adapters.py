"""LoRA adapters: their names beside the weights, and their merge (design: checkpoints.md 9).

An adapter of the linear map `M.kernel` is two parameters beside it, in the axes of that kernel:

    M.lora_a  [L, *in, r]     M.lora_b  [L, r, *out]        kernel + scale * lora_a lora_b

A fused tensor (`wqkv`, `qkv`) has one pair. Where queries, keys and values are separate tensors
that share our packed kernel, each keeps a pair of its own: `M.lora_a_q`, `M.lora_b_q`, ...
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from internvlx_jax.checkpoints.name_entries import Entry, Part
from internvlx_jax.checkpoints.name_table import name_table
from internvlx_jax.checkpoints.safetensors_folder import FLOAT_TYPES
from internvlx_jax.checkpoints.tensors import Tensors
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.models.lora import is_adapter

ModelPart = Literal["vision", "decoder"]

# Part -> prefix of its linear maps.
PARTS: Mapping[ModelPart, str] = {"vision": "vision.layers.", "decoder": "decoder.layers."}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapters of one parameter.

    Attributes:
        base: table entry of the parameter.
        pairs: table entries of A and B, one pair for each separate source tensor.
    """

    base: Entry
    pairs: tuple[tuple[Entry, Entry], ...]

    @property
    def targets(self) -> list[str]:
        """Dotted paths of all A and B."""
        return [entry.target for pair in self.pairs for entry in pair]

    def merge(self, kernel: Any, pairs: Sequence[tuple[Any, Any]], scale: float) -> Any:
        """Returns kernel + scale * a b in float32.

        Args:
            kernel: NumPy or jax array, of one layer or of the stack.
            pairs: A and B of each of `self.pairs`, the same way.
            scale: factor of the adapters.
        """
        stack = kernel.shape[: kernel.ndim - self._kernel_dims()]
        deltas = []
        for n, (a, b) in enumerate(pairs):
            rank = a.shape[-1]
            delta = a.astype(np.float32).reshape(*stack, -1, rank) @ b.astype(np.float32).reshape(
                *stack, rank, -1
            )
            shape = list(kernel.shape)
            if len(pairs) > 1:
                shape[len(stack) + self.base.axis] = self.base.sizes[n]
            deltas.append(delta.reshape(shape))
        if len(deltas) > 1:
            numpy = kernel.__array_namespace__()
            deltas = [numpy.concatenate(deltas, axis=len(stack) + self.base.axis)]
        return kernel.astype(np.float32) + scale * deltas[0]

    def _kernel_dims(self) -> int:
        return len(self.base.parts[0].pattern.split(" -> ")[1].split())


def adapter_table(table: Sequence[Entry], part: ModelPart) -> list[Adapter]:
    """Returns the adapters that every linear map of a part could have.

    They are named as the layout of `table` names them: sources are `NAME.lora_A.weight` and
    `NAME.lora_B.weight`, without the prefixes that peft adds.
    """
    return [
        _adapter(entry)
        for entry in table
        if entry.target.startswith(PARTS[part]) and entry.target.endswith(".kernel")
    ]


def _adapter(entry: Entry) -> Adapter:
    """Derives the entries of A and B from that of a kernel: one pair per separate tensor."""
    fused = len({part.source for part in entry.parts}) == 1
    groups = (
        [("", entry.parts)]
        if fused
        else [(f"_{letter}", (part,)) for letter, part in zip("qkv", entry.parts, strict=True)]
    )
    module = entry.target.removesuffix(".kernel")
    pairs = []
    for suffix, parts in groups:
        name = parts[0].source.removesuffix(".weight")
        a, _ = _patterns(parts[0].pattern)
        side_a = Entry(
            f"{module}.lora_a{suffix}",
            (Part(f"{name}.lora_A.weight", a),),
            entry.dims,
            layers=entry.layers,
        )
        side_b = Entry(
            f"{module}.lora_b{suffix}",
            tuple(
                Part(f"{name}.lora_B.weight", _patterns(part.pattern)[1], part.rows)
                for part in parts
            ),
            entry.dims,
            _out_axis(entry),
            entry.sizes if fused else (),
            entry.layers,
        )
        pairs.append((side_a, side_b))
    return Adapter(entry, tuple(pairs))


def _patterns(pattern: str) -> tuple[str, str]:
    """Derives the patterns of A [r, in] and B [out, r] from that of a weight [out, in]."""
    (out, into), target = _axes(pattern)
    inside = set(re.findall(r"\w", into))
    a = " ".join(axis for axis in target if axis in inside)
    b = " ".join(axis for axis in target if axis not in inside)
    return f"r {into} -> {a} r", f"{out} r -> r {b}"


def _out_axis(entry: Entry) -> int:
    """Returns the axis of lora_b that is `entry.axis` of the kernel."""
    (_, into), _ = _axes(entry.parts[0].pattern)
    return entry.axis - len(re.findall(r"\w", into)) + 1


def _axes(pattern: str) -> tuple[list[str], list[str]]:
    """Splits a pattern into the axes of its source, groups together, and of its target."""
    source, target = pattern.split(" -> ")
    return re.findall(r"\([^)]*\)|\w", source), target.split()


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of one part and their tensors.

    Attributes:
        config: rank and scale.
        adapters: which linear maps have one.
        tensors: the tensors of A and B, under their names in the checkpoint's layout.
    """

    config: LoraConfig
    adapters: tuple[Adapter, ...]
    tensors: Tensors

    def read(self, entry: Entry, layer: int) -> np.ndarray:
        """Reads A or B of one layer."""
        return entry.to_target([self.tensors.read(name) for name in entry.sources(layer)])

    def merged(self, adapter: Adapter, layer: int, kernel: np.ndarray) -> np.ndarray:
        """Returns one layer's kernel with its adapters, in float32."""
        pairs = [(self.read(a, layer), self.read(b, layer)) for a, b in adapter.pairs]
        return adapter.merge(kernel, pairs, self.config.scale)


@dataclasses.dataclass(frozen=True)
class Strength:
    """Rank and scale of the adapter of one module, where they are not those of all."""

    rank: int
    scale: float


class AdapterTensors:
    """A and B of linear maps that have an adapter in some layers, or on some projections, only.

    The others are zeros, which add nothing. An adapter of a smaller rank gets rows of zeros, and a
    scale of its own is multiplied into B.
    """

    def __init__(
        self,
        tensors: Tensors,
        weights: Tensors,
        config: LoraConfig,
        strengths: Mapping[str, Strength] | None = None,
    ):
        """Takes the stored tensors, the base weights, and module -> its own rank and scale."""
        self._tensors, self._weights, self._config = tensors, weights, config
        self._stored, self._strengths = frozenset(tensors.names()), strengths or {}

    def names(self) -> list[str]:
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        module, _, side = name.removesuffix(".weight").rpartition(".lora_")
        out, into = self._weights.shape(f"{module}.weight")
        return (self._config.rank, into) if side == "A" else (out, self._config.rank)

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(name if name in self._stored else min(self._stored))

    def read(self, name: str) -> np.ndarray:
        if name not in self._stored:
            return np.zeros(self.shape(name), FLOAT_TYPES[self.dtype(name)])
        array = self._tensors.read(name)
        own = self._strengths.get(re.sub(r"\.lora_[AB]\.weight$", "", name))
        if own is None:
            return array
        full = np.zeros(self.shape(name), np.float32)
        full[tuple(map(slice, array.shape))] = array
        return full * (own.scale / self._config.scale if name.endswith("lora_B.weight") else 1.0)


def find_adapters(
    table: Sequence[Entry],
    config: LoraConfig,
    tensors: Tensors,
    strengths: Mapping[str, Strength] | None = None,
) -> tuple[list[Adapter], list[str]]:
    """Returns the adapters whose tensors are stored, and everything that is wrong with them.

    Args:
        table: name table of the checkpoint.
        config: rank and part.
        tensors: A and B, which some layers and projections may lack.
        strengths: module -> rank and scale, where they differ from those of `config`.
    """
    stored, used, found, problems = set(tensors.names()), set(), [], []
    for adapter in adapter_table(table, config.part):
        pairs = {
            names
            for a, b in adapter.pairs
            for layer in range(a.layers or 1)
            for names in zip(a.sources(layer), b.sources(layer)[:1], strict=True)
        }
        names = {name for pair in pairs for name in pair}
        if not stored.intersection(names):
            continue
        found.append(adapter)
        used |= names
        for pair in sorted(pairs):
            if len(stored.intersection(pair)) == 1:
                there, missing = sorted(pair, key=lambda name: name not in stored)
                problems.append(f"adapter tensor {missing} is missing, but {there} is stored")
    problems += [
        f"adapter tensor {name} belongs to no linear map of this model's {config.part} part"
        for name in sorted(stored - used)
    ]
    for name in sorted(stored & used):
        rank = tensors.shape(name)[0 if name.endswith("lora_A.weight") else 1]
        own = (strengths or {}).get(re.sub(r"\.lora_[AB]\.weight$", "", name))
        expected = config.rank if own is None else own.rank
        if rank != expected:
            where = "config says r" if own is None else "rank_pattern of the config says r"
            problems.append(
                f"adapter tensor {name} {list(tensors.shape(name))} has rank {rank}, the {where} "
                f"= {expected}"
            )
    return found, problems


def stored_adapters(config: ModelConfig, part: ModelPart, paths: Collection[str]) -> list[Adapter]:
    """Returns the adapters of one part among parameter paths, named as one layout names them.

    Args:
        config: the model.
        part: vision or decoder.
        paths: dotted paths of all parameters.

    Raises:
        ConfigError: the paths are those of no layout of this model.
    """
    wanted = {path for path in paths if is_adapter(path) and path.startswith(PARTS[part])}
    tables = [name_table(config)]
    if config.projector.kind == "mlp1" and config.decoder.family != "phi3":
        tables.append(name_table(config, "hf"))  # has separate adapters of q, k and v
    for table in tables:
        found = [
            adapter for adapter in adapter_table(table, part) if wanted.issuperset(adapter.targets)
        ]
        if wanted == {path for adapter in found for path in adapter.targets}:
            return found
    raise ConfigError(
        f"LoRA parameters {', '.join(sorted(wanted))} are not those of one layout of this model; "
        "each linear map has lora_a and lora_b, and q, k and v have one pair together or one each"
    )


def merge_params(
    params: Mapping[str, Any], config: ModelConfig, loras: Sequence[LoraConfig]
) -> dict[str, Any]:
    """Merges adapters into parameters, each in its own dtype.

    Args:
        params: parameters and adapters by dotted path, NumPy or jax arrays.
        config: the model.
        loras: configs of the adapters, one per part.

    Returns:
        Parameters by dotted path, without adapters.
    """
    merged = {path: value for path, value in params.items() if not is_adapter(path)}
    for lora in loras:
        for adapter in stored_adapters(config, lora.part, params.keys()):
            kernel = params[adapter.base.target]
            pairs = [(params[a.target], params[b.target]) for a, b in adapter.pairs]
            merged[adapter.base.target] = adapter.merge(kernel, pairs, lora.scale).astype(
                kernel.dtype
            )
    return merged


def part_prefixes(layout: str) -> Mapping[ModelPart, str]:
    """Returns part -> prefix of the full names of its tensors."""
    return {
        "vision": "vision_tower." if layout == "hf" else "vision_model.",
        "decoder": "language_model.",
    }
