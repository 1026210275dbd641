"""Stage 3 with RVTC, supervised fine-tuning of everything: six tiles and a thumbnail per image.

A stand-in after InternVL 1.5's fine-tuning: the paper's recipe is not public.
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
        output_dir=f"runs/hd_sft_{size}_{lvtc}",
        init_from=f"runs/vit_projector_{size}_{lvtc}",
        model=internvlx(size, lvtc, drop_path=0.1, tiles=TileConfig(rule="edge", max_num=6)),
        freeze=FreezeConfig(),
        data=DataConfig(
            meta="data/meta.json", batch_mode="samples", samples_per_step=512, max_length=8192
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-5, schedule="cosine", warmup_ratio=0.03, weight_decay=0.01
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
    )
