"""Reads the decoder's fields of config.json, which are those of transformers' own models.

(design: checkpoints.md 7, model.md 9)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from internvlx_jax.checkpoints.config_section import Section
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import DecoderConfig, DecoderFamily, RopeConfig
from internvlx_jax.core.ranges import LARGEST, LAYERS

ARCHITECTURES: Mapping[str, DecoderFamily] = {
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
}
# Decoders of released InternVL models that are not computed here: what they are, what is missing.
REFUSED_DECODERS: Mapping[str, str] = {
    "qwen3moe": "Qwen3 MoE (InternVL3.5 30B-A3B and 241B-A28B) has routed experts",
    "gptoss": "gpt-oss (InternVL3.5-GPT-OSS-20B-A4B) has routed experts and attention sinks",
    "internlm3": "InternLM3 (InternVL3-9B) has a decoder of its own",
}
# InternLM2's class has a default for every size; for the others a missing size is an error.
_INTERNLM2_SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 103168,
    "max_position_embeddings": 2048,
}
# Fields that `read_decoder` reads; `convert import --field` takes no others.
DECODER_FIELDS = (
    *_INTERNLM2_SIZES,
    "architectures",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "bias",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
    "tie_word_embeddings",
    "use_sliding_window",
    "sliding_window",
    "layer_types",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "resid_pdrop",
    "embd_pdrop",
    "attention_dropout",
)


def read_decoder(
    config: Section, tensors: Collection[str], *, tied_above: bool = False
) -> DecoderConfig:
    """Returns the decoder that a checkpoint holds.

    Args:
        config: The decoder's object of config.json.
        tensors: Names in the checkpoint. A stored output decides against tying, whatever the
            flags say.
        tied_above: The flag of the whole model's config, which counts where the decoder has none:
            some tools write it there only, and transformers writes a meaningless default.

    Raises:
        ConfigError: A field is missing, of a wrong kind, or asks for something that is not
            computed here.
    """
    family = decoder_family(config)
    default = _INTERNLM2_SIZES if family == "internlm2" else {}

    def size(field: str, most: float = LARGEST) -> int:
        return config.integer(field, default.get(field), least=1, most=most)

    _refuse_variants(config, family)
    heads = size("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads, least=1)
    config.check_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    qkv_bias, out_bias = _biases(config, family)
    stored_output = any(name.endswith((".output.weight", ".lm_head.weight")) for name in tensors)
    return DecoderConfig(
        family=family,
        vocab_size=size("vocab_size"),
        width=size("hidden_size"),
        layers=size("num_hidden_layers", LAYERS.high),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(config, family, size("hidden_size"), heads),
        mlp_width=size("intermediate_size"),
        eps=config.number("rms_norm_eps", 1e-5 if family == "phi3" else 1e-6, above=0),
        sliding_window=_sliding_window(config) if family == "phi3" else None,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=family == "qwen3",
        initializer_range=config.number("initializer_range", 0.02, above=0),
        tie_embeddings=config.flag("tie_word_embeddings", tied_above) and not stored_output,
        rope=_rope(config, family, size("max_position_embeddings")),
    )


def decoder_family(config: Section) -> DecoderFamily:
    """Returns the family that `architectures` names.

    Raises:
        ConfigError: There is none, or it is a decoder that is not computed here.
    """
    names = config.get("architectures", [None])
    name = names[0] if isinstance(names, list) and names else None
    family = ARCHITECTURES.get(str(name))
    if family is not None:
        return family
    refuse_decoder(f"{config.name('architectures')}[0] is {name!r}", str(name))
    raise ConfigError(
        f"config.json: {config.name('architectures')}[0] is {name!r}; supported are "
        f"{', '.join(ARCHITECTURES)}"
    )


def refuse_decoder(where: str, name: str) -> None:
    """Raises ConfigError for the name of a decoder that InternVL has and this project has not."""
    plain = name.lower().replace("_", "")
    for known, reason in REFUSED_DECODERS.items():
        if plain.startswith(known):
            raise ConfigError(
                f"config.json: {where}: {reason}, which is not implemented here; use a dense "
                "InternVL with an InternLM2, Qwen2, Qwen3, Llama or Phi-3 decoder"
            )


def _refuse_variants(config: Section, family: DecoderFamily) -> None:
    """Raises ConfigError for what a family's class can do and this decoder does not compute."""
    config.expect("hidden_act", "silu")
    if family in ("qwen2", "qwen3"):
        config.refuse("use_sliding_window")
        layer_types = config.get("layer_types", [])
        if not isinstance(layer_types, list) or any(x != "full_attention" for x in layer_types):
            raise config.wrong("layer_types", "'full_attention' in every layer")
    if family == "llama":
        config.refuse("mlp_bias")
    if family == "phi3":
        config.refuse("resid_pdrop", "embd_pdrop", "attention_dropout")
        config.expect("partial_rotary_factor", 1.0)


