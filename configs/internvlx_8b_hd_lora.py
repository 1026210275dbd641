"""InternVL-X 8B with RVTC, adapters of rank 16 on the decoder, second fine-tune on own data."""

from internvlx_jax.core.presets import internvlx_8b
from internvlx_jax.core.recipes import x_hd_2nd_lora
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return x_hd_2nd_lora(
        internvlx_8b(), name="internvlx_8b_hd_lora", init_from="checkpoints/InternVL-X-8B-HD"
    )
