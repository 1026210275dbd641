"""Draws the learning curves of a run, and puts all that is known of the run on one page.

    internvlx report runs/mine

Writes curves.png and report.html to the run folder. Exit status: 0 done, 1 wrong input.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from internvlx_jax.cli.console import CommandParser, configure_logging, run_command
from internvlx_jax.core.ranges import SHARE, real_number
from internvlx_jax.training.report import draw_curves
from internvlx_jax.training.report_page import write_page


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = CommandParser(
        prog="internvlx report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output_dir of a training run")
    parser.add_argument(
        "--chance", type=real_number(SHARE), help="exact match without seeing the images, 0 to 1"
    )
    args = parser.parse_args(argv)
    configure_logging()

    def draw() -> None:
        print(f"wrote {draw_curves(args.run, chance=args.chance)}")
        print(f"wrote {write_page(args.run)}")

    return run_command(draw)