def _biases(config: Section, family: DecoderFamily) -> tuple[bool, bool]:
    """Returns whether queries, keys and values, and whether the output map, have biases."""
    if family == "internlm2":
        bias = config.flag("bias", True)
        return bias, bias
    if family in ("llama", "qwen3"):
        bias = config.flag("attention_bias", False)
        return bias, bias
    return family == "qwen2", False


def _head_dim(config: Section, family: DecoderFamily, width: int, heads: int) -> int:
    """Returns the width of a head, which only Qwen3's class has a default for."""
    if family == "qwen3" and "head_dim" not in config.values:
        return 128
    return config.integer("head_dim", width // heads, least=1)


def _sliding_window(config: Section) -> int | None:
    return None if config.get("sliding_window") is None else config.integer("sliding_window")


def _rope(config: Section, family: DecoderFamily, max_positions: int) -> RopeConfig:
    """Reads both spellings: rope_theta with rope_scaling, and the newer rope_parameters."""
    spelling = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    empty = not config.get(spelling)
    rope = Section({}, config.name(spelling) + ".") if empty else config.section(spelling)
    if any(isinstance(value, Mapping) for value in rope.values.values()):
        raise config.wrong(spelling, "one rope for all layers, not one per kind of layer")
    theta = rope.number("rope_theta", config.number("rope_theta", 1e4, above=0), above=0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" or family == "qwen2":  # the release ignores the field for Qwen2
        return RopeConfig(theta=theta, max_positions=max_positions)
    if family == "phi3":
        return _phi3_rope(config, rope, kind, theta, max_positions)
    if kind not in ("linear", "dynamic"):
        raise ConfigError(
            f"config.json: {config.name(spelling)} type {kind!r}; supported are linear and dynamic"
        )
    if rope.get("factor") is None:
        raise ConfigError(f"config.json: {config.name(spelling)} type {kind!r} has no factor")
    factor = rope.number("factor", 1.0, above=0)
    return RopeConfig(theta=theta, max_positions=max_positions, scaling=kind, factor=factor)


def _phi3_rope(
    config: Section, rope: Section, kind: Any, theta: float, max_positions: int
) -> RopeConfig:
    kind = {"longrope": "su"}.get(kind, kind)  # what newer files call it
    if kind not in ("su", "yarn"):
        raise ConfigError(
            f"config.json: {rope.prefix[:-1]} type {kind!r}; Phi-3 has su (longrope) and yarn"
        )
    original = config.integer("original_max_position_embeddings", 4096, least=1)
    factors = []
    for field in ("short_factor", "long_factor"):
        value = rope.get(field)
        if value is None:
            raise ConfigError(f"config.json: {rope.name(field)} is missing")
        if not isinstance(value, list) or not all(isinstance(x, (int, float)) for x in value):
            raise rope.wrong(field, "a list of numbers")
        factors.append(tuple(map(float, value)))
    return RopeConfig(
        theta=theta,
        max_positions=max_positions,
        scaling=kind,
        original_max_positions=rope.integer("original_max_position_embeddings", original, least=1),
        short_factor=factors[0],
        long_factor=factors[1],
    )
