"""LoRA adapters: peft's tensors as parameters of ours, and their merge into the weights (design: checkpoints.md 9).

An adapter of the linear map `M.kernel` is two parameters beside it, in the axes of that kernel:

    M.lora_a  [L, *in, r]     M.lora_b  [L, r, *out]        kernel + scale * lora_a lora_b

A fused tensor (`wqkv`, `qkv`) has one pair. Where queries, keys and values are separate tensors that share our packed
kernel, each keeps a pair of its own: `M.lora_a_q`, `M.lora_b_q`, `M.lora_a_k`, ...

Arrays under such paths, wherever they come from, become a folder that peft loads with `write_adapters`:

    write_adapters(folder, params, config, LoraConfig(part="decoder", rank=16, alpha=32))

and parameters without adapters with `merge_params`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internvlx_jax.checkpoints.name_table import Entry, Part, name_table
from internvlx_jax.checkpoints.safetensors_writer import SafetensorsWriter
from internvlx_jax.checkpoints.tensors import ProtocolSpec, Tensors
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import read_json_object, write_json
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.models.lora import is_adapter

PARTS = {
    "vision": "vision.layers.",
    "decoder": "decoder.layers.",
}  # part -> where its linear maps are
REFUSED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "lora_bias",
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapters of one parameter: pairs of table entries, one pair for each separate source tensor."""

    base: Entry
    pairs: tuple[tuple[Entry, Entry], ...]

    @property
    def targets(self) -> list[str]:
        return [entry.target for pair in self.pairs for entry in pair]

    def merge(self, kernel: Any, pairs: Sequence[tuple[Any, Any]], scale: float) -> Any:
        """kernel + scale * a b in float32; NumPy or jax arrays, of one layer or of the stack."""
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


def adapter_table(table: Sequence[Entry], part: str) -> list[Adapter]:
    """The adapters that every linear map of a part could have, named as the layout of `table` names them.

    Sources are `NAME.lora_A.weight` and `NAME.lora_B.weight`, without the words peft puts around them.
    """
    return [
        _adapter(entry)
        for entry in table
        if entry.target.startswith(PARTS[part]) and entry.target.endswith(".kernel")
    ]


