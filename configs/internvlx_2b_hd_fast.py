"""InternVL-X 2B HD with LVTC `fast`: 64 tokens a tile in the shallow layers, 256 in the deep ones."""

from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.core.recipes import x_hd_2nd_finetune
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return x_hd_2nd_finetune(
        internvlx_2b("fast"), name="internvlx_2b_hd_fast", init_from="checkpoints/InternVL-X-2B-HD"
    )
