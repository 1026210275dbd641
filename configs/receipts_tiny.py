"""A small model from scratch on real receipts, with InternLM2's real vocabulary and RVTC.

The config takes real input through the whole path on a CPU: images are cut into up to six tiles
and a thumbnail. The model is far too small, and the data are far too few, to learn to read
receipts. The sample data in `../shared/data` come from third parties and are expected beside the
checkout.
`python benchmarks/receipts.py` runs training, a stop, a resume and evaluation.
"""

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.model_config import (
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    RopeConfig,
    VisionConfig,
)
from internvlx_jax.core.run_config import ComputeConfig, OptimizerConfig, TrainConfig
from internvlx_jax.core.tile_config import TileConfig


def get_config() -> TrainConfig:
    model = ModelConfig(
        vision=VisionConfig(
            width=64, layers=2, heads=2, mlp_width=128, image_size=448, patch_size=14
        ),
        projector=ProjectorConfig(kind="pvtc", downsample_ratio=0.125, drop_path=0.0),
        decoder=DecoderConfig(
            vocab_size=92553,
            width=64,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            mlp_width=192,
            initializer_range=0.05,
            rope=RopeConfig(theta=1e6),
        ),
        prompt=PromptConfig(
            template="internlm2-chat", tiles=TileConfig(tile_size=448, rule="edge", max_num=6)
        ),
    )
    return TrainConfig(
        output_dir="runs/receipts_tiny",
        model=model,
        data=DataConfig(
            meta="../shared/data/receipts_meta.json",
            tokenizer="../shared/data/internlm2_tokenizer",
            max_length=512,
            batch_mode="samples",
            samples_per_step=2,
            max_executables=2,
            index_dir="runs/index",
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_ratio=0.1),
        compute=ComputeConfig(dtype="float32", remat="none"),
        steps=60,
        log_every=5,
        save_every=20,
    )
