"""Mesh axes, and the rules that map logical axes of parameters to them.

Mesh axis names appear in this file only, so that another way to divide a model is a change of
this file. Parameters carry logical names: `embed`, `mlp`, `heads`, ...
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.models.internvlx import ActivationShardings
from internvlx_jax.models.loss import LossShardings

BATCH_AXES = ("data", "fsdp")
# Devices along fsdp, at most: over all 256 chips of a pod XLA sums whole gradients in place of
# their shards (docs/scaling.md).
FSDP_WIDTH = 64
RULES = {
    "layers": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": None,  # 92,553 rows divide by nothing; the loss divides its slots instead
}


def mesh_sizes(
    config: MeshConfig, devices: int, *, slices: int = 1, rows: int | None = None
) -> dict[str, int]:
    """Resolves every -1 among the axis sizes.

    Args:
        config: Sizes of the run's config.
        devices: Number of devices.
        slices: Slices of a multi-slice TPU.
        rows: Rows per step, where that is a fixed number.

    Raises:
        ConfigError: The sizes do not multiply to the devices, or `data` does not extend over all
            slices.
    """
    sizes = dataclasses.asdict(config)
    remaining = [name for name, size in sizes.items() if size == -1]
    if len(remaining) > 1 and "tensor" in remaining:
        free = devices // math.prod(size for size in sizes.values() if size != -1)
        fits = (size for size in _divisors(free) if rows is None or rows % (devices // size) == 0)
        sizes["tensor"] = next(fits, 1)
    if sizes["data"] == sizes["fsdp"] == -1:
        sizes["fsdp"] = max(
            size for size in _divisors(devices // slices // sizes["tensor"]) if size <= FSDP_WIDTH
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: devices // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ConfigError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, {devices} are present; "
            "set one of mesh.data, mesh.fsdp, mesh.tensor to -1 or change the others"
        )
    if sizes["data"] % slices:
        raise ConfigError(
            f"mesh {sizes}: mesh.data must be a multiple of the {slices} slices, since fsdp and "
            "tensor do not extend over the network between them"
        )
    return sizes


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def make_mesh(
    config: MeshConfig, devices: Sequence[Any] | None = None, *, rows: int | None = None
) -> Mesh:
    """Makes a data x fsdp x tensor mesh over all devices; see `mesh_sizes`.

    Neighbors in the network are next to each other on the mesh. `data` extends over slices and the
    others stay inside one, since they exchange far more.
    """
    devices = list(devices or jax.devices())
    slices = (
        len({getattr(device, "slice_index", 0) for device in devices})
        if devices[0].platform == "tpu"
        else 1
    )
    sizes = mesh_sizes(config, len(devices), slices=slices, rows=rows)
    inner = {**sizes, "data": sizes["data"] // slices}
    if slices > 1:
        outer = {**dict.fromkeys(sizes, 1), "data": slices}
        grid = mesh_utils.create_hybrid_device_mesh(
            tuple(inner.values()), tuple(outer.values()), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(
            tuple(inner.values()), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def param_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
    """Returns the partition of one parameter.

    A dim that its mesh axis does not divide stays whole.
    """
    names = [RULES[axis] if axis else None for axis in axes]
    return PartitionSpec(
        *(
            name if name and size % mesh.shape[name] == 0 else None
            for size, name in zip(shape, names, strict=True)
        )
    )


def param_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    axes: Mapping[str, tuple[str | None, ...]],
    mesh: Mesh,
) -> dict[str, NamedSharding]:
    """Returns the sharding of every parameter, by dotted path."""
    return {
        path: NamedSharding(mesh, param_spec(leaf.shape, axes[path], mesh))
        for path, leaf in shapes.items()
    }


def optimizer_shardings(
    optimizer: optax.GradientTransformation,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
    mesh: Mesh,
) -> optax.OptState:
    """Returns the sharding of an optimizer's state.

    Moments are placed like their parameters; counters are whole everywhere.
    """
    state = jax.eval_shape(optimizer.init, dict(shapes))
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        dict(shardings),
        transform_non_params=lambda _: replicated(mesh),
    )


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns abstract leaves that carry their shardings, e.g. for orbax to restore into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def activation_shardings(mesh: Mesh) -> ActivationShardings:
    """Returns where activations live.

    Rows are as in the batch and heads as their kernels. A lookup takes the rows of `data` in a
    table whose width is divided over `fsdp`; from there one all-to-all brings each device its
    rows.
    """

    def sharding(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    rows = batch_sharding(mesh)
    return ActivationShardings(
        rows=rows,
        looked_up=sharding("data", None, "fsdp"),
        heads=sharding(BATCH_AXES, None, RULES["heads"]),
        loss=LossShardings(
            slots=sharding(BATCH_AXES, RULES["heads"]),
            rows=rows,
            head=sharding(RULES["embed"]),
            whole=sharding(),
        ),
    )


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Returns which rows of a batch this process's devices hold.

    Processes that share their rows, e.g. along the tensor axis, get the same part.

    Returns:
        (index, count): part `index` of the rows, cut in `count` equal parts.

    Raises:
        ConfigError: The rows of a process are not next to each other.
    """
    shards = data_parallel_size(mesh)
    held = batch_sharding(mesh).addressable_devices_indices_map((shards,))
    rows = sorted({index[0].start or 0 for index in held.values() if index is not None})
    if (
        shards % len(rows)
        or rows != list(range(rows[0], rows[0] + len(rows)))
        or rows[0] % len(rows)
    ):
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: a process would hold the parts {rows} of the {shards} parts "
            "of a batch; choose mesh.data and mesh.fsdp so that those of a process are consecutive"
        )
    return rows[0] // len(rows), shards // len(rows)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of what every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def spread_sharding(shape: tuple[int, ...]) -> NamedSharding:
    """Returns equal parts of the leading dim over as many devices of this process as divide it."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if shape[0] % n == 0)
    return NamedSharding(Mesh(np.array(devices[:count]), ("part",)), PartitionSpec("part"))


def spread(array: np.ndarray) -> jax.Array:
    """Places an array under its `spread_sharding`, without copying aligned CPU memory."""
    sharding = spread_sharding(array.shape)
    devices = list(cast(Mesh, sharding.mesh).devices)
    parts = [
        jax.device_put(part, device, may_alias=True)
        for part, device in zip(np.split(array, len(devices)), devices, strict=True)
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def data_parallel_size(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
