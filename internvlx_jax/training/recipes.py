"""Recipes of training.md 1 as functions of the model; the files of configs/ name them."""

from __future__ import annotations

import dataclasses

from internvlx_jax.data.config import DataConfig
from internvlx_jax.models.config import ModelConfig
from internvlx_jax.training.config import ComputeConfig, OptimizerConfig, TrainConfig
from internvlx_jax.training.sharding import MeshConfig


def hd_second_finetune(model: ModelConfig, *, name: str, init_from: str, max_length: int = 4096) -> TrainConfig:
    """`x_hd_2nd_finetune`, the released script: projector and decoder, RVTC with 6 tiles and a thumbnail.

    max_length counts slots of the long frame.
    """
    tiles = dataclasses.replace(model.prompt.tiles, rule="edge", max_num=6, use_thumbnail=True)
    model = dataclasses.replace(model, prompt=dataclasses.replace(model.prompt, tiles=tiles))
    return TrainConfig(
        output_dir=f"runs/{name}",
        model=model,
        init_from=init_from,
        data=DataConfig(meta="data/meta.json", max_length=max_length, batch_mode="samples", samples_per_step=128),
        optimizer=OptimizerConfig(learning_rate=4e-5, warmup_ratio=0.03, weight_decay=0.01, decay_rule="all"),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
        freeze=("vision",),
    )
