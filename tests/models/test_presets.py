"""The paper's models and their LVTC (model.md 1, lvtc.md 2)."""

import dataclasses
import json

import pytest

from internvlx_jax.checkpoints.hf_config import model_config
from internvlx_jax.core.errors import ConfigError
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
