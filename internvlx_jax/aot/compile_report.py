"""What each step of a run takes on devices that need not be attached.

(design: training.md 5, 8; platform.md 2)

    internvlx compile --config configs/hd_finetune.py --topology v5e:16x16 --out report.json

Per bucket and device: memory against what the device has, analytic FLOPs by part, traffic of main
memory and of the network as in the compiled program, and a lower bound of the time from all three.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from internvlx_jax.aot.hlo import moved
from internvlx_jax.aot.topologies import Topology, topology
from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.core.chips import GIB
from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import load_config_file, override
from internvlx_jax.data.buckets import BatchRule, Bucket, smallest_bucket
from internvlx_jax.models.flops import Flops, forward_flops, train_flops
from internvlx_jax.models.sharding import data_parallel_size, make_mesh
from internvlx_jax.training.executables import REMEDIES, compile_train_step, peak_bytes
from internvlx_jax.training.setup import Setup, prepare

STEPS = 1000  # length of the schedule, which nothing reported depends on


@dataclasses.dataclass(frozen=True)
class BucketReport:
    """Describes one compiled train step; bytes, FLOPs and times are per device and step.

    Attributes:
        tiles: Tile slots per row.
        length: Token slots per row.
        short_length: Token slots per row in the short layout; 0 without LVTC.
        batch: Rows of the global step.
        argument_bytes: Memory of state and batch.
        temporary_bytes: Memory of intermediate results.
        peak_hbm_bytes: Memory that has to fit.
        flops: Analytic FLOPs of forward and backward pass, by part and in total; recomputation does
            not count.
        memory_bytes: Traffic of main memory.
        collectives: {"count", "bytes"} per kind: runs, and bytes received.
        compute_ms: Time of the arithmetic at the vendor's rate, with what remat computes again.
        memory_ms: Time of the memory traffic at the vendor's rate.
        network_ms: Time of the collectives at the vendor's rate.
        roofline_ms: The longest of the three, as if they overlapped entirely.
        roofline_mfu: `flops` in that time, as a share of the peak FLOP/s.
        compile_s: Seconds that compilation took.
    """

    tiles: int
    length: int
    short_length: int
    batch: int
    argument_bytes: int
    temporary_bytes: int
    peak_hbm_bytes: int
    flops: dict[str, float]
    memory_bytes: float
    collectives: dict[str, dict[str, float]]
    compute_ms: float | None
    memory_ms: float | None
    network_ms: float | None
    roofline_ms: float | None
    roofline_mfu: float | None
    compile_s: float


def bounding_buckets(data: DataConfig, model: ModelConfig) -> list[Bucket]:
    """Returns the buckets that bound a run whose data are not at hand.

    These are text only, one tile, and as many tiles as an image may have, each at full length;
    buckets made from data need at most as much. A packed row has one shape; without
    data.pack.tiles it is full of tiles.
    """
    tiles, saved = model.prompt.tiles, model.lvtc.saved_per_tile if model.lvtc else 0
    if data.batch_mode == "pack":
        counts = [data.pack.tiles or data.max_length // model.tokens_per_tile]
    else:
        most = tiles.max_num + (tiles.use_thumbnail and tiles.max_num > 1) if tiles.dynamic else 1
        counts = sorted({0, 1, most})
    return [smallest_bucket(count, data.max_length, data.length_step, saved) for count in counts]


def compile_report(
    setup: Setup, buckets: Sequence[Bucket], rows: Sequence[int], where: Topology
) -> list[BucketReport]:
    """Compiles and describes the steps of all buckets, side by side.

    Args:
        setup: The run, on the devices of `where`.
        buckets: Its buckets.
        rows: Rows of a step in each bucket.
        where: The devices.

    Raises:
        ConfigError: The compiler refuses a step because it does not fit.
    """

    def report(bucket: Bucket, rows: int) -> BucketReport:
        started = time.perf_counter()
        compiled = compile_train_step(setup, bucket, rows)
        return describe_step(
            setup, bucket, rows, compiled, where, seconds=time.perf_counter() - started
        )

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        return list(threads.map(report, buckets, rows))


def describe_step(
    setup: Setup, bucket: Bucket, rows: int, compiled: Any, where: Topology, *, seconds: float
) -> BucketReport:
    """Reads a compiled train step, whose compilation took `seconds`."""
    chip, count = where.chip, len(where.devices)
    memory, traffic = compiled.memory_analysis(), moved(compiled.as_text(), count)
    batch: dict[str, Any] = dict(
        tiles=rows * bucket.tiles,
        lengths=[bucket.length] * rows,
        short_lengths=[bucket.short_length] * rows,
    )
    useful = train_flops(
        setup.model, {path: leaf.shape for path, leaf in setup.state.trainable.items()}, **batch
    )
    again = _recomputed(setup, forward_flops(setup.model, **batch))
    devices = list(setup.mesh.devices.flat)
    collectives: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "bytes": 0.0})
    network = 0.0
    for each in traffic.collectives:
        collectives[each.kind]["count"] += each.times
        collectives[each.kind]["bytes"] += each.times * each.received
        if chip:
            network += (
                each.times
                * each.received
                / where.bandwidth([devices[number] for number in each.group])
            )
    times: dict[str, Any] = dict(
        compute_ms=None, memory_ms=None, network_ms=None, roofline_ms=None, roofline_mfu=None
    )
    if chip:
        seconds_of = (
            (useful.total + again) / count / chip.peak_flops,
            traffic.memory_bytes / chip.memory_bandwidth,
            network,
        )
        names = ("compute_ms", "memory_ms", "network_ms")
        times = dict(zip(names, (1e3 * s for s in seconds_of), strict=True))
        times |= dict(
            roofline_ms=1e3 * max(seconds_of),
            roofline_mfu=useful.total / count / chip.peak_flops / max(seconds_of),
        )
    parts = {name: flops / count for name, flops in dataclasses.asdict(useful).items()}
    return BucketReport(
        **dataclasses.asdict(bucket),
        batch=rows,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_hbm_bytes=peak_bytes(compiled),
        flops={**parts, "total": useful.total / count},
        memory_bytes=traffic.memory_bytes,
        collectives=dict(collectives),
        **times,
        compile_s=seconds,
    )


def _recomputed(setup: Setup, forward: Flops) -> float:
    """Returns the FLOPs of the forward pass that the backward pass repeats.

    These are the logits always, and the stacks that it crosses where no products are kept.
    """
    again = forward.head
    if setup.remat in ("full", "attention"):
        again += forward.decoder
        if any(path.startswith("vision.") for path in setup.state.trainable):
            again += forward.tower
    return again


def table(reports: Sequence[BucketReport], where: Topology, mesh: Mesh) -> str:
    """Returns a table for people, in Markdown."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    limit = (
        "memory of a device unknown"
        if where.memory is None
        else f"{where.memory / GIB:.2f} GiB per device"
    )
    lines = [
        f"{where.name}: {len(where.devices)} devices, {axes}; {limit}",
        "",
        "| tiles | slots | rows | peak GiB | arguments | temporaries | TFLOP: tower | projector | "
        "decoder | head | memory GB | collectives GB | compute ms | memory ms | network ms | "
        "roofline ms | MFU | compile s |",
        "|" + "---|" * 18,
    ]
    for r in reports:
        slots = f"{r.length}" + (f" ({r.short_length})" if r.short_length else "")
        received = ", ".join(
            f"{kind} {each['bytes'] / 1e9:.2f}" for kind, each in sorted(r.collectives.items())
        )
        gib = (
            f"{size / GIB:.2f}" for size in (r.peak_hbm_bytes, r.argument_bytes, r.temporary_bytes)
        )
        flops = (
            f"{r.flops[part] / 1e12:.2f}" for part in ("tower", "projector", "decoder", "head")
        )
        times = (
            "-" if ms is None else f"{ms:.0f}"
            for ms in (r.compute_ms, r.memory_ms, r.network_ms, r.roofline_ms)
        )
        mfu = "-" if r.roofline_mfu is None else f"{r.roofline_mfu:.1%}"
        lines.append(
            "| "
            + " | ".join(
                [
                    str(r.tiles),
                    slots,
                    str(r.batch),
                    *gib,
                    *flops,
                    f"{r.memory_bytes / 1e9:.1f}",
                    received or "none",
                    *times,
                    mfu,
                    f"{r.compile_s:.0f}",
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def check_fits(reports: Sequence[BucketReport], where: Topology) -> None:
    """Raises ConfigError, with what to change, when a step needs more memory than a device has."""
    if where.memory is None:
        return
    over = [r for r in reports if r.peak_hbm_bytes > where.memory]
    if over:
        listed = ", ".join(
            f"{r.tiles} tiles and {r.length} slots: {r.peak_hbm_bytes / GIB:.2f} GiB" for r in over
        )
        raise ConfigError(
            f"{len(over)} of {len(reports)} buckets do not fit the {where.memory / GIB:.2f} GiB of "
            f"a device ({listed}); change one of: {REMEDIES}"
        )


def report_config(
    path: str | Path,
    settings: Sequence[str],
    topology_name: str,
    tiles: Sequence[int] | None = None,
) -> tuple[Topology, list[BucketReport], Mesh]:
    """Compiles the bounding buckets of a config file for a topology.

    Args:
        path: Config file, with arguments as in `load_config_file`.
        settings: `FIELD=VALUE` overrides.
        topology_name: Devices, as in `topologies.topology`.
        tiles: Only buckets with these numbers of tile slots.

    Raises:
        ConfigError: The config, the topology or `tiles` does not exist, or a step does not fit.
    """
    config = override(load_config_file(path), settings)
    model, data = config.model or open_checkpoint(config.init_from).config, config.data
    where = topology(topology_name)
    mesh = make_mesh(config.mesh, where.devices, rows=config.micro_batch)
    row_quantum = data.row_quantum or data_parallel_size(mesh) * config.compute.accumulation
    rule = BatchRule(
        row_quantum=row_quantum,
        samples=data.samples_per_step if data.batch_mode == "samples" else None,
        tokens=data.tokens_per_step,
        tiles=data.tiles_per_step,
    )
    possible = bounding_buckets(data, model)
    buckets = [bucket for bucket in possible if tiles is None or bucket.tiles in tiles]
    if not buckets and tiles is not None:
        raise ConfigError(
            f"--tiles {' '.join(map(str, tiles))}: the buckets have "
            f"{', '.join(str(bucket.tiles) for bucket in possible)} tiles"
        )
    rows = [rule.rows(bucket) for bucket in buckets]
    return where, compile_report(prepare(config, model, mesh, STEPS), buckets, rows, where), mesh
