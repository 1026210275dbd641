"""config.json: defaults, both RoPE spellings; every refusal names its field (checkpoints.md 7)."""

import json

import pytest

from internvlx_jax.checkpoints.hf_config import model_config
from internvlx_jax.core.errors import ConfigError

X = ("projector.cls_scale", "language_model.output.weight")


@pytest.fixture
def config(golden):
    return json.loads((golden / "internlm2" / "config.json").read_text())


def test_golden_variants(golden):
    configs = {
        name: model_config(json.loads((golden / name / "config.json").read_text()), X)
        for name in ("internlm2", "internlm2_qknorm", "qwen2")
    }
    qknorm = configs["internlm2_qknorm"]
    assert (qknorm.vision.norm, qknorm.vision.qk_norm, qknorm.vision.qkv_bias) == (
        "rms_norm",
        True,
        False,
    )
    assert (qknorm.vision.select_layer, qknorm.projector.pixel_shuffle, qknorm.tokens_per_tile) == (
        -2,
        "v1",
        16,
    )
    assert qknorm.decoder.qkv_bias and qknorm.decoder.out_bias
    qwen = configs["qwen2"]
    assert (qwen.decoder.qkv_bias, qwen.decoder.out_bias) == (True, False)
    assert qwen.prompt.eos_ids == (3,) and qwen.prompt.pad_id == 3  # no pad id of its own
    assert configs["internlm2"].prompt.pad_id == 2


def test_class_defaults_where_a_field_is_absent(config):
    for field in ("ps_version", "downsample_ratio", "select_layer"):
        del config[field]
    for field in ("bias", "rms_norm_eps", "rope_theta"):
        del config["llm_config"][field]
    parsed = model_config(config, X)
    assert (parsed.projector.pixel_shuffle, parsed.projector.downsample_ratio) == ("v1", 0.5)
    assert parsed.vision.select_layer == -1
    assert (
        parsed.decoder.qkv_bias and parsed.decoder.eps == 1e-6 and parsed.decoder.rope.theta == 1e4
    )


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e6}},
    ],
)
def test_rope_spellings(config, spelling):
    config["llm_config"] = {
        k: v for k, v in config["llm_config"].items() if k != "rope_scaling"
    } | spelling
    rope = model_config(config, X).decoder.rope
    assert (rope.scaling, rope.factor, rope.theta, rope.max_positions) == ("dynamic", 3.0, 1e6, 512)


def test_output_is_tied_only_without_a_stored_one(config):
    config["llm_config"]["tie_word_embeddings"] = True
    assert not model_config(config, X).decoder.tie_embeddings
    assert model_config(config, X[:1]).decoder.tie_embeddings


@pytest.mark.parametrize(
    "section, field, value, message",
    [
        (None, "model_type", "llava", "model_type is 'llava'"),
        (None, "pad2square", True, "pad2square = True"),
        ("vision_config", "dropout", 0.1, "vision_config.dropout = 0.1"),
        ("vision_config", "hidden_act", "relu", "vision_config.hidden_act is 'relu'"),
        (
            None,
            "force_image_size",
            112,
            "force_image_size 112 differs from vision_config.image_size 56",
        ),
        (
            "llm_config",
            "architectures",
            ["MambaForCausalLM"],
            r"architectures\[0\] is 'MambaForCausalLM'",
        ),
        ("llm_config", "rope_scaling", {"type": "yarn", "factor": 2.0}, "rope_scaling type 'yarn'"),
        (None, "downsample_ratio", 0.3, "downsample_ratio is 0.3"),
    ],
)
def test_refusals_name_the_field(config, section, field, value, message):
    (config if section is None else config[section])[field] = value
    with pytest.raises(ValueError, match=message):
        model_config(config, X)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("attention_dropout", 0.1, "llm_config.attention_dropout = 0.1"),
        ("partial_rotary_factor", 0.75, "partial_rotary_factor is 0.75"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "Phi-3 has su"),
        ("rope_scaling", {"type": "su", "short_factor": [1.0]}, "long_factor is missing"),
    ],
)
def test_phi3(config, field, value, message):
    config["llm_config"] |= {
        "architectures": ["Phi3ForCausalLM"],
        "sliding_window": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1],
            "long_factor": [2],
            "original_max_position_embeddings": 128,
        },
    }
    decoder = model_config(config, X).decoder
    assert (decoder.family, decoder.sliding_window, decoder.qkv_bias) == ("phi3", 64, False)
    assert (
        decoder.rope.scaling,
        decoder.rope.long_factor,
        decoder.rope.original_max_positions,
    ) == ("su", (2.0,), 128)
    config["llm_config"][field] = value
    with pytest.raises(ConfigError, match=message):
        model_config(config, X)


def test_missing_sections_and_sizes(config):
    llama = {**config["llm_config"], "architectures": ["LlamaForCausalLM"]}
    del llama["intermediate_size"]
    with pytest.raises(ConfigError, match="llm_config.intermediate_size is missing"):
        model_config({**config, "llm_config": llama}, X)
    del config["vision_config"]
    with pytest.raises(ConfigError, match="vision_config is missing"):
        model_config(config, X)
