"""Upstream InternVL2, second fine-tuning of projector and decoder, six tiles per image.

The settings of upstream's script, whose frozen tower keeps its drop path (`vit_mode="train"`).
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
        output_dir=f"runs/internvl2_finetune_{size}",
        init_from=f"checkpoints/InternVL-X-{size.upper()}-HD",
        model=internvlx(size, drop_path=0.1, tiles=TileConfig(rule="off", max_num=6)),
        freeze=FreezeConfig(vit=True, vit_mode="train"),
        data=DataConfig(
            meta="data/meta.json", batch_mode="samples", samples_per_step=128, max_length=4096
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
