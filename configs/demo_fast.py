"""The demo with LVTC `fast`: 1 visual token a tile in the first decoder layer, 4 in the second.

The pages are those of `make demo`.
"""

import dataclasses
from pathlib import Path

from internvlx_jax.core.overrides import load_config_file
from internvlx_jax.core.presets import lvtc_preset
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    demo = load_config_file(Path(__file__).with_name("demo.py"))
    lvtc = lvtc_preset("fast", token_grid=demo.model.token_grid, expand_layer=1, inject_layers=())
    model = dataclasses.replace(demo.model, lvtc=lvtc)
    return dataclasses.replace(demo, output_dir="runs/demo_fast", model=model, steps=2600)
