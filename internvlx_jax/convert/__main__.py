"""Runs `internvlx convert` under its earlier name."""

import sys

from internvlx_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
