"""InternVL-X 2B, stage 2: tower and projector, with the settings of upstream's 2B. Not the paper's recipe."""

from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.core.recipes import ivl15_pretrain
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return ivl15_pretrain(
        internvlx_2b(), name="internvlx_2b_vit_projector", init_from="runs/internvlx_2b_pretrain"
    )
