"""Runs `internvlx` as `python -m internvlx_jax`."""

import sys

from internvlx_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
