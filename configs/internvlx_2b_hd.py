"""InternVL-X 2B with RVTC, second fine-tune on own data: the release's settings."""

from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.core.recipes import x_hd_2nd_finetune
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return x_hd_2nd_finetune(
        internvlx_2b(), name="internvlx_2b_hd", init_from="checkpoints/InternVL-X-2B-HD"
    )
