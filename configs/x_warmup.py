"""InternVL-X on InternVL3 or 3.5, first stage: the new projector alone.

Tower and decoder are those of the released checkpoint; PVTC (and what LVTC adds) starts fresh. The
settings are this project's choice, after upstream's first stage.
"""

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.family_presets import Base, internvlx_on
from internvlx_jax.core.presets import LvtcPreset
from internvlx_jax.core.run_config import (
    ComputeConfig,
    FreezeConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from internvlx_jax.core.tile_config import TileConfig


def get_config(base: Base = "internvl3_5_2b", lvtc: LvtcPreset = "off") -> TrainConfig:
    return TrainConfig(
        output_dir=f"runs/x_warmup_{base}_{lvtc}",
        init_from=f"checkpoints/{base}",
        model=internvlx_on(base, lvtc, drop_path=0.0, tiles=TileConfig(rule="edge", max_num=6)),
        freeze=FreezeConfig(vit=True, llm=True),
        data=DataConfig(
            meta="data/meta.json", batch_mode="samples", samples_per_step=512, max_length=8192
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
            schedule="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            decay_rule="standard",
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
    )
