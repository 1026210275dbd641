"""The demo: a tiny InternVL-X learns to read generated pages from scratch, on two CPU cores.

Training takes a few minutes. Patches of 28 px make a PVTC region (2 x 2 patches) as large as a
field of the page, so that four visual tokens per tile are enough. The initial weights are larger
than those of a large model, because the width is only 96.

All three compressors are on: RVTC (`edge`) cuts no more tiles than a page has pixels for, PVTC
turns the 16 patches of a tile into four tokens, and LVTC `fast` gives the first decoder layer one
token per tile and the other two layers all four. The gate of LVTC starts open, because training
starts from scratch and has no released model to leave undisturbed.
"""

import dataclasses

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.model_config import (
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    RopeConfig,
    VisionConfig,
)
from internvlx_jax.core.presets import lvtc_preset
from internvlx_jax.core.run_config import ComputeConfig, OptimizerConfig, TrainConfig
from internvlx_jax.core.tile_config import TileConfig

TILE = 112


def get_config() -> TrainConfig:
    lvtc = lvtc_preset("fast", token_grid=TILE // 28 // 2, expand_layer=1, inject_layers=())
    model = ModelConfig(
        vision=VisionConfig(
            width=128, layers=2, heads=4, mlp_width=256, image_size=TILE, patch_size=28
        ),
        projector=ProjectorConfig(kind="pvtc", drop_path=0.0),
        decoder=DecoderConfig(
            vocab_size=656,
            width=96,
            layers=3,
            heads=4,
            kv_heads=2,
            head_dim=24,
            mlp_width=256,
            initializer_range=0.1,
            rope=RopeConfig(theta=1e4, max_positions=2048),
        ),
        lvtc=dataclasses.replace(lvtc, gate=1.0),
        # The template's system message is the same in every sample; without it, a step holds more
        # samples.
        prompt=PromptConfig(
            template="internlm2-chat",
            system_message="",
            tiles=TileConfig(tile_size=TILE, rule="edge", max_num=6),
        ),
    )
    return TrainConfig(
        output_dir="runs/demo/train",
        model=model,
        data=DataConfig(
            meta="runs/demo/data/meta_train.json",
            val_meta="runs/demo/data/meta_val.json",
            tokenizer="internvlx_jax/data/assets/synthetic_tokenizer",
            max_length=288,
            length_step=16,
            tokens_per_step=768,
            max_executables=2,
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, b2=0.95, weight_decay=0.05),
        compute=ComputeConfig(dtype="float32", remat="none"),
        steps=1000,
        log_every=50,
        eval_every=500,
        save_every=500,
    )
