"""Upstream InternVL2, second fine-tuning through adapters of rank 16 on the decoder.

The settings of upstream's script: six tiles per image, sixteen rows per step, no drop path.
"""

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.model_config import LoraConfig
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
        output_dir=f"runs/internvl2_lora_{size}",
        init_from=f"checkpoints/InternVL-X-{size.upper()}-HD",
        model=internvlx(size, drop_path=0.0, tiles=TileConfig(rule="off", max_num=6)),
        freeze=FreezeConfig(train_lora_only=True),
        lora=(LoraConfig(part="decoder", rank=16, alpha=32.0),),
        data=DataConfig(
            meta="data/meta.json", batch_mode="samples", samples_per_step=16, max_length=4096
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
