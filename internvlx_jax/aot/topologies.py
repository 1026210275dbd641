"""Devices that need not be attached, for compiling without hardware (design: platform.md 2)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from internvlx_jax.core.chips import CHIPS, DEVICE_KINDS, Chip
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.training.executables import device_memory

ALIASES = {"v5": "v5p"}  # the compiler's name of v5p

# The compiler asks for these instead of looking for a TPU in this machine.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Describes the devices that a step is compiled for.

    Attributes:
        name: Name of the topology, or kind of the attached devices.
        chip: What the vendor says of a device; None for devices that are not in CHIPS.
        memory: Bytes that a program may use on a device; None if unknown.
        devices: The devices, attached or not.
    """

    name: str
    chip: Chip | None
    memory: float | None
    devices: Sequence[Any]

    def bandwidth(self, group: Sequence[Any]) -> float:
        """Returns the bytes per second that a device can receive from a group it is in.

        They come over both directions of every axis of the torus that the group extends along, over
        NVLink, or over the network when the group spans slices or hosts. Needs a known chip.
        """
        chip = self.chip
        assert chip is not None
        slices = {getattr(device, "slice_index", None) for device in group}
        if chip.platform == "cuda":
            return (
                chip.link if len({device.process_index for device in group}) == 1 else chip.network
            )
        if len(slices) > 1:
            return chip.network
        coordinates = np.array([device.coords for device in group])
        extents = [len(np.unique(column)) for column in coordinates.T]
        links = sum(2 if extent > 2 else 1 for extent in extents if extent > 1)
        return max(links, 1) * chip.link


def topology(name: str) -> Topology:
    """Returns the devices that a name stands for.

    Args:
        name: `v5e:16x16`, `v5p:4x4x8`, `v6e:16x16*2` (two slices), `h200:1x1x8` (slices x hosts x
            GPUs).

    Raises:
        ConfigError: No compiler knows the name, or the compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    kind = ALIASES.get(kind, kind)
    shape, _, slices = shape.partition("*")
    if (
        kind not in CHIPS
        or not shape
        or not all(part.isdigit() for part in [*shape.split("x"), slices or "1"])
    ):
        raise ConfigError(
            f"--topology {name}: expected CHIP:AxB[xC], e.g. v5e:16x16, v5p:4x4x8, v6e:16x16*2 "
            f"(two slices) or h200:1x1x8; chips: {', '.join(CHIPS)}"
        )
    chip = CHIPS[kind]
    try:
        if chip.platform == "tpu":
            os.environ.update(
                {key: os.environ.get(key, value) for key, value in _TPU_ENVIRONMENT.items()}
            )
            options: dict[str, Any] = {"num_slices": int(slices)} if slices else {}
            if kind == "v4":
                options["chip_config_name"] = "megacore"
            compiler_name = {"v5p": "v5"}.get(kind, kind)
            found = topologies.get_topology_desc(f"{compiler_name}:{shape}", "tpu", **options)
        else:
            target = _HOPPER.format(
                name=f"NVIDIA {kind.upper()}",
                bandwidth=int(chip.memory_bandwidth),
                memory=int(chip.memory),
            )
            found = topologies.get_topology_desc(kind, "cuda", target_config=target, topology=shape)
    except (RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        raise ConfigError(
            f"--topology {name}: {str(error).splitlines()[0]}; install the compiler with "
            f"pip install 'internvlx-jax[{'tpu' if chip.platform == 'tpu' else 'cuda'}]' and check "
            "that such a topology exists"
        ) from error
    return Topology(name, chip, chip.memory, found.devices)


def local_topology() -> Topology:
    """Returns the attached devices."""
    devices = jax.devices()
    kind = devices[0].device_kind
    chip = CHIPS.get(DEVICE_KINDS.get(kind, ""))
    return Topology(kind, chip, device_memory(devices[0]), devices)
