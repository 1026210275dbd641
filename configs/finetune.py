"""Second fine-tuning of a released checkpoint on your own data, one tile per image.

The settings of the released script. Its frozen tower keeps its drop path (`vit_mode="train"`);
that every trained parameter decays (`decay_rule="all"`) is inferred from the script.
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
        output_dir=f"runs/finetune_{size}_{lvtc}",
        init_from=f"checkpoints/InternVL-X-{size.upper()}",
        model=internvlx(size, lvtc, drop_path=0.1, tiles=TileConfig(dynamic=False)),
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
