"""Reads config.json as a ModelConfig (design: checkpoints.md 5, 7, model.md 1, 9).

One reader takes the `internvl_chat` fields; `chat_fields` brings the hf layout into that form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import (
    DecoderConfig,
    LvtcConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    RopeConfig,
    VisionConfig,
)
from internvlx_jax.core.overrides import from_dict
from internvlx_jax.core.tile_config import TileConfig

Family = Literal["internlm2", "llama", "qwen2", "phi3"]
ARCHITECTURES: Mapping[str, Family] = {
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Phi3ForCausalLM": "phi3",
}
# Fields of internvl_chat that transformers' config does not have; our hf exports carry them, too.
HF_LACKS = ("template", "dynamic_image_size", "use_thumbnail", "max_dynamic_patch")
CHAT_ONLY = (*HF_LACKS, "min_dynamic_patch", "system_message")


def model_config(
    config: Mapping[str, Any], tensors: Collection[str], fields: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Returns the model that a checkpoint holds.

    Args:
        config: parsed config.json.
        tensors: names in the checkpoint, which tell the projector and a tied output.
        fields: internvl_chat fields that replace the config's, or supply what the hf layout has no
            place for.

    Raises:
        ConfigError: a field is missing, unknown, or asks for something that is not computed here.
    """
    is_hf = config.get("model_type") == "internvl"
    config = {**(chat_fields(config) if is_hf else config), **(fields or {})}
    if is_hf and (missing := [field for field in HF_LACKS if field not in config]):
        raise ConfigError(
            f"config.json: the hf layout does not say {', '.join(missing)}, which prompts and "
            "tiles need. Give them to convert import, e.g. --field template=internvl2_5 "
            "dynamic_image_size=true use_thumbnail=true max_dynamic_patch=12"
        )
    if config.get("model_type") != "internvl_chat":
        raise ConfigError(
            f"config.json: model_type is {config.get('model_type')!r}; this reader takes "
            "'internvl_chat' (InternVL-X, InternVL2, InternVL2.5) and 'internvl' (repositories "
            "ending in -hf)"
        )
    _refuse(config, "", "pad2square")
    kind = (
        "mlp1"
        if any(name.startswith(("mlp1.", "multi_modal_projector.")) for name in tensors)
        else "pvtc"
    )
    vision = _vision(_section(config, "vision_config"), config)
    decoder = _decoder(_section(config, "llm_config"), tensors)
    projector = ProjectorConfig(
        kind=kind,
        downsample_ratio=config.get("downsample_ratio", 0.5),
        pixel_shuffle=config.get("ps_version", "v1"),
    )
    lvtc = config.get("lvtc")
    if lvtc is None and any(name.startswith("lvtc.") for name in tensors):
        raise ConfigError(
            "config.json: no lvtc, but the checkpoint holds lvtc.* tensors; add the key with the "
            "fields of LvtcConfig"
        )
    return ModelConfig(
        vision=vision,
        projector=projector,
        decoder=decoder,
        lvtc=None if lvtc is None else from_dict(LvtcConfig, lvtc, "lvtc"),
        prompt=_prompt(config, kind, vision.image_size),
    )


