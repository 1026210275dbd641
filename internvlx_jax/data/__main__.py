"""Runs `internvlx data` under its earlier name."""

import sys

from internvlx_jax.cli.data import main

if __name__ == "__main__":
    sys.exit(main())
