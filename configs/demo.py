"""The demo: a tiny InternVL-X learns to read generated forms from scratch, on two CPU cores in a few minutes."""

from internvlx_jax.data.config import DataConfig
from internvlx_jax.data.tiles import TileConfig
from internvlx_jax.models.config import (DecoderConfig, ModelConfig, ProjectorConfig, PromptConfig, RopeConfig,
                                         VisionConfig)
from internvlx_jax.training.config import ComputeConfig, OptimizerConfig, TrainConfig

TILE = 112


def get_config() -> TrainConfig:
    model = ModelConfig(
        vision=VisionConfig(width=64, layers=3, heads=4, mlp_width=256, image_size=TILE, layer_scale_init=1.0),
        projector=ProjectorConfig(kind="pvtc", drop_path=0.0),
        decoder=DecoderConfig(vocab_size=655, width=128, layers=3, heads=4, kv_heads=2, head_dim=32, mlp_width=384,
                              rope=RopeConfig(theta=1e4, max_positions=2048)),
        prompt=PromptConfig(template="internlm2-chat", tiles=TileConfig(tile_size=TILE, rule="edge", max_num=6)),
    )
    return TrainConfig(
        output_dir="runs/demo/train",
        model=model,
        data=DataConfig(meta="runs/demo/data/meta_train.json", val_meta="runs/demo/data/meta_val.json",
                        tokenizer="internvlx_jax/data/assets/synthetic_tokenizer", max_length=1024,
                        tokens_per_step=4096, max_executables=6),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.05, weight_decay=0.05),
        compute=ComputeConfig(dtype="float32", remat="none"),
        steps=400,
        log_every=20,
        eval_every=100,
        save_every=200,
    )
