"""InternVL-X 8B, stage 3: everything, one tile an image. Not the paper's recipe, which is not public."""

from internvlx_jax.models.presets import internvlx_8b
from internvlx_jax.training.config import TrainConfig
from internvlx_jax.training.recipes import x_sft


def get_config() -> TrainConfig:
    return x_sft(internvlx_8b(), name="internvlx_8b_sft",
                 init_from="runs/internvlx_8b_vit_projector")
