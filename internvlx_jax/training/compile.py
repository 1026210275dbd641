"""Runs `internvlx compile` under its earlier name."""

import sys

from internvlx_jax.cli.compile import main

if __name__ == "__main__":
    sys.exit(main())
