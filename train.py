"""Trains a model: `python train.py --config configs/NAME.py`; the same as `internvlx train`."""

import sys

from internvlx_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
