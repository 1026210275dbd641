"""Stage 1, projector warm-up: builds InternVL-X from a vision tower and a language model.

A stand-in after upstream's stage 1: the paper's pretraining recipe is not public. One tile per
image; LVTC's parameters are trained with the projector.
"""

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.presets import LvtcPreset, Size, internvlx
from internvlx_jax.core.run_config import (
    ComputeConfig,
    FreezeConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from internvlx_jax.core.tile_config import TileConfig


def get_config(size: Size = "2b", lvtc: LvtcPreset = "off") -> TrainConfig:
    return TrainConfig(
        output_dir=f"runs/pretrain_{size}_{lvtc}",
        init_from=f"checkpoints/InternVL-X-{size.upper()}-parts",
        model=internvlx(size, lvtc, drop_path=0.0, tiles=TileConfig(dynamic=False)),
        freeze=FreezeConfig(vit=True, llm=True),
        data=DataConfig(
            meta="data/meta.json", batch_mode="samples", samples_per_step=512, max_length=4096
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, schedule="cosine", warmup_steps=100, weight_decay=0.01
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
    )
