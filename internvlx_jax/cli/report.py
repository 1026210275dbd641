"""Draws the learning curves of a run, and puts all that is known of the run on one page.

    internvlx report runs/mine

Writes curves.png and report.html to the run folder. Exit status: 0 done, 1 wrong input.
"""

from __future__ import annotations

import argparse
import sys

from internvlx_jax.cli.console import CommandParser, configure_logging
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.paths import as_path
from internvlx_jax.training.report import draw_curves
from internvlx_jax.training.report_page import write_page


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = CommandParser(
        prog="internvlx report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN_DIR", help="output_dir of a training run")
    parser.add_argument(
        "--chance", type=float, help="exact match without seeing the images, 0 to 1"
    )
    args = parser.parse_args(argv)
    configure_logging()
    try:
        run = as_path(args.run)
        print(f"wrote {draw_curves(run, chance=args.chance)}")
        print(f"wrote {write_page(run)}")
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
