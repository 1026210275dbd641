"""Upstream InternVL 2.5, stage 1.5: vision tower and projector, in packed rows.

The settings of upstream's 8B script.
"""

from internvlx_jax.core.data_config import DataConfig, PackConfig
from internvlx_jax.core.presets import Size, internvlx
from internvlx_jax.core.run_config import (
    ComputeConfig,
    FreezeConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from internvlx_jax.core.tile_config import TileConfig


def get_config(size: Size = "8b") -> TrainConfig:
    return TrainConfig(
        output_dir=f"runs/internvl25_stage1_5_{size}",
        init_from=f"runs/internvl25_stage1_{size}",
        model=internvlx(size, drop_path=0.1, tiles=TileConfig(rule="off", max_num=12)),
        freeze=FreezeConfig(llm=True),
        data=DataConfig(
            meta="data/meta.json",
            batch_mode="pack",
            tokens_per_step=512 * 16384,
            max_length=16384,
            pack=PackConfig(tiles=48),
            loss_reduction="square",
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-5,
            schedule="cosine",
            warmup_steps=100,
            weight_decay=0.05,
            decay_rule="all",
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
    )