def _adapter(entry: Entry) -> Adapter:
    fused = len({part.source for part in entry.parts}) == 1
    groups = (
        [("", entry.parts)]
        if fused
        else [(f"_{letter}", (part,)) for letter, part in zip("qkv", entry.parts)]
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
    """Pattern of a weight [out, in] -> those of A [r, in] and B [out, r]."""
    (out, into), target = _axes(pattern)
    inside = set(re.findall(r"\w", into))
    a = " ".join(axis for axis in target if axis in inside)
    b = " ".join(axis for axis in target if axis not in inside)
    return f"r {into} -> {a} r", f"{out} r -> r {b}"


def _out_axis(entry: Entry) -> int:
    """Where `entry.axis` of the kernel is in lora_b."""
    (_, into), _ = _axes(entry.parts[0].pattern)
    return entry.axis - len(re.findall(r"\w", into)) + 1


def _axes(pattern: str) -> tuple[list[str], list[str]]:
    source, target = pattern.split(" -> ")
    return re.findall(r"\([^)]*\)|\w", source), target.split()


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of one part, with where their tensors are."""

    config: LoraConfig
    adapters: tuple[Adapter, ...]
    tensors: Tensors

    def read(self, entry: Entry, layer: int) -> np.ndarray:
        return entry.to_target([self.tensors.read(name) for name in entry.sources(layer)])

    def merged(self, adapter: Adapter, layer: int, kernel: np.ndarray) -> np.ndarray:
        """One layer's kernel with its adapters, float32."""
        pairs = [(self.read(a, layer), self.read(b, layer)) for a, b in adapter.pairs]
        return adapter.merge(kernel, pairs, self.config.scale)


def find_adapters(
    table: Sequence[Entry], config: LoraConfig, tensors: Tensors
) -> tuple[list[Adapter], list[str]]:
    """The adapters whose tensors are there, and everything that is wrong with them."""
    stored, used, found, problems = set(tensors.names()), set(), [], []
    for adapter in adapter_table(table, config.part):
        names = [
            name
            for pair in adapter.pairs
            for entry in pair
            for layer in range(entry.layers)
            for name in entry.sources(layer)
        ]
        if not stored.intersection(names):
            continue
        found.append(adapter)
        used.update(names)
        problems += [
            f"adapter tensor {name} is missing, others of {adapter.base.target} are there"
            for name in dict.fromkeys(names)
            if name not in stored
        ]
    problems += [
        f"adapter tensor {name} belongs to no linear map of this model's {config.part} part"
        for name in sorted(stored - used)
    ]
    for name in sorted(stored & used):
        rank = tensors.shape(name)[0 if name.endswith("lora_A.weight") else 1]
        if rank != config.rank:
            problems.append(
                f"adapter tensor {name} {list(tensors.shape(name))} has rank {rank}, the config says "
                f"r = {config.rank}"
            )
    return found, problems


def stored_adapters(config: ModelConfig, part: str, paths: Collection[str]) -> list[Adapter]:
    """The adapters of one part among parameter paths of ours, all named as one layout names them.

    Raises ConfigError for paths that no layout of this model takes.
    """
    wanted = {path for path in paths if is_adapter(path) and path.startswith(PARTS[part])}
    tables = [name_table(config)]
    if config.projector.kind == "mlp1" and config.decoder.family != "phi3":
        tables.append(name_table(config, "hf"))  # which knows separate adapters of q, k and v
    for table in tables:
        found = [
            adapter for adapter in adapter_table(table, part) if wanted.issuperset(adapter.targets)
        ]
        if wanted == {path for adapter in found for path in adapter.targets}:
            return found
    raise ConfigError(
        f"LoRA parameters {', '.join(sorted(wanted))} are not those of one layout of this model; each "
        "linear map has lora_a and lora_b, and q, k and v have one pair together or one each"
    )


def merge_params(
    params: Mapping[str, Any], config: ModelConfig, loras: Sequence[LoraConfig]
) -> dict[str, Any]:
    """Parameters and adapters by path -> the parameters with the adapters in them, in their own dtypes."""
    merged = {path: value for path, value in params.items() if not is_adapter(path)}
    for lora in loras:
        for adapter in stored_adapters(config, lora.part, params.keys()):
            kernel = params[adapter.base.target]
            pairs = [(params[a.target], params[b.target]) for a, b in adapter.pairs]
            merged[adapter.base.target] = adapter.merge(kernel, pairs, lora.scale).astype(
                kernel.dtype
            )
    return merged


def read_adapter_config(folder: Path, part: str) -> LoraConfig:
    """adapter_config.json of peft. Raises ConfigError naming what is not supported."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ConfigError(f"{file} is missing: a LoRA folder of peft has one")
    stored = read_json_object(file)
    if stored.get("peft_type") != "LORA":
        raise ConfigError(
            f"{file}: peft_type is {stored.get('peft_type')!r}; only 'LORA' is supported"
        )
    for field in REFUSED:
        if stored.get(field):
            raise ConfigError(
                f"{file}: {field} = {stored[field]!r} is not supported; merge the adapter with peft"
            )
    if stored.get("bias", "none") != "none":
        raise ConfigError(
            f"{file}: bias = {stored['bias']!r} is not supported, only 'none'; merge the adapter with peft"
        )
    if stored.get("fan_in_fan_out"):
        raise ConfigError(
            f"{file}: fan_in_fan_out = true is not supported: the linear maps here are [out, in]"
        )
    try:
        return LoraConfig(
            part=part,
            rank=stored["r"],
            alpha=stored["lora_alpha"],
            dropout=stored.get("lora_dropout", 0.0),
            use_rslora=bool(stored.get("use_rslora")),
        )
    except KeyError as error:
        raise ConfigError(f"{file}: {error.args[0]} is missing") from error


def read_adapter_folder(
    folder: Path, table: Sequence[Entry], layout: str, tensors: Tensors
) -> Lora:
    """A LoRA folder of peft: one part's adapters, for a checkpoint whose name table is `table`.

    tensors: of the folder. Raises ConfigError and CheckpointError naming everything that does not fit.
    """
    problems = [
        f"{name}: expected base_model.model.NAME.lora_A.weight or .lora_B.weight"
        for name in tensors.names()
        if not re.fullmatch(r"base_model\.model\..*\.lora_[AB]\.weight", name)
    ]
    if problems:
        raise CheckpointError(folder, problems)
    known = {
        source
        for adapter in (*adapter_table(table, "vision"), *adapter_table(table, "decoder"))
        for pair in adapter.pairs
        for entry in pair
        for layer in range(entry.layers)
        for source in entry.sources(layer)
    }
    short = [name.removeprefix("base_model.model.") for name in tensors.names()]
    fitting = {
        part: sum(prefix + name in known for name in short)
        for part, prefix in part_prefixes(layout).items()
    }
    part = max(fitting, key=fitting.get)
    config = read_adapter_config(folder, part)
    prefix = part_prefixes(layout)[part]
    view = ProtocolSpec({prefix + name: (tensors, f"base_model.model.{name}") for name in short})
    adapters, problems = find_adapters(table, config, view)
    if problems:
        raise CheckpointError(folder, problems)
    return Lora(config, tuple(adapters), view)


def write_adapters(
    folder: Path, params: Mapping[str, Any], config: ModelConfig, lora: LoraConfig
) -> dict[str, np.ndarray]:
    """Write the adapters of `lora.part` among `params` to `folder`, as peft reads them -> its tensors by their names.

    params: NumPy or jax arrays by dotted path; other paths are left alone. Their dtypes are kept.

    Raises ConfigError where there are none, or where they do not fit the model or the rank, and CheckpointError where
    one tensor of PyTorch's (a fused one) would have to hold two.
    """
    adapters = stored_adapters(config, lora.part, params.keys())
    if not adapters:
        raise ConfigError(f"no LoRA parameters of the {lora.part} part")
    entries = [entry for adapter in adapters for pair in adapter.pairs for entry in pair]
    for entry in entries:
        rank = params[entry.target].shape[-1 if ".lora_a" in entry.target else 1]
        if rank != lora.rank:
            raise ConfigError(
                f"{entry.target} {list(params[entry.target].shape)} has rank {rank}, the config says r = "
                f"{lora.rank}"
            )
    tensors, rows, problems = {}, {}, []
    for entry in entries:
        leaf = np.asarray(params[entry.target])
        for layer in range(entry.layers):
            for part, source, values in zip(
                entry.parts, entry.sources(layer), entry.to_sources(leaf[layer])
            ):
                name = "base_model.model." + source.split(".", 1)[1]
                if part.rows is not None:
                    rows.setdefault(name, []).append((part.rows[0], values))
                elif name in tensors and not np.array_equal(tensors[name], values):
                    problems.append(
                        f"{name}: the parameters that share it differ, so one tensor cannot hold them; "
                        "export merged weights instead"
                    )
                else:
                    tensors[name] = np.ascontiguousarray(values)
    if problems:
        raise CheckpointError(folder, problems)
    for name, pieces in rows.items():
        tensors[name] = np.concatenate(
            [values for _, values in sorted(pieces, key=lambda piece: piece[0])]
        )
    folder.mkdir(parents=True, exist_ok=True)
    writer = SafetensorsWriter(
        folder,
        {name: (array.shape, array.dtype) for name, array in tensors.items()},
        stem="adapter_model",
    )
    for name, array in tensors.items():
        writer.write(name, array)
    writer.finish()
    write_json(folder / "adapter_config.json", adapter_config(lora, module_names(adapters)))
    return tensors


def adapter_config(config: LoraConfig, modules: Sequence[str]) -> dict[str, Any]:
    """What peft reads beside adapter_model.safetensors."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if config.part == "decoder" else None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }


def module_names(adapters: Sequence[Adapter]) -> list[str]:
    """`target_modules` of the adapters, e.g. `attention.wqkv`."""
    sources = (pair[0].parts[0].source for adapter in adapters for pair in adapter.pairs)
    return sorted({re.sub(r"^.*\{l\}\.|\.lora_A\.weight$", "", source) for source in sources})


def part_prefixes(layout: str) -> Mapping[str, str]:
    """Part -> what the full names of its tensors begin with."""
    return {
        "vision": "vision_tower." if layout == "hf" else "vision_model.",
        "decoder": "language_model.",
    }


def in_place_names(names: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """(plain name, stored name, whether it is an adapter's) of a checkpoint trained with LoRA in place."""
    for name in names:
        plain = name.replace(".base_model.model.", ".", 1)
        if ".lora_" in plain:
            plain = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", plain)
            yield plain, name, True
        else:
            yield re.sub(r"\.base_layer\.(weight|bias)$", r".\1", plain), name, False
