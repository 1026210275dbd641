"""config.json as found in the wild: null, wrong kinds, tied heads, fields by name; refused models.

(design: checkpoints.md 7)
"""

import copy
import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from internvlx_jax.checkpoints import hf_config
from internvlx_jax.checkpoints.config_section import Section
from internvlx_jax.checkpoints.decoder_fields import ARCHITECTURES, DECODER_FIELDS
from internvlx_jax.checkpoints.hf_config import TOP_FIELDS, VISION_FIELDS, model_config
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.cli.convert import main
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import from_dict, to_dict

CHAT = ("mlp1.0.weight", "language_model.lm_head.weight")
HF = ("multi_modal_projector.layer_norm.weight", "language_model.lm_head.weight")
LACKING = {
    "template": "internvl2_5",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "max_dynamic_patch": 12,
}


def convert(*arguments):
    return main([str(argument) for argument in arguments])


def read(folder):
    return json.loads((folder / "config.json").read_text())


def with_value(config, path, value):
    """A copy of a config with one field replaced; the path leads through its objects."""
    changed = copy.deepcopy(config)
    at = changed
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return changed


def paths_of(config, prefix=()):
    for name, value in config.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from paths_of(value, (*prefix, name))


@pytest.mark.parametrize("layout, tensors", [("internvl", CHAT), ("hf", HF)])
@pytest.mark.parametrize("value", [None, "1e6", -3, 1.5, True, [], {}, [None]])
def test_any_value_in_any_field(golden, layout, tensors, value):
    """Read as the default, or refused by the field's own name; what is read can be stored."""
    config = read(golden / "qwen3" / layout)
    accepted = 0
    for path in paths_of(config):
        try:
            model = model_config(
                with_value(config, path, value), tensors, LACKING if layout == "hf" else None
            )
        except ConfigError as error:
            if value is None:
                assert path[-1] in str(error) or "downsample" in str(error), (path, error)
            continue
        accepted += 1
        assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(model)))) == model, path
    assert accepted > 5  # fields that nothing reads


@pytest.mark.parametrize(
    "layout, path, value, message",
    [
        ("internvl", ("vision_config",), None, "vision_config is null; expected an object"),
        ("internvl", ("llm_config",), None, "llm_config is null"),
        ("hf", ("text_config",), None, "text_config is null"),
        ("internvl", ("llm_config", "hidden_size"), None, "llm_config.hidden_size is null"),
        ("hf", ("text_config", "vocab_size"), "200", "text_config.vocab_size is '200'"),
        ("hf", ("text_config", "rms_norm_eps"), 0, "text_config.rms_norm_eps is 0"),
        ("hf", ("vision_feature_layer",), "x", "vision_feature_layer is 'x'"),
        ("hf", ("vision_config", "attention_bias"), 3, "vision_config.attention_bias is 3"),
        ("hf", ("vision_config", "use_qk_norm"), "no", "vision_config.use_qk_norm is 'no'"),
        ("internvl", ("max_dynamic_patch",), "12", "max_dynamic_patch is '12'"),
        ("internvl", ("llm_config", "eos_token_id"), "</s>", "llm_config.eos_token_id is '</s>'"),
        ("hf", ("vision_feature_layer",), 9, "vision_feature_layer is 9; expected a layer"),
        ("internvl", ("select_layer",), -9, "select_layer is -9; expected a layer of the tower"),
        ("internvl", ("downsample_ratio",), 0.3, "downsample_ratio is 0.3; expected 1, 1/2, 1/4"),
        ("internvl", ("llm_config", "num_hidden_layers"), 10**9, "expected a whole number up to"),
        ("hf", ("text_config", "layer_types"), ["sliding_attention"], "layer_types"),
        (
            "hf",
            ("text_config", "rope_parameters"),
            {"full_attention": {"rope_theta": 1e6}},
            "text_config.rope_parameters",
        ),
    ],
)
def test_messages_spell_the_field_as_the_file_does(golden, layout, path, value, message):
    config = with_value(read(golden / "qwen3" / layout), path, value)
    with pytest.raises(ConfigError, match=f"config.json: .*{message}"):
        model_config(config, HF, LACKING if layout == "hf" else None)


def test_null_is_the_default(golden):
    """Fields that have one read as if they were missing."""
    config = read(golden / "qwen3" / "internvl")
    for path in (
        ("max_dynamic_patch",),
        ("downsample_ratio",),
        ("ps_version",),
        ("vision_config", "patch_size"),
        ("vision_config", "drop_path_rate"),
        ("llm_config", "rms_norm_eps"),
        ("llm_config", "rope_theta"),
        ("llm_config", "initializer_range"),
        ("llm_config", "num_key_value_heads"),
    ):
        missing = copy.deepcopy(config)
        at = missing if len(path) == 1 else missing[path[0]]
        at.pop(path[-1], None)
        assert model_config(with_value(config, path, None), CHAT) == model_config(missing, CHAT)


