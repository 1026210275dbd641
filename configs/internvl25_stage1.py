"""Upstream InternVL 2.5, stage 1: the projector, in packed rows.

The settings of upstream's scripts: 512 rows of 16,384 tokens and 48 tiles per step, tokens weighed
by the square root of their sample's length. Weight decay differs by size.
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

WEIGHT_DECAY = {"2b": 0.01, "8b": 0.05}


def get_config(size: Size = "2b") -> TrainConfig:
    return TrainConfig(
        output_dir=f"runs/internvl25_stage1_{size}",
        init_from=f"checkpoints/InternVL-X-{size.upper()}-parts",
        model=internvlx(size, drop_path=0.0, tiles=TileConfig(rule="off", max_num=12)),
        freeze=FreezeConfig(vit=True, llm=True),
        data=DataConfig(
            meta="data/meta.json",
            batch_mode="pack",
            tokens_per_step=512 * 16384,
            max_length=16384,
            pack=PackConfig(tiles=48),
            loss_reduction="square",
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
            schedule="cosine",
            warmup_steps=100,
            weight_decay=WEIGHT_DECAY[size],
            decay_rule="all",
        ),
        steps=100_000,
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
    )
