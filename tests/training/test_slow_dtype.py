"""A run in bfloat16 on a CPU is told that float32 may be faster (design: platform.md 7)."""

import dataclasses

import pytest

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.run_config import ComputeConfig, MeshConfig, TrainConfig
from internvlx_jax.models.sharding import make_mesh
from internvlx_jax.training.run import warn_of_slow_dtype


@pytest.mark.parametrize("dtype, warned", [("bfloat16", True), ("float32", False)])
def test_the_warning(dtype, warned, caplog):
    config = TrainConfig(
        output_dir="runs/x", init_from="checkpoint", data=DataConfig(meta="meta.json")
    )
    config = dataclasses.replace(config, compute=ComputeConfig(dtype=dtype))
    warn_of_slow_dtype(config, make_mesh(MeshConfig()))
    assert ("compute.dtype=float32" in caplog.text) == warned
