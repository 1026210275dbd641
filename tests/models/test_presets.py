"""The paper's models and their LVTC (model.md 1, lvtc.md 2)."""

import dataclasses
import json
from typing import get_args

import pytest

from internvlx_jax.checkpoints.hf_config import model_config
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.family_presets import Base, expand_layer, internvl, internvlx_on
from internvlx_jax.core.overrides import load_config_file, override
from internvlx_jax.core.presets import internvlx_2b, internvlx_8b, lvtc_preset
from internvlx_jax.core.projector_sites import released_site
from internvlx_jax.models.params import abstract_model

SIZES = {"2b": internvlx_2b, "8b": internvlx_8b}


@pytest.mark.parametrize("size", SIZES)
def test_off_is_the_released_model(golden, size):
    """Same settings as the released config.json, but for fresh weights and training."""
    stored = json.loads((golden / f"shapes-{size}.json").read_text())
    released, ours = model_config(stored["config"], stored["shapes"]), SIZES[size]()
    fresh = dict(layer_scale_init=ours.vision.layer_scale_init, drop_path=ours.vision.drop_path)
    assert (
        dataclasses.replace(released, vision=dataclasses.replace(released.vision, **fresh)) == ours
    )


@pytest.mark.parametrize(
    "preset, role, tokens, mean",
    [
        ("off", "low", 256, (256, 256)),
        ("paper", "low", 1024, (416, 376)),
        ("paper_inject", "low", 1024, (416, 376)),
        ("fast", "high", 256, (104, 94)),
        ("fast_inject", "high", 256, (104, 94)),
    ],
)
def test_each_preset(preset, role, tokens, mean):
    """The released projector, slots per tile, and the mean visual tokens of lvtc.md 5."""
    for make, expected in zip(SIZES.values(), mean):
        model = make(preset)
        assert (released_site(model).name, model.tokens_per_tile) == (role, tokens)
        layers, lvtc = model.decoder.layers, model.lvtc
        low, first_deep = (lvtc.low_grid, lvtc.expand_layer) if lvtc else (16, 0)
        assert round((first_deep * low**2 + (layers - first_deep) * tokens) / layers) == expected
        if preset.endswith("inject"):
            assert len(lvtc.inject_layers) == 2 and first_deep < min(lvtc.inject_layers) < layers

    added = (
        abstract_model(model, dtype="bfloat16").shapes.keys()
        - abstract_model(make(), dtype="bfloat16").shapes.keys()
    )
    assert all(path.startswith("lvtc.") for path in added) and bool(added) == (preset != "off")


def test_an_unknown_preset():
    with pytest.raises(
        ConfigError, match="LVTC preset 'quick' is unknown; choose one of off, paper"
    ):
        lvtc_preset("quick", token_grid=16, expand_layer=1, inject_layers=())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", ["off", "paper", "fast"])
def test_run_configs(size, preset):
    config = load_config_file(f"configs/hd_finetune.py:size={size},lvtc={preset}")
    assert config.model.lvtc == SIZES[size](preset).lvtc
    tiles = config.model.prompt.tiles
    assert (tiles.rule, tiles.max_num, tiles.use_thumbnail) == ("edge", 6, True)
    assert config.data.max_length >= 7 * config.model.tokens_per_tile + 256


def test_lvtc_from_the_command_line():
    """Field by field, also where the config has none yet; a misspelt one is named."""
    demo = load_config_file("configs/demo.py")
    assert demo.model.lvtc is not None
    config = override(demo, ["model.lvtc=none"])
    assert config.model.lvtc is None
    set_to = override(
        config, ["model.lvtc.expand_layer=1", "model.lvtc.low_grid=1", "model.lvtc.high_grid=2"]
    ).model.lvtc
    assert (set_to.expand_layer, set_to.low_grid, set_to.high_grid, set_to.gate) == (1, 1, 2, 0.0)
    with pytest.raises(ConfigError, match="did you mean expand_layer"):
        override(config, ["model.lvtc.expnd_layer=1"])
    with pytest.raises(ConfigError, match="lvtc.*expand_layer"):
        override(config, ["model.lvtc.low_grid=1"])
    assert override(demo, ["model.lvtc.gate=none"]).model.lvtc.gate is None


