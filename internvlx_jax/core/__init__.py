"""What every other room speaks of: settings, arrays that travel, files and errors.

Settings are frozen dataclasses: of a model (model_config.py, tile_config.py, presets.py), of data,
of a run and of an evaluation. `overrides.py` reads config files and `--set`. `inputs.py` holds the
arrays that a model reads.

Nothing here imports jax or another room, so that a config file, a loader process and `--help` stay
light.
"""
