"""Upstream InternVL 1.5, fine-tuning of everything, up to twelve tiles per image.

The settings of upstream's 2B script.
"""

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.presets import Size, internvlx
from internvlx_jax.core.run_config import (
    ComputeConfig,
    FreezeConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from internvlx_jax.core.tile_config import TileConfig


def get_config(size: Size = "2b") -> TrainConfig:
    return TrainConfig(
        output_dir=f"runs/internvl15_finetune_{size}",
        init_from=f"runs/internvl15_pretrain_{size}",
        model=internvlx(size, drop_path=0.1, tiles=TileConfig(rule="off", max_num=12)),
        freeze=FreezeConfig(),
        data=DataConfig(
            meta="data/meta.json", batch_mode="samples", samples_per_step=1024, max_length=8192
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-5,
            schedule="cosine",
            warmup_ratio=0.03,
            weight_decay=0.01,
            decay_rule="all",
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
    )
