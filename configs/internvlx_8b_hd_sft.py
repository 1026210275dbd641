"""InternVL-X 8B with RVTC, stage 3: everything. Not the paper's recipe, which is not public."""

from internvlx_jax.core.presets import internvlx_8b
from internvlx_jax.core.recipes import x_hd_sft
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return x_hd_sft(
        internvlx_8b(), name="internvlx_8b_hd_sft", init_from="runs/internvlx_8b_vit_projector"
    )
