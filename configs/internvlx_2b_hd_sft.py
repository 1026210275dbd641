"""InternVL-X 2B with RVTC, stage 3: everything. Not the paper's recipe, which is not public."""

from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.core.recipes import x_hd_sft
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return x_hd_sft(
        internvlx_2b(), name="internvlx_2b_hd_sft", init_from="runs/internvlx_2b_vit_projector"
    )
