"""Mesh axes and the rules that map logical parameter axes to them. Mesh axis names appear in this file only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from internvlx_jax.errors import ConfigError
from internvlx_jax.models.internvlx import ActivationShardings

BATCH_AXES = ("data", "fsdp")
RULES = {
    "layers": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; -1 (at most once) takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A data x fsdp x tensor mesh over all devices. Raises ConfigError when the sizes do not multiply to them."""
    devices = list(devices or jax.devices())
    sizes = dataclasses.asdict(config)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ConfigError(f"mesh: only one of {', '.join(open_axes)} may be -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"mesh {sizes} needs {math.prod(sizes.values())} devices, {len(devices)} are present; "
                          "set one of mesh.data, mesh.fsdp, mesh.tensor to -1 or change the others")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes),
                         devices=devices)


def param_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
    """Partition of one parameter. A dim that its mesh axis does not divide stays whole (e.g. 92,553 rows)."""
    names = [RULES[axis] if axis else None for axis in axes]
    return PartitionSpec(*(name if name and size % mesh.shape[name] == 0 else None
                           for size, name in zip(shape, names, strict=True)))


def param_shardings(shapes: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, tuple[str | None, ...]],
                    mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every parameter, by dotted path."""
    return {path: NamedSharding(mesh, param_spec(leaf.shape, axes[path], mesh)) for path, leaf in shapes.items()}


def optimizer_shardings(optimizer: optax.GradientTransformation, shapes: Mapping[str, jax.ShapeDtypeStruct],
                        shardings: Mapping[str, NamedSharding], mesh: Mesh) -> optax.OptState:
    """Moments are placed like their parameters; counters are whole everywhere."""
    state = jax.eval_shape(optimizer.init, dict(shapes))
    return optax.tree_utils.tree_map_params(optimizer, lambda _, sharding: sharding, state, dict(shardings),
                                            transform_non_params=lambda _: replicated(mesh))


def placed(shapes: Any, shardings: Any) -> Any:
    """Abstract leaves that carry where they live, e.g. for orbax to restore into."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        shapes, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def activation_shardings(mesh: Mesh) -> ActivationShardings:
    """Rows as in the batch. A lookup takes the rows of `data` in a table whose width is divided over `fsdp`; from there
    one all-to-all brings each device its rows. Heads as their kernels."""
    return ActivationShardings(rows=batch_sharding(mesh),
                               looked_up=NamedSharding(mesh, PartitionSpec("data", None, "fsdp")),
                               heads=NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, RULES["heads"])))


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the rows of a batch, cut in `count` equal parts, that this process's devices hold.

    Processes that share their rows, e.g. along the tensor axis, get the same part. Raises ConfigError when the rows of
    a process are not next to each other.
    """
    shards = data_parallel_size(mesh)
    held = batch_sharding(mesh).addressable_devices_indices_map((shards,))
    rows = sorted({index[0].start or 0 for index in held.values()})
    if shards % len(rows) or rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise ConfigError(f"mesh {dict(mesh.shape)}: a process would hold the parts {rows} of the {shards} parts of a "
                          "batch; choose mesh.data and mesh.fsdp so that those of a process are consecutive")
    return rows[0] // len(rows), shards // len(rows)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_parallel_size(mesh: Mesh) -> int:
    """Number of shards of the batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
