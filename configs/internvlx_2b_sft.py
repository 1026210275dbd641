"""InternVL-X 2B, stage 3: everything, one tile an image. Not the paper's recipe, which is not public."""

from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.core.recipes import x_sft
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return x_sft(
        internvlx_2b(), name="internvlx_2b_sft", init_from="runs/internvlx_2b_vit_projector"
    )
