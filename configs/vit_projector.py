"""Stage 2, vision tower and projector, with the settings that upstream InternVL used per size.

2B follows InternVL 1.5's pretraining, 8B follows stage 1.5 of InternVL 2.5 with its packed rows
(configs/internvl25_stage1_5.py). Not the paper's recipe, which is not public.
"""

from internvlx_jax.core.data_config import DataConfig, PackConfig
from internvlx_jax.core.presets import LvtcPreset, Size, internvlx
from internvlx_jax.core.run_config import (
    ComputeConfig,
    FreezeConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from internvlx_jax.core.tile_config import TileConfig

DATA = {
    "2b": DataConfig(
        meta="data/meta.json", batch_mode="samples", samples_per_step=2048, max_length=4096
    ),
    "8b": DataConfig(
        meta="data/meta.json",
        batch_mode="pack",
        tokens_per_step=512 * 16384,
        max_length=16384,
        pack=PackConfig(tiles=48),
        loss_reduction="square",
    ),
}
LEARNING_RATE = {"2b": 2e-5, "8b": 1e-5}
WEIGHT_DECAY = {"2b": 0.01, "8b": 0.05}


def get_config(size: Size = "2b", lvtc: LvtcPreset = "off") -> TrainConfig:
    return TrainConfig(
        output_dir=f"runs/vit_projector_{size}_{lvtc}",
        init_from=f"runs/pretrain_{size}_{lvtc}",
        model=internvlx(size, lvtc, drop_path=0.1, tiles=TileConfig(rule="off", max_num=12)),
        freeze=FreezeConfig(llm=True),
        data=DATA[size],
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE[size],
            schedule="cosine",
            warmup_steps=100,
            weight_decay=WEIGHT_DECAY[size],
            decay_rule="all",
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
    )
