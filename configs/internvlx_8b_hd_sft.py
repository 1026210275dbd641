"""InternVL-X 8B with RVTC, stage 3: everything. Not the paper's recipe, which is not public."""

from internvlx_jax.models.presets import internvlx_8b
from internvlx_jax.training.config import TrainConfig
from internvlx_jax.training.recipes import x_hd_sft


def get_config() -> TrainConfig:
    return x_hd_sft(internvlx_8b(), name="internvlx_8b_hd_sft",
                    init_from="runs/internvlx_8b_vit_projector")
