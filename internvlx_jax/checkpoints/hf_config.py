"""Reads config.json as a ModelConfig (design: checkpoints.md 5, 7, model.md 1, 9).

One reader takes the `internvl_chat` fields; `chat_fields` brings the hf layout into that form.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from internvlx_jax.checkpoints.config_section import Section
from internvlx_jax.checkpoints.decoder_fields import (
    ARCHITECTURES,
    DECODER_FIELDS,
    read_decoder,
    refuse_decoder,
)
from internvlx_jax.core.errors import ConfigError, did_you_mean
from internvlx_jax.core.model_config import (
    LvtcConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.overrides import from_dict
from internvlx_jax.core.ranges import LAYERS
from internvlx_jax.core.tile_config import TileConfig

# Fields of internvl_chat that transformers' config does not have; our hf exports carry them, too.
HF_LACKS = ("template", "dynamic_image_size", "use_thumbnail", "max_dynamic_patch")
CHAT_ONLY = (*HF_LACKS, "min_dynamic_patch", "system_message")
# Fields that the reader reads besides DECODER_FIELDS; `convert import --field` takes no others.
TOP_FIELDS = (
    *CHAT_ONLY,
    "pad2square",
    "downsample_ratio",
    "ps_version",
    "select_layer",
    "force_image_size",
    "tie_word_embeddings",
    "torch_dtype",
    "lvtc",
)
VISION_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "norm_type",
    "layer_norm_eps",
    "qkv_bias",
    "qk_normalization",
    "initializer_factor",
    "drop_path_rate",
    "attention_dropout",
    "dropout",
    "hidden_act",
)
DECODER_IDS = ("eos_token_id", "pad_token_id", "bos_token_id")
# How the hf layout spells what `chat_fields` renames: messages name fields as they are stored.
HF_TOP = {
    "select_layer": "vision_feature_layer",
    "llm_config": "text_config",
}
HF_VISION = {
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "initializer_factor": "layer_scale_init_value",
    "dropout": "hidden_dropout_prob",
}
# Released models of the family that are no InternVL of this kind, by model_type.
REFUSED_MODELS = {
    "internvlu": "InternVL-U generates images, and its generation head is not implemented here",
    "internvlflash": "InternVL Flash chooses its tokens by a router, which is not implemented here",
}


def model_config(
    config: Mapping[str, Any], tensors: Collection[str], fields: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Returns the model that a checkpoint holds.

    Args:
        config: parsed config.json.
        tensors: names in the checkpoint, which tell the projector and a tied output.
        fields: internvl_chat fields that replace the config's, or supply what the hf layout has no
            place for. `llm_config.NAME` and `vision_config.NAME` reach into the two parts.

    Raises:
        ConfigError: a field is missing, unknown, or asks for something that is not computed here.
    """
    is_hf = config.get("model_type") == "internvl"
    _refuse_models(config, tensors)
    top = Section(
        with_fields(chat_fields(config) if is_hf else config, fields or {}),
        spelled=HF_TOP if is_hf else {},
    )
    if is_hf and (missing := [field for field in HF_LACKS if field not in top.values]):
        raise ConfigError(
            f"config.json: the hf layout does not say {', '.join(missing)}, which prompts and "
            "tiles need. Copy chat_template.jinja and preprocessor_config.json of the checkpoint "
            "beside it, or give the fields to convert import, e.g. --field template=internvl_hf "
            "dynamic_image_size=true use_thumbnail=true max_dynamic_patch=12"
        )
    if top.get("model_type") != "internvl_chat":
        raise ConfigError(
            f"config.json: model_type is {config.get('model_type')!r}; this reader takes "
            "'internvl_chat' (InternVL-X, InternVL2, 2.5, 3 and 3.5) and 'internvl' (repositories "
            "ending in -hf)"
        )
    top.refuse("pad2square")
    vision_fields, llm = top.section("vision_config"), top.section("llm_config")
    if is_hf:
        vision_fields = Section(vision_fields.values, vision_fields.prefix, HF_VISION)
    kind = (
        "mlp1"
        if any(name.startswith(("mlp1.", "multi_modal_projector.")) for name in tensors)
        else "pvtc"
    )
    vision = _vision(vision_fields, top)
    decoder = read_decoder(llm, tensors, tied_above=top.flag("tie_word_embeddings", False))
    ratio = top.number("downsample_ratio", 0.5, above=0)
    if not (1 / ratio).is_integer() or (side := int(1 / ratio)) & (side - 1):
        raise top.wrong("downsample_ratio", "1, 1/2, 1/4 and so on")
    projector = ProjectorConfig(
        kind=kind,
        downsample_ratio=ratio,
        pixel_shuffle=top.choice("ps_version", ("v1", "v2"), "v1"),
    )
    lvtc = top.get("lvtc")
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
        prompt=_prompt(top, llm, kind, vision.image_size),
    )


