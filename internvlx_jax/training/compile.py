"""Runs `internvlx compile` under its earlier name."""

import sys

if __name__ == "__main__":
    from internvlx_jax.cli.compile import main

    sys.exit(main())