# Totals of the public decoders: those of Qwen2.5 with its own vocabulary rows and tied or untied
# output, those of Qwen3 untied (in billions, to three digits).
QWEN2_5 = {
    "internvl3_1b": (151_936, True, 494_032_768),
    "internvl3_2b": (151_936, True, 1_543_714_304),
    "internvl3_8b": (152_064, False, 7_615_616_512),
    "internvl3_14b": (152_064, False, 14_770_033_664),
}
QWEN3 = {"1b": 0.752, "2b": 2.032, "4b": 4.411, "8b": 8.191, "14b": 14.768}


def decoder_size(model, **changes):
    """Parameters of the decoder, counted without allocating any."""
    model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, **changes))
    shapes = abstract_model(model, dtype="bfloat16").shapes
    return sum(leaf.size for path, leaf in shapes.items() if path.startswith("decoder."))


@pytest.mark.parametrize("base", get_args(Base))
def test_decoders_of_the_family(base):
    model = internvl(base)
    if base in QWEN2_5:
        rows, tied, total = QWEN2_5[base]
        assert decoder_size(model, vocab_size=rows, tie_embeddings=tied) == total
    else:
        total = QWEN3[base.removeprefix("internvl3_5_")]
        assert round(decoder_size(model) / 1e9, 3) == total
    assert model.tokens_per_tile == 256 and not model.decoder.tie_embeddings


@pytest.mark.parametrize("base", get_args(Base))
def test_the_x_form_of_the_family(base):
    """Tower and decoder of the base, PVTC for mlp1, and LVTC at the paper's depth."""
    plain, ours = internvl(base), internvlx_on(base, "paper_inject")
    assert (plain.projector.kind, ours.projector.kind) == ("mlp1", "pvtc")
    assert plain.decoder == ours.decoder
    layers, first_deep = ours.decoder.layers, ours.lvtc.expand_layer
    assert 18 / 24 <= first_deep / layers <= 27 / 32 and max(ours.lvtc.inject_layers) < layers
    assert released_site(ours).name == "low"
    plain_shapes, shapes = (
        abstract_model(model, dtype="bfloat16").shapes for model in (plain, ours)
    )
    for path, leaf in plain_shapes.items():
        if not path.startswith("projector."):
            assert shapes[path].shape == leaf.shape, path


def test_depths_of_lvtc():
    depths = {base: expand_layer(internvl(base).decoder) for base in get_args(Base)}
    assert [expand_layer(make().decoder) for make in SIZES.values()] == [19, 27]  # the paper's
    assert depths["internvl3_5_2b"] == 22 and depths["internvl3_8b"] == 23
    assert depths["internvl3_5_8b"] == 30 and depths["internvl3_14b"] == 40


def test_an_unknown_base():
    with pytest.raises(ConfigError, match='Did you mean "internvl3_5_2b"'):
        internvl("internvl35_2b")


@pytest.mark.parametrize("stage, trained", [("x_warmup", (True, True)), ("x_full", (False, False))])
@pytest.mark.parametrize("base", ["internvl3_2b", "internvl3_5_2b"])
def test_stages_on_a_modern_base(stage, trained, base):
    config = load_config_file(f"configs/{stage}.py:base={base},lvtc=fast")
    assert (config.freeze.vit, config.freeze.llm) == trained and not config.freeze.projector
    assert config.model.decoder == internvl(base).decoder and config.model.lvtc is not None
    if stage == "x_full":
        before = load_config_file(f"configs/x_warmup.py:base={base},lvtc=fast")
        assert config.init_from == before.output_dir
