"""InternVL-X 8B with RVTC, second fine-tune on own data: the release's settings."""

from internvlx_jax.core.presets import internvlx_8b
from internvlx_jax.core.recipes import x_hd_2nd_finetune
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return x_hd_2nd_finetune(
        internvlx_8b(), name="internvlx_8b_hd", init_from="checkpoints/InternVL-X-8B-HD"
    )
