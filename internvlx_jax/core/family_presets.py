"""InternVL3 and 3.5 at their exact shapes, and InternVL-X on each (design: model.md 14)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from internvlx_jax.core.errors import ConfigError, did_you_mean
from internvlx_jax.core.model_config import (
    DecoderConfig,
    DecoderFamily,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    RopeConfig,
)
from internvlx_jax.core.presets import TOWER, LvtcPreset, lvtc_preset
from internvlx_jax.core.tile_config import TileConfig

Base = Literal[
    "internvl3_1b",
    "internvl3_2b",
    "internvl3_8b",
    "internvl3_14b",
    "internvl3_5_1b",
    "internvl3_5_2b",
    "internvl3_5_4b",
    "internvl3_5_8b",
    "internvl3_5_14b",
]


def _qwen(
    family: DecoderFamily,
    *,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    mlp_width: int,
) -> DecoderConfig:
    """Returns a Qwen2.5 or Qwen3 decoder as InternVL stores it: untied at every size."""
    is_qwen3 = family == "qwen3"
    return DecoderConfig(
        family=family,
        vocab_size=151_936 if is_qwen3 else 151_674,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=mlp_width,
        eps=1e-6,
        qkv_bias=not is_qwen3,
        qk_norm=is_qwen3,
        rope=RopeConfig(theta=1e6, max_positions=40_960 if is_qwen3 else 32_768),
    )


def _qwen2(width: int, layers: int, heads: int, kv_heads: int, mlp_width: int) -> DecoderConfig:
    return _qwen(
        "qwen2",
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp_width=mlp_width,
    )


def _qwen3(width: int, layers: int, heads: int, mlp_width: int) -> DecoderConfig:
    return _qwen(
        "qwen3",
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        mlp_width=mlp_width,
    )


DECODERS: Mapping[Base, DecoderConfig] = {
    "internvl3_1b": _qwen2(896, 24, 14, 2, 4864),
    "internvl3_2b": _qwen2(1536, 28, 12, 2, 8960),
    "internvl3_8b": _qwen2(3584, 28, 28, 4, 18_944),
    "internvl3_14b": _qwen2(5120, 48, 40, 8, 13_824),
    "internvl3_5_1b": _qwen3(1024, 28, 16, 3072),
    "internvl3_5_2b": _qwen3(2048, 28, 16, 6144),
    "internvl3_5_4b": _qwen3(2560, 36, 32, 9728),
    "internvl3_5_8b": _qwen3(4096, 36, 32, 12_288),
    "internvl3_5_14b": _qwen3(5120, 40, 40, 17_408),
}
# Ids of <|im_end|> and <|endoftext|>; wherever a tokenizer is available it decides.
_PROMPT = PromptConfig(template="internvl2_5", eos_ids=(151_645,), pad_id=151_643)


def internvl(base: Base) -> ModelConfig:
    """Returns a released InternVL: mlp1, 256 tokens per tile, 12 tiles."""
    return ModelConfig(
        vision=TOWER,
        projector=ProjectorConfig(kind="mlp1"),
        decoder=_decoder(base),
        prompt=dataclasses.replace(_PROMPT, tiles=TileConfig(rule="off", max_num=12)),
    )


def internvlx_on(
    base: Base,
    lvtc: LvtcPreset = "off",
    *,
    drop_path: float = 0.1,
    tiles: TileConfig = TileConfig(),
) -> ModelConfig:
    """Returns InternVL-X on a released InternVL: PVTC for mlp1, and LVTC by name.

    Args:
        base: The released model, whose tower and decoder are taken.
        lvtc: Name of an LVTC preset.
        drop_path: Largest rate of stochastic depth in the vision tower.
        tiles: How images are cut; the rule of RVTC unless given.
    """
    decoder = _decoder(base)
    first_deep = expand_layer(decoder)
    return ModelConfig(
        vision=dataclasses.replace(TOWER, drop_path=drop_path),
        decoder=decoder,
        prompt=dataclasses.replace(_PROMPT, tiles=tiles),
        lvtc=lvtc_preset(
            lvtc,
            token_grid=16,
            expand_layer=first_deep,
            inject_layers=(first_deep + 2, first_deep + 3),
        ),
    )


def expand_layer(decoder: DecoderConfig) -> int:
    """Returns LVTC's first deep layer at the depth that the paper has in a model of this width.

    The paper's two models have 19 of 24 layers (width 2048) and 27 of 32 (width 4096). Fractions
    are rounded down: a layer more with all tokens costs little and loses nothing.
    """
    numerator, denominator = (19, 24) if decoder.width <= 2048 else (27, 32)
    return decoder.layers * numerator // denominator


def _decoder(base: Base) -> DecoderConfig:
    if base not in DECODERS:
        raise ConfigError(
            f"base {base!r} is unknown;{did_you_mean(base, get_args(Base))} choose one of "
            f"{', '.join(get_args(Base))}"
        )
    return DECODERS[base]
