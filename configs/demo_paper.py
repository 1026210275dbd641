"""The demo with LVTC `paper`: 4 visual tokens a tile in the first decoder layer, 16 in the second.

The pages are those of `make demo`.
"""

import dataclasses
from pathlib import Path

from internvlx_jax.core.overrides import load_config_file
from internvlx_jax.core.presets import lvtc_preset
from internvlx_jax.core.run_config import TrainConfig


def get_config() -> TrainConfig:
    demo = load_config_file(Path(__file__).with_name("demo.py"))
    lvtc = lvtc_preset("paper", token_grid=demo.model.token_grid, expand_layer=1, inject_layers=())
    model = dataclasses.replace(demo.model, lvtc=lvtc)
    data = dataclasses.replace(demo.data, max_length=480)  # tiles are longer in the long layout
    return dataclasses.replace(
        demo, output_dir="runs/demo_paper", model=model, steps=1600, data=data
    )
