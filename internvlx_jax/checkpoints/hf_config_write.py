"""Writes a ModelConfig as config.json, in either form (design: checkpoints.md 5, 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internvlx_jax.checkpoints.decoder_fields import ARCHITECTURES
from internvlx_jax.checkpoints.hf_config import CHAT_ONLY
from internvlx_jax.core.model_config import DecoderConfig, ModelConfig, VisionConfig
from internvlx_jax.core.overrides import to_dict


def chat_config(
    config: ModelConfig, *, dtype: str, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the internvl_chat config of a model.

    Args:
        config: the model.
        dtype: dtype of the tensors beside it, e.g. `bfloat16`.
        base: a config.json whose unknown fields are kept.
    """
    prompt = config.prompt
    fields = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": config.projector.downsample_ratio,
        "select_layer": config.vision.select_layer,
        "ps_version": config.projector.pixel_shuffle,
        "force_image_size": config.vision.image_size,
        "template": prompt.template,
        "dynamic_image_size": prompt.tiles.dynamic,
        "use_thumbnail": prompt.tiles.use_thumbnail,
        "min_dynamic_patch": prompt.tiles.min_num,
        "max_dynamic_patch": prompt.tiles.max_num,
        "pad2square": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "torch_dtype": dtype,
        "vision_config": _vision(config.vision),
        "llm_config": _decoder(config),
    }
    if prompt.system_message is not None:
        fields["system_message"] = prompt.system_message
    merged = _merge(base or {}, fields)
    merged.pop("lvtc", None)
    return merged if config.lvtc is None else merged | {"lvtc": to_dict(config.lvtc)}


def hf_config(
    config: ModelConfig, *, dtype: str, image_token_id: int, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the config that transformers' InternVLForConditionalGeneration reads.

    Fields that only internvl_chat has, and the decoder's original architecture, are added at the
    top level, where transformers keeps them unread.

    Args:
        config: a model that has an hf form.
        dtype: dtype of the tensors beside it, e.g. `bfloat16`.
        image_token_id: id of the image placeholder.
        base: a config.json whose unknown fields are kept.
    """
    vision, chat = config.vision, chat_config(config, dtype=dtype)
    text = dict(chat["llm_config"])
    architecture = text["architectures"][0]
    if architecture == "InternLM2ForCausalLM":
        text |= {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": text.pop("bias"),
        }
    if scaling := text["rope_scaling"]:
        text["rope_scaling"] = {"rope_type": scaling["type"], "factor": scaling["factor"]}
    fields = {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "llm_architecture": architecture,
        "downsample_ratio": config.projector.downsample_ratio,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "image_token_id": image_token_id,
        "image_seq_length": config.tokens_per_tile,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "torch_dtype": dtype,
        **{field: chat[field] for field in CHAT_ONLY if field in chat},
        "vision_config": {
            "model_type": "internvl_vision",
            "architectures": ["InternVLVisionModel"],
            "hidden_size": vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp_width,
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "num_channels": 3,
            "norm_type": vision.norm,
            "layer_norm_eps": vision.eps,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_norm,
            "layer_scale_init_value": vision.layer_scale_init,
            "hidden_act": "gelu",
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_absolute_position_embeddings": True,
        },
        "text_config": text,
    }
    return _merge(base or {}, fields)


def say_whether_tied(fields: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Corrects the flags of a tied output, which others believe more than the tensors.

    Args:
        fields: config.json in either form. A flag that says the same is left as it is, and so is
            a missing one of an untied output, the default of every decoder. The flag above an
            `llm_config` is a default that means nothing there.
        tied: whether the folder holds no output of its own.
    """
    result, name = dict(fields), "tie_word_embeddings"
    is_hf = fields.get("model_type") == "internvl"
    part = "text_config" if is_hf else "llm_config"
    decoder = dict(fields[part])
    if name in result and bool(result[name]) != tied and (is_hf or tied):
        result[name] = tied
    if bool(decoder.get(name, False)) != tied:
        decoder[name] = tied
    return result | {part: decoder}


def vit_config(config: VisionConfig, *, dtype: str) -> dict[str, Any]:
    """Returns the config of a tower alone."""
    return _vision(config) | {"torch_dtype": dtype}


def _vision(config: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "intern_vit_6b",  # the class's name, also for the 300M tower
        "architectures": ["InternVisionModel"],
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "norm_type": config.norm,
        "layer_norm_eps": config.eps,
        "qkv_bias": config.qkv_bias,
        "qk_normalization": config.qk_norm,
        "initializer_factor": config.layer_scale_init,
        "drop_path_rate": config.drop_path,
        "hidden_act": "gelu",
    }


def _decoder(config: ModelConfig) -> dict[str, Any]:
    decoder, prompt = config.decoder, config.prompt
    (architecture,) = [name for name, family in ARCHITECTURES.items() if family == decoder.family]
    fields = {
        "model_type": decoder.family,
        "architectures": [architecture],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "max_position_embeddings": decoder.rope.max_positions,
        "rms_norm_eps": decoder.eps,
        "rope_theta": decoder.rope.theta,
        "rope_scaling": _rope_scaling(decoder),
        "hidden_act": "silu",
        "initializer_range": decoder.initializer_range,
        "tie_word_embeddings": decoder.tie_embeddings,
        "eos_token_id": prompt.eos_ids[0]
        if len(prompt.eos_ids) == 1
        else list(prompt.eos_ids) or None,
        "pad_token_id": prompt.pad_id,
    }
    if decoder.family == "qwen3" or decoder.head_dim * decoder.heads != decoder.width:
        fields["head_dim"] = decoder.head_dim
    if decoder.family == "internlm2":
        fields["bias"] = decoder.qkv_bias
    if decoder.family in ("llama", "qwen3"):
        fields["attention_bias"] = decoder.qkv_bias
    if decoder.family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = False
    if decoder.family == "phi3":
        fields["sliding_window"] = decoder.sliding_window
        if decoder.rope.original_max_positions:
            fields["original_max_position_embeddings"] = decoder.rope.original_max_positions
    return fields


def _rope_scaling(decoder: DecoderConfig) -> dict[str, Any] | None:
    rope = decoder.rope
    if rope.scaling == "none":
        return None
    if rope.scaling in ("su", "yarn"):
        return {
            "type": rope.scaling,
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
        }
    return {
        "type": rope.scaling,
        "factor": rope.factor,
    }  # InternLM2's own code accepts no third key


def _merge(base: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Puts `fields` over `base`, section by section; other fields of `base` stay."""
    merged = dict(base)
    for name, value in fields.items():
        nested = (
            name != "rope_scaling"
            and isinstance(value, dict)
            and isinstance(base.get(name), Mapping)
        )
        merged[name] = _merge(base[name], value) if nested else value
    return merged
