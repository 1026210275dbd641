"""Recipes by name (spec: training.md 1), as functions of the model; the files of configs/ call them.

`x_*_finetune` are the released scripts. `ivl*` are those of upstream InternVL (1.5, 2, 2.5). The recipe with which
InternVL-X was pretrained is not public: `x_pretrain` and `x_sft` are stand-ins.

All: AdamW (0.9, 0.999, 1e-8), cosine, gradient clip 1.0, bfloat16, one epoch unless steps are given. Exact ones decay
every trained parameter (`decay_rule="all"`), which is inferred for the released scripts. A `name` is that of the run
folder; `init_from` is the checkpoint to start from; `max_length` counts slots of the long layout with LVTC.
"""

from __future__ import annotations

import dataclasses

from internvlx_jax.core.data_config import DataConfig, PackConfig
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.core.run_config import (
    ComputeConfig,
    FreezeConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from internvlx_jax.core.tile_config import TileConfig

META = "data/meta.json"
ONE_TILE = TileConfig(dynamic=False)
RVTC = TileConfig(rule="edge", max_num=6)  # 6 tiles and a thumbnail
TILES_12 = TileConfig(rule="off", max_num=12)
TILES_6 = TileConfig(rule="off", max_num=6)


def x_2nd_finetune(
    model: ModelConfig, *, name: str, init_from: str, max_length: int = 4096
) -> TrainConfig:
    """Exact, released script: projector and decoder, one tile an image. The frozen tower keeps its drop path, as there."""
    return _run(
        model,
        name,
        init_from,
        tiles=ONE_TILE,
        drop_path=0.1,
        data=_samples(128, max_length),
        optimizer=_adamw(4e-5, decay_rule="all"),
        freeze=FreezeConfig(vit=True, vit_mode="train"),
    )


def x_hd_2nd_finetune(
    model: ModelConfig, *, name: str, init_from: str, max_length: int = 4096
) -> TrainConfig:
    """Exact, released script: the same with RVTC, 6 tiles and a thumbnail."""
    return _run(
        model,
        name,
        init_from,
        tiles=RVTC,
        drop_path=0.1,
        data=_samples(128, max_length),
        optimizer=_adamw(4e-5, decay_rule="all"),
        freeze=FreezeConfig(vit=True, vit_mode="train"),
    )


def x_pretrain(
    model: ModelConfig, *, name: str, init_from: str, max_length: int = 4096
) -> TrainConfig:
    """A choice, after `ivl25_stage1`, not the paper's: projector warm-up, with what LVTC adds; one tile an image."""
    return _run(
        model,
        name,
        init_from,
        tiles=ONE_TILE,
        drop_path=0.0,
        data=_samples(512, max_length),
        optimizer=_adamw(2e-4, warmup_steps=100),
        freeze=FreezeConfig(vit=True, llm=True),
    )


def x_sft(model: ModelConfig, *, name: str, init_from: str, max_length: int = 4096) -> TrainConfig:
    """A choice, after `ivl15_finetune`, not the paper's: everything, one tile an image."""
    return _run(
        model,
        name,
        init_from,
        tiles=ONE_TILE,
        drop_path=0.1,
        data=_samples(512, max_length),
        optimizer=_adamw(4e-5),
        freeze=FreezeConfig(),
    )


def x_hd_sft(
    model: ModelConfig, *, name: str, init_from: str, max_length: int = 8192
) -> TrainConfig:
    """A choice, not the paper's: `x_sft` with RVTC."""
    return _run(
        model,
        name,
        init_from,
        tiles=RVTC,
        drop_path=0.1,
        data=_samples(512, max_length),
        optimizer=_adamw(4e-5),
        freeze=FreezeConfig(),
    )


def ivl15_pretrain(model: ModelConfig, *, name: str, init_from: str) -> TrainConfig:
    """Exact upstream (2B): tower and projector, up to 12 tiles."""
    return _run(
        model,
        name,
        init_from,
        tiles=TILES_12,
        drop_path=0.1,
        data=_samples(2048, 4096),
        optimizer=_adamw(2e-5, warmup_steps=100, decay_rule="all"),
        freeze=FreezeConfig(llm=True),
    )


def ivl15_finetune(model: ModelConfig, *, name: str, init_from: str) -> TrainConfig:
    """Exact upstream (2B): everything, up to 12 tiles."""
    return _run(
        model,
        name,
        init_from,
        tiles=TILES_12,
        drop_path=0.1,
        data=_samples(1024, 8192),
        optimizer=_adamw(4e-5, decay_rule="all"),
        freeze=FreezeConfig(),
    )


def ivl2_2nd_full(model: ModelConfig, *, name: str, init_from: str) -> TrainConfig:
    """Exact upstream: projector and decoder, 6 tiles; the frozen tower keeps its drop path."""
    return _run(
        model,
        name,
        init_from,
        tiles=TILES_6,
        drop_path=0.1,
        data=_samples(128, 4096),
        optimizer=_adamw(4e-5, decay_rule="all"),
        freeze=FreezeConfig(vit=True, vit_mode="train"),
    )


def ivl2_2nd_lora(model: ModelConfig, *, name: str, init_from: str) -> TrainConfig:
    """Exact upstream: adapters of rank 16 on the decoder, 6 tiles, batch 16; no drop path."""
    return _run(
        model,
        name,
        init_from,
        tiles=TILES_6,
        drop_path=0.0,
        data=_samples(16, 4096),
        optimizer=_adamw(4e-5, decay_rule="all"),
        freeze=FreezeConfig(train_lora_only=True),
        lora=(LoraConfig(part="decoder", rank=16, alpha=32.0),),
    )


def x_hd_2nd_lora(model: ModelConfig, *, name: str, init_from: str) -> TrainConfig:
    """A choice: `ivl2_2nd_lora` with RVTC, as InternVL-X HD cuts its images."""
    config = ivl2_2nd_lora(model, name=name, init_from=init_from)
    return dataclasses.replace(config, model=_cut(config.model, RVTC))


def ivl25_stage1(
    model: ModelConfig, *, name: str, init_from: str, weight_decay: float
) -> TrainConfig:
    """Exact upstream: the projector, packed, 100,000 steps. weight_decay: 0.01 at 2B, 0.05 at 8B."""
    optimizer = _adamw(2e-4, warmup_steps=100, weight_decay=weight_decay, decay_rule="all")
    return _run(
        model,
        name,
        init_from,
        tiles=TILES_12,
        drop_path=0.0,
        data=_packed(),
        optimizer=optimizer,
        freeze=FreezeConfig(vit=True, llm=True),
        steps=100_000,
    )


def ivl25_stage1_5(model: ModelConfig, *, name: str, init_from: str) -> TrainConfig:
    """Exact upstream (8B): tower and projector, packed."""
    optimizer = _adamw(1e-5, warmup_steps=100, weight_decay=0.05, decay_rule="all")
    return _run(
        model,
        name,
        init_from,
        tiles=TILES_12,
        drop_path=0.1,
        data=_packed(),
        optimizer=optimizer,
        freeze=FreezeConfig(llm=True),
    )


def ivl25_stage2(
    model: ModelConfig, *, name: str, init_from: str, weight_decay: float, steps: int
) -> TrainConfig:
    """Exact upstream: everything, packed. weight_decay, steps: 0.01 and 22,000 at 2B, 0.05 and 5,500 at 8B."""
    return _run(
        model,
        name,
        init_from,
        tiles=TILES_12,
        drop_path=0.1,
        data=_packed(),
        optimizer=_adamw(4e-5, weight_decay=weight_decay, decay_rule="all"),
        freeze=FreezeConfig(),
        steps=steps,
    )


def _run(
    model: ModelConfig,
    name: str,
    init_from: str,
    *,
    tiles: TileConfig,
    drop_path: float,
    data: DataConfig,
    optimizer: OptimizerConfig,
    freeze: FreezeConfig,
    steps: int | None = None,
    lora: tuple[LoraConfig, ...] = (),
) -> TrainConfig:
    model = dataclasses.replace(
        _cut(model, tiles), vision=dataclasses.replace(model.vision, drop_path=drop_path)
    )
    return TrainConfig(
        output_dir=f"runs/{name}",
        model=model,
        init_from=init_from,
        data=data,
        optimizer=optimizer,
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
        freeze=freeze,
        lora=lora,
        steps=steps,
    )


def _cut(model: ModelConfig, tiles: TileConfig) -> ModelConfig:
    tiles = dataclasses.replace(tiles, tile_size=model.vision.image_size)
    return dataclasses.replace(model, prompt=dataclasses.replace(model.prompt, tiles=tiles))


def _adamw(
    learning_rate: float,
    *,
    warmup_steps: int | None = None,
    weight_decay: float = 0.01,
    decay_rule: str = "standard",
) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=learning_rate,
        warmup_ratio=0.03,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        decay_rule=decay_rule,
    )


def _samples(batch: int, max_length: int) -> DataConfig:
    return DataConfig(
        meta=META, max_length=max_length, batch_mode="samples", samples_per_step=batch
    )


def _packed() -> DataConfig:
    """512 rows of 16,384 tokens and 48 tiles; tokens weigh by the square root of their sample's length."""
    return DataConfig(
        meta=META,
        max_length=16384,
        batch_mode="pack",
        tokens_per_step=512 * 16384,
        pack=PackConfig(tiles=48),
        loss_reduction="square",
    )
