"""InternVL-X 2B HD with LVTC `paper`: 256 tokens a tile in the shallow layers, 1,024 in the deep ones.

Slots of the long layout count: seven tiles fill 7,168.
"""

from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.core.recipes import x_hd_2nd_finetune
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return x_hd_2nd_finetune(
        internvlx_2b("paper"),
        name="internvlx_2b_hd_paper",
        init_from="checkpoints/InternVL-X-2B-HD",
        max_length=8192,
    )
