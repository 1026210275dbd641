"""Second fine-tuning of a released HD checkpoint on your own data: RVTC, six tiles and a thumbnail.

The settings of the released script with `lvtc=off`; with LVTC they are this project's choice:

    lvtc=paper  256 tokens per tile in the shallow layers, 1,024 in the deep ones
    lvtc=fast   64 tokens per tile in the shallow layers, 256 in the deep ones

The frozen tower keeps its drop path (`vit_mode="train"`) as in the script; that every trained
parameter decays (`decay_rule="all"`) is inferred from it.
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
    # Lengths count the deep layers' tokens: seven tiles of 1,024 take 7,168 of them.
    max_length = 8192 if lvtc.startswith("paper") else 4096
    return TrainConfig(
        output_dir=f"runs/hd_finetune_{size}_{lvtc}",
        init_from=f"checkpoints/InternVL-X-{size.upper()}-HD",
        model=internvlx(size, lvtc, drop_path=0.1, tiles=TileConfig(rule="edge", max_num=6)),
        freeze=FreezeConfig(vit=True, vit_mode="train"),
        data=DataConfig(
            meta="data/meta.json",
            batch_mode="samples",
            samples_per_step=128,
            max_length=max_length,
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
