"""The dry run of a training run: everything is checked and compiled, nothing is run or written."""

from __future__ import annotations

from jax.sharding import Mesh

from internvlx_jax.aot.compile_report import BucketReport, compile_report
from internvlx_jax.aot.topologies import Topology, local_topology
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.training.run import open_run


def dry_run(config: TrainConfig) -> tuple[Topology, list[BucketReport], Mesh]:
    """Compiles the train step of every bucket of a run for the attached devices.

    In contrast to `compile_report.report_config`, the buckets are those of the run's own data, and
    data, tokenizer and checkpoint are opened as the run would open them.

    Returns:
        The attached devices, a report per bucket, and the mesh of the run.

    Raises:
        ConfigError: The config, its data or its tokenizer cannot be used.
        CheckpointError: `init_from` holds another model.
    """
    run = open_run(config)
    where = local_topology()
    plan = run.loader.plan
    return where, compile_report(run.setup, plan.buckets, plan.rows, where), run.mesh
