"""Runs `internvlx chat` under its earlier name, `python -m internvlx_jax.chat`."""

import sys

from internvlx_jax.cli.chat import main

if __name__ == "__main__":
    sys.exit(main())
