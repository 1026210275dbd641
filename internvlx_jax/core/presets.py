"""The models of the paper, with LVTC by name (design: model.md 1, lvtc.md 2)."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import (
    DecoderConfig,
    LvtcConfig,
    ModelConfig,
    PromptConfig,
    RopeConfig,
    VisionConfig,
)
from internvlx_jax.core.tile_config import TileConfig

Size = Literal["2b", "8b"]
LvtcPreset = Literal["off", "paper", "paper_inject", "fast", "fast_inject"]


def lvtc_preset(
    name: LvtcPreset, *, token_grid: int, expand_layer: int, inject_layers: tuple[int, ...]
) -> LvtcConfig | None:
    """Returns LVTC around the released projector.

    Args:
        name: `off` is None. `paper` has the released tokens in the shallow layers and four times
            as many in the deep ones; `fast` has a quarter of the released tokens in the shallow
            layers and the released ones in the deep ones. `*_inject` adds further projections.
        token_grid: Released tokens along one side of a tile.
        expand_layer: First deep layer.
        inject_layers: Layers in front of which `*_inject` adds a projection.

    Raises:
        ConfigError: The name is unknown.
    """
    if name not in get_args(LvtcPreset):
        raise ConfigError(
            f"LVTC preset {name!r} is unknown; choose one of {', '.join(get_args(LvtcPreset))}"
        )
    if name == "off":
        return None
    injections = inject_layers if name.endswith("_inject") else ()
    if name.startswith("paper"):
        return LvtcConfig(
            expand_layer=expand_layer,
            low_grid=token_grid,
            high_grid=2 * token_grid,
            low_projector="pvtc",
            high_projector="mlp",
            inject_layers=injections,
        )
    return LvtcConfig(
        expand_layer=expand_layer,
        low_grid=token_grid // 2,
        high_grid=token_grid,
        low_projector="pvtc",
        high_projector="pvtc",
        inject_layers=injections,
    )


def internvlx_2b(lvtc: LvtcPreset = "off") -> ModelConfig:
    """Returns InternViT-300M with InternLM2-1.8B, 256 tokens per tile."""
    decoder = DecoderConfig(
        vocab_size=92553,
        width=2048,
        layers=24,
        heads=16,
        kv_heads=8,
        head_dim=128,
        mlp_width=8192,
        rope=_ROPE,
    )
    return ModelConfig(
        vision=TOWER,
        decoder=decoder,
        prompt=_PROMPT,
        lvtc=lvtc_preset(lvtc, token_grid=16, expand_layer=19, inject_layers=(21, 22)),
    )


def internvlx_8b(lvtc: LvtcPreset = "off") -> ModelConfig:
    """Returns InternViT-300M with InternLM2.5-7B, 256 tokens per tile."""
    decoder = DecoderConfig(
        vocab_size=92553,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp_width=14336,
        rope=_ROPE,
    )
    return ModelConfig(
        vision=TOWER,
        decoder=decoder,
        prompt=_PROMPT,
        lvtc=lvtc_preset(lvtc, token_grid=16, expand_layer=27, inject_layers=(29, 30)),
    )


TOWER = VisionConfig(width=1024, layers=24, heads=16, mlp_width=4096, drop_path=0.1)
_ROPE = RopeConfig(theta=1e6, max_positions=32768, scaling="dynamic", factor=2.0)
_PROMPT = PromptConfig(template="internlm2-chat")


def internvlx(
    size: Size, lvtc: LvtcPreset = "off", *, drop_path: float, tiles: TileConfig
) -> ModelConfig:
    """Returns a model of the paper as a run trains it.

    Args:
        size: Which of the two released models, `2b` or `8b`.
        lvtc: Name of an LVTC preset.
        drop_path: Largest rate of stochastic depth in the vision tower; its last layer has it.
        tiles: How images are cut.
    """
    model = {"2b": internvlx_2b, "8b": internvlx_8b}[size](lvtc)
    return dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, drop_path=drop_path),
        prompt=dataclasses.replace(model.prompt, tiles=tiles),
    )
