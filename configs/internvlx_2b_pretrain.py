"""InternVL-X 2B from parts, stage 1: projector warm-up. Not the paper's recipe, which is not public."""

from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.core.recipes import x_pretrain
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    return x_pretrain(
        internvlx_2b(), name="internvlx_2b_pretrain", init_from="checkpoints/InternVL-X-2B-parts"
    )