def chat_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the internvl_chat form of an hf config.

    Args:
        hf: parsed config.json in transformers' layout.

    Raises:
        ConfigError: names the field that has no such form.
    """
    vision, text = _section(hf, "vision_config"), dict(_section(hf, "text_config"))
    _refuse(vision, "vision_config.", "use_mask_token", "projection_dropout")
    for section, field, only in (
        (vision, "use_mean_pooling", True),
        (vision, "use_absolute_position_embeddings", True),
        (hf, "projector_hidden_act", "gelu"),
        (hf, "vision_feature_select_strategy", "default"),
    ):
        if section.get(field, only) != only:
            raise ConfigError(
                f"config.json: {field} is {section[field]!r}; only {only!r} is computed"
            )
    kind = text.get("model_type", "qwen2")
    stored_as = {
        family: architecture
        for architecture, family in ARCHITECTURES.items()
        if family in ("llama", "qwen2")
    }
    if kind not in stored_as:
        raise ConfigError(
            f"config.json: text_config.model_type is {kind!r}; supported in the hf layout are "
            f"{', '.join(stored_as)}"
        )
    architecture = hf.get("llm_architecture", stored_as[kind])
    if architecture == "InternLM2ForCausalLM":
        text["bias"] = text.get("attention_bias", False)
    defaults = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
    return {
        "model_type": "internvl_chat",
        "downsample_ratio": hf.get("downsample_ratio", 0.5),
        "select_layer": hf.get("vision_feature_layer", -1),
        "ps_version": "v2",
        "torch_dtype": hf.get("torch_dtype", hf.get("dtype")),
        **{field: hf[field] for field in CHAT_ONLY if field in hf},
        "vision_config": {field: vision.get(field, default) for field, default in defaults.items()}
        | {
            "model_type": "intern_vit_6b",
            "image_size": _side(vision, "image_size", 448),
            "patch_size": _side(vision, "patch_size", 14),
            "qkv_bias": vision.get("attention_bias", False),
            "qk_normalization": vision.get("use_qk_norm", False),
            "initializer_factor": vision.get("layer_scale_init_value", 0.1),
            "attention_dropout": vision.get("attention_dropout", 0.0),
            "dropout": vision.get("hidden_dropout_prob", 0.0),
        },
        "llm_config": {**text, "architectures": [architecture]},
    }


def _side(config: Mapping[str, Any], field: str, default: int) -> int:
    value = config.get(field, default)
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise ConfigError(f"config.json: vision_config.{field} {value} is not square")
    return sides.pop()


def _vision(config: Mapping[str, Any], top: Mapping[str, Any]) -> VisionConfig:
    _refuse(config, "vision_config.", "attention_dropout", "dropout")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(
            f"config.json: vision_config.hidden_act {config['hidden_act']!r}; only 'gelu' is "
            "computed"
        )
    stored = config.get("image_size", 224)
    size = top.get("force_image_size") or stored
    if size != stored:
        raise ConfigError(
            f"config.json: force_image_size {size} differs from vision_config.image_size {stored}; "
            "resize the position table once: convert import --image_size"
        )
    return VisionConfig(
        width=config.get("hidden_size", 3200),
        layers=config.get("num_hidden_layers", 48),
        heads=config.get("num_attention_heads", 25),
        mlp_width=config.get("intermediate_size", 12800),
        image_size=size,
        patch_size=config.get("patch_size", 14),
        norm=config.get("norm_type", "rms_norm"),
        eps=config.get("layer_norm_eps", 1e-6),
        qkv_bias=config.get("qkv_bias", False),
        qk_norm=config.get("qk_normalization", True),
        layer_scale_init=config.get("initializer_factor", 0.1),
        drop_path=config.get("drop_path_rate", 0.0),
        select_layer=top.get("select_layer", -1),
    )


def _decoder(config: Mapping[str, Any], tensors: Collection[str]) -> DecoderConfig:
    name = (config.get("architectures") or [None])[0]
    family = ARCHITECTURES.get(str(name))
    if family is None:
        raise ConfigError(
            f"config.json: llm_config.architectures[0] is {name!r}; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    # InternLM2's class has a default for every size; for the others a missing size is an error.
    default = (
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 103168,
            "max_position_embeddings": 2048,
        }
        if family == "internlm2"
        else {}
    )

    def size(field: str) -> int:
        value = config.get(field, default.get(field))
        if value is None:
            raise ConfigError(f"config.json: llm_config.{field} is missing")
        return value

    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"config.json: llm_config.hidden_act {config['hidden_act']!r}; only 'silu' is computed"
        )
    if family == "qwen2":
        _refuse(config, "llm_config.", "use_sliding_window")
    if family == "llama":
        _refuse(config, "llm_config.", "mlp_bias")
    if family == "phi3":
        _refuse(config, "llm_config.", "resid_pdrop", "embd_pdrop", "attention_dropout")
        if config.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(
                "config.json: llm_config.partial_rotary_factor "
                f"{config['partial_rotary_factor']}; only 1.0 is computed"
            )
    heads = size("num_attention_heads")
    qkv_bias, out_bias = {
        "internlm2": (config.get("bias", True),) * 2,
        "qwen2": (True, False),
        "llama": (config.get("attention_bias", False),) * 2,
        "phi3": (False, False),
    }[family]
    stored_output = any(name.endswith((".output.weight", ".lm_head.weight")) for name in tensors)
    return DecoderConfig(
        family=family,
        vocab_size=size("vocab_size"),
        width=size("hidden_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or size("hidden_size") // heads,
        mlp_width=size("intermediate_size"),
        eps=config.get("rms_norm_eps", 1e-5 if family == "phi3" else 1e-6),
        sliding_window=config.get("sliding_window") if family == "phi3" else None,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        initializer_range=config.get("initializer_range", 0.02),
        tie_embeddings=config.get("tie_word_embeddings", False) and not stored_output,
        rope=_rope(config, family, size("max_position_embeddings")),
    )


def _rope(config: Mapping[str, Any], family: str, max_positions: int) -> RopeConfig:
    """Reads both spellings: rope_theta with rope_scaling, and the newer rope_parameters."""
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = parameters.get("rope_theta", config.get("rope_theta", 1e4))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default" or family == "qwen2":  # the release ignores the field for Qwen2
        return RopeConfig(theta=theta, max_positions=max_positions)
    if family == "phi3":
        return _phi3_rope(config, parameters, kind, theta, max_positions)
    if kind not in ("linear", "dynamic"):
        raise ConfigError(
            f"config.json: llm_config.rope_scaling type {kind!r}; supported are linear and dynamic"
        )
    if "factor" not in parameters:
        raise ConfigError(f"config.json: llm_config.rope_scaling type {kind!r} has no factor")
    return RopeConfig(
        theta=theta, max_positions=max_positions, scaling=kind, factor=float(parameters["factor"])
    )


def _phi3_rope(
    config: Mapping[str, Any],
    parameters: Mapping[str, Any],
    kind: str,
    theta: float,
    max_positions: int,
) -> RopeConfig:
    kind = {"longrope": "su"}.get(kind, kind)  # what newer files call it
    if kind not in ("su", "yarn"):
        raise ConfigError(
            f"config.json: llm_config.rope_scaling type {kind!r}; Phi-3 has su (longrope) and yarn"
        )
    original = parameters.get(
        "original_max_position_embeddings", config.get("original_max_position_embeddings", 4096)
    )
    for field in ("short_factor", "long_factor"):
        if field not in parameters:
            raise ConfigError(f"config.json: llm_config.rope_scaling.{field} is missing")
    return RopeConfig(
        theta=theta,
        max_positions=max_positions,
        scaling=kind,
        original_max_positions=original,
        short_factor=tuple(map(float, parameters["short_factor"])),
        long_factor=tuple(map(float, parameters["long_factor"])),
    )


def _prompt(config: Mapping[str, Any], kind: str, image_size: int) -> PromptConfig:
    llm = config["llm_config"]
    tiles = TileConfig(
        tile_size=image_size,
        rule="edge" if kind == "pvtc" else "off",
        dynamic=config.get("dynamic_image_size", False),
        use_thumbnail=config.get("use_thumbnail", False),
        min_num=config.get("min_dynamic_patch", 1),
        max_num=config.get("max_dynamic_patch", 6),
    )
    eos = llm.get("eos_token_id", 2)
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    pad = llm.get("pad_token_id", 0 if llm.get("model_type") == "internlm2" else None)
    if pad is None:
        pad = eos_ids[0] if eos_ids else 0
    return PromptConfig(
        template=config.get("template") or "internlm2-chat",
        system_message=config.get("system_message"),
        tiles=tiles,
        eos_ids=eos_ids,
        pad_id=pad,
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name not in config:
        raise ConfigError(f"config.json: {name} is missing")
    return config[name]


def _refuse(config: Mapping[str, Any], prefix: str, *fields: str) -> None:
    for field in fields:
        if config.get(field):
            raise ConfigError(
                f"config.json: {prefix}{field} = {config[field]!r} is not supported here; it must "
                "be 0 or false"
            )
