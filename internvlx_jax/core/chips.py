"""What accelerators can do, by the figures of their vendors (design: platform.md 2)."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Holds a vendor's figures of one device; bandwidths are in bytes per second.

    Attributes:
        platform: `tpu` or `cuda`.
        peak_flops: bfloat16 FLOP/s.
        memory: Bytes that a program may use.
        memory_bandwidth: Of main memory.
        link: One direction of one link. A TPU has two links per axis of its torus; all NVLinks of
            a GPU count as one.
        network: From a device to other slices or hosts.
    """

    platform: str
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float


CHIPS = {
    "v4": Chip("tpu", 275e12, 30.75 * GIB, 1.2e12, 45e9, 6.25e9),
    "v5e": Chip("tpu", 197e12, 15.75 * GIB, 0.82e12, 45e9, 3.125e9),
    "v5p": Chip("tpu", 459e12, 95.74 * GIB, 2.8e12, 90e9, 6.25e9),
    "v6e": Chip("tpu", 918e12, 31.25 * GIB, 1.6e12, 90e9, 12.5e9),
    "h100": Chip("cuda", 989e12, 79 * GIB, 3.35e12, 450e9, 50e9),
    "h200": Chip("cuda", 989e12, 140 * GIB, 4.8e12, 450e9, 50e9),
}

# What JAX calls a kind of device -> its name in CHIPS.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
