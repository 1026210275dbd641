"""InternVL-X 8B, stage 2: tower and projector, with the settings of upstream's 8B. Not the paper's recipe."""

from internvlx_jax.core.presets import internvlx_8b
from internvlx_jax.core.recipes import ivl25_stage1_5
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return ivl25_stage1_5(
        internvlx_8b(), name="internvlx_8b_vit_projector", init_from="runs/internvlx_8b_pretrain"
    )