def test_every_field_that_is_read_can_be_given(golden, monkeypatch):
    asked = set()
    get = Section.get

    def recording(self, field, default=None):
        asked.add((self.prefix, field))
        return get(self, field, default)

    monkeypatch.setattr(Section, "get", recording)
    config = read(golden / "qwen3" / "internvl")
    for architecture in ARCHITECTURES:
        model_config(with_value(config, ("llm_config", "architectures"), [architecture]), CHAT)
    known = {
        "": {*TOP_FIELDS, "model_type"},
        "vision_config.": set(VISION_FIELDS),
        "llm_config.": {*DECODER_FIELDS, *hf_config.DECODER_IDS, "model_type"},
    }
    unknown = {
        (prefix, field) for prefix, field in asked if field not in known.get(prefix, (field,))
    }  # an object in a part, such as rope_parameters, is given whole
    assert unknown == set()


def test_misspelt_fields_are_refused_with_the_nearest(golden):
    config = read(golden / "qwen3" / "internvl")
    for name, near in (
        ("tempalte", "template"),
        ("llm_config.tie_word_embedding", "llm_config.tie_word_embeddings"),
        ("rope_theta", "llm_config.rope_theta"),
    ):
        with pytest.raises(ConfigError, match=f'--field {name}: .*Did you mean "{near}"'):
            model_config(config, CHAT, {name: "x"})
    changed = model_config(config, CHAT, {"llm_config.rope_theta": 5e5, "max_dynamic_patch": 3})
    assert (changed.decoder.rope.theta, changed.prompt.tiles.max_num) == (5e5, 3)


@pytest.fixture
def headless(golden, tmp_path):
    """A Qwen2 checkpoint without lm_head whose decoder says that it is not tied."""
    folder = tmp_path / "headless"
    folder.mkdir()
    tensors = load_file(golden / "qwen2" / "model.safetensors")
    tensors.pop("language_model.lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    shutil.copyfile(golden / "qwen2" / "config.json", folder / "config.json")
    return folder


def test_a_missing_head_names_the_flag(headless, tmp_path, capsys):
    assert convert("import", "--from", headless, "--to", tmp_path / "jax") == 1
    error = capsys.readouterr().err
    assert "missing tensor language_model.lm_head.weight" in error
    assert "set llm_config.tie_word_embeddings to true" in error
    assert not (tmp_path / "jax").exists()


@pytest.mark.parametrize(
    "flag", ["llm_config.tie_word_embeddings=true", "tie_word_embeddings=true", None]
)
def test_tied_by_a_field_or_by_the_flag_above(headless, tmp_path, flag):
    if flag is None:  # at the top level only
        config = read(headless)
        assert config["tie_word_embeddings"] is True
        del config["llm_config"]["tie_word_embeddings"]
        (headless / "config.json").write_text(json.dumps(config))
    fields = () if flag is None else ("--field", flag)
    assert convert("import", "--from", headless, "--to", tmp_path / "jax", *fields) == 0
    assert RunFolder(tmp_path / "jax").config.decoder.tie_embeddings


def test_an_index_beside_a_single_file_of_its_own(golden, tmp_path, capsys):
    """One of the two is stale, and no reader could tell which without a message."""
    folder = tmp_path / "both"
    shutil.copytree(golden / "qwen2", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert("inspect", folder) == 1
    error = capsys.readouterr().err
    assert "both model.safetensors and model.safetensors.index.json" in error
    assert "is newer). Remove model.safetensors, or the index" in error
    (folder / "model.safetensors").unlink()
    assert convert("inspect", folder) == 0
    # An index that names the single file is no contradiction.
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert("inspect", folder) == 0


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": None}, "expected an object with weight_map"),
        ({"weight_map": {"a": 3}}, "weight_map places 'a' in 3, which is no file name"),
        ({"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors', which is no file name"),
        ([], "expected an object with weight_map"),
    ],
)
def test_a_damaged_index_is_named(golden, tmp_path, capsys, index, message):
    folder = tmp_path / "index"
    shutil.copytree(golden / "qwen2", folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert("inspect", folder) == 1
    error = capsys.readouterr().err
    assert "model.safetensors.index.json" in error and message in error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"llm_config": "Qwen3MoeForCausalLM"}, r"Qwen3 MoE \(InternVL3.5 30B-A3B and 241B-A28B\)"),
        ({"llm_config": "GptOssForCausalLM"}, "gpt-oss .* routed experts and attention sinks"),
        ({"llm_config": "InternLM3ForCausalLM"}, r"InternLM3 \(InternVL3-9B\)"),
        ({"text_config": "qwen3_moe"}, "text_config.model_type is 'qwen3_moe': Qwen3 MoE"),
        ({"text_config": "gpt_oss"}, "text_config.model_type is 'gpt_oss': gpt-oss"),
        ({"model_type": "internvl_u"}, "InternVL-U generates images"),
        ({"tensors": ["mlp2.0.weight"]}, "router"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(golden, change, message):
    """One sentence each: what the model has, that it is not implemented, what to use instead."""
    is_hf = "text_config" in change
    config = read(golden / "qwen3" / ("hf" if is_hf else "internvl"))
    if "llm_config" in change:
        config["llm_config"]["architectures"] = [change["llm_config"]]
    if is_hf:
        config["text_config"]["model_type"] = change["text_config"]
    config["model_type"] = change.get("model_type", config["model_type"])
    tensors = [*(HF if is_hf else CHAT), *change.get("tensors", ())]
    with pytest.raises(ConfigError, match=message) as caught:
        model_config(config, tensors, LACKING if is_hf else None)
    assert "not implemented here; use" in str(caught.value) and "\n" not in str(caught.value)
