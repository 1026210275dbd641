"""InternVL-X 8B HD with LVTC `fast`: 64 tokens a tile in the shallow layers, 256 in the deep ones."""

from internvlx_jax.models.presets import internvlx_8b
from internvlx_jax.training.config import TrainConfig
from internvlx_jax.training.recipes import x_hd_2nd_finetune


def get_config() -> TrainConfig:
    return x_hd_2nd_finetune(internvlx_8b("fast"), name="internvlx_8b_hd_fast",
                              init_from="checkpoints/InternVL-X-8B-HD")
