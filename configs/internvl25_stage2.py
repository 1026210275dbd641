"""Upstream InternVL 2.5, stage 2: everything, in packed rows.

The settings of upstream's scripts. Weight decay and length differ by size; 8B goes on from stage
1.5, 2B from stage 1.
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

BEFORE = {"2b": "stage1", "8b": "stage1_5"}
WEIGHT_DECAY = {"2b": 0.01, "8b": 0.05}
STEPS = {"2b": 22_000, "8b": 5_500}


def get_config(size: Size = "2b") -> TrainConfig:
    return TrainConfig(
        output_dir=f"runs/internvl25_stage2_{size}",
        init_from=f"runs/internvl25_{BEFORE[size]}_{size}",
        model=internvlx(size, drop_path=0.1, tiles=TileConfig(rule="off", max_num=12)),
        freeze=FreezeConfig(),
        data=DataConfig(
            meta="data/meta.json",
            batch_mode="pack",
            tokens_per_step=512 * 16384,
            max_length=16384,
            pack=PackConfig(tiles=48),
            loss_reduction="square",
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-5,
            schedule="cosine",
            warmup_ratio=0.03,
            weight_decay=WEIGHT_DECAY[size],
            decay_rule="all",
        ),
        steps=STEPS[size],
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
    )