def _refuse_models(config: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Raises ConfigError for members of the family that are not implemented here, by name."""
    listed = config.get("architectures")
    names = [str(config.get("model_type")), *(listed if isinstance(listed, list) else ())]
    for name in names:
        plain = str(name).lower().replace("_", "").replace("-", "")
        for known, reason in REFUSED_MODELS.items():
            if plain.startswith(known):
                raise ConfigError(f"config.json: {name}: {reason}; use a dense InternVL")
    if any(name.startswith(("mlp2.", "pooling_before_gating.", "gating.")) for name in tensors):
        raise ConfigError(
            f"the checkpoint holds mlp2.* and a router: {REFUSED_MODELS['internvlflash']}; use "
            "the model of the same size without Flash"
        )


def with_fields(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an internvl_chat config with fields replaced, those of its two parts by dotted names.

    Raises:
        ConfigError: a name is none that is read, or config.json lacks its part.
    """
    merged = dict(config)
    fields = {re.sub(r"^text_config\.", "llm_config.", name): fields[name] for name in fields}
    _check_field_names(fields)
    if (tied := fields.get("tie_word_embeddings")) is not None:
        fields = {"llm_config.tie_word_embeddings": tied} | fields  # the decoder's flag decides
    for name, value in fields.items():
        part, dot, field = name.partition(".")
        if not dot:
            merged[name] = value
        elif isinstance(section := merged.get(part), Mapping):
            merged[part] = {**section, field: value}
        else:
            raise ConfigError(f"--field {name}: config.json holds no object {part}")
    return merged


def _check_field_names(names: Collection[str]) -> None:
    """Raises ConfigError for the first name that no reader reads, with the nearest one."""
    known = [
        *TOP_FIELDS,
        *(f"vision_config.{field}" for field in VISION_FIELDS),
        *(f"llm_config.{field}" for field in (*DECODER_FIELDS, *DECODER_IDS)),
    ]
    for name in names:
        if name not in known:
            # A misspelt name inside a part resembles the names of the other part more often.
            near = did_you_mean(name, known) or did_you_mean(f"llm_config.{name}", known)
            raise ConfigError(
                f"--field {name}: config.json has no such field that is read here.{near}"
                + f" Fields are {', '.join(TOP_FIELDS)}, and those of vision_config and llm_config"
                * (not near)
            )


def chat_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the internvl_chat form of an hf config.

    Args:
        hf: parsed config.json in transformers' layout.

    Raises:
        ConfigError: names the field that has no such form.
    """
    top = Section(hf)
    vision, text = top.section("vision_config"), dict(top.section("text_config").values)
    vision.refuse("use_mask_token", "projection_dropout")
    for section, field, only in (
        (vision, "use_mean_pooling", True),
        (vision, "use_absolute_position_embeddings", True),
        (top, "projector_hidden_act", "gelu"),
        (top, "vision_feature_select_strategy", "default"),
    ):
        section.expect(field, only)
    kind = str(text.get("model_type") or "qwen2")
    refuse_decoder(f"text_config.model_type is {kind!r}", kind)
    stored_as = {
        family: architecture
        for architecture, family in ARCHITECTURES.items()
        if family in ("llama", "qwen2", "qwen3")
    }
    if kind not in stored_as:
        raise ConfigError(
            f"config.json: text_config.model_type is {kind!r}; supported in the hf layout are "
            f"{', '.join(stored_as)}"
        )
    architecture = hf.get("llm_architecture") or stored_as[kind]
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
        "downsample_ratio": hf.get("downsample_ratio"),
        "select_layer": hf.get("vision_feature_layer"),
        "ps_version": "v2",
        "tie_word_embeddings": hf.get("tie_word_embeddings"),
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


def _side(config: Section, field: str, default: int) -> Any:
    """Returns the side of a square that newer files give as a pair."""
    value = config.get(field, default)
    sides = value if isinstance(value, list) else [value]
    if not sides or any(side != sides[0] for side in sides):
        raise ConfigError(f"config.json: {config.name(field)} {value} is not square")
    return sides[0]


def _vision(config: Section, top: Section) -> VisionConfig:
    config.refuse("attention_dropout", "dropout")
    config.expect("hidden_act", "gelu")
    stored = config.integer("image_size", 224, least=1)
    size = top.integer("force_image_size", stored) or stored
    if size != stored:
        raise ConfigError(
            f"config.json: force_image_size {size} differs from vision_config.image_size {stored}; "
            "resize the position table once: convert import --image_size"
        )
    width = config.integer("hidden_size", 3200, least=1)
    heads = config.integer("num_attention_heads", 25, least=1)
    config.check_divides("num_attention_heads", heads, "hidden_size", width)
    return VisionConfig(
        width=width,
        layers=config.integer("num_hidden_layers", 48, least=1, most=LAYERS.high),
        heads=heads,
        mlp_width=config.integer("intermediate_size", 12800, least=1),
        image_size=size,
        patch_size=config.integer("patch_size", 14, least=1),
        norm=config.choice("norm_type", ("layer_norm", "rms_norm"), "rms_norm"),
        eps=config.number("layer_norm_eps", 1e-6, above=0),
        qkv_bias=config.flag("qkv_bias", False),
        qk_norm=config.flag("qk_normalization", True),
        layer_scale_init=config.number("initializer_factor", 0.1),
        drop_path=config.number("drop_path_rate", 0.0),
        select_layer=_select_layer(top, config),
    )


def _select_layer(top: Section, vision: Section) -> int:
    layers = vision.integer("num_hidden_layers", 48)
    value = top.integer("select_layer", -1)
    if not -layers - 1 <= value <= layers:
        raise top.wrong("select_layer", f"a layer of the tower, from {-layers - 1} to {layers}")
    return value


def _prompt(config: Section, llm: Section, kind: str, image_size: int) -> PromptConfig:
    tiles = TileConfig(
        tile_size=image_size,
        rule="edge" if kind == "pvtc" else "off",
        dynamic=config.flag("dynamic_image_size", False),
        use_thumbnail=config.flag("use_thumbnail", False),
        min_num=config.integer("min_dynamic_patch", 1, least=1),
        max_num=config.integer("max_dynamic_patch", 6, least=1),
    )
    eos_ids = llm.ids("eos_token_id", (2,))
    pads = llm.ids("pad_token_id", (0,) if llm.get("model_type") == "internlm2" else ())
    return PromptConfig(
        template=config.text("template") or "internlm2-chat",
        system_message=config.text("system_message"),
        tiles=tiles,
        eos_ids=eos_ids,
        pad_id=(pads or eos_ids or (0,))[0],
    )
