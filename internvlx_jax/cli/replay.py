"""Runs one step of a run again, without its update, and prints one JSON object.

    internvlx replay RUN_DIR --step N

Shows which module, and which samples, make a step bad. Exit status: 0 done, 1 wrong input.
"""

from __future__ import annotations

import argparse
import json

from internvlx_jax.cli.console import CommandParser, configure_logging, run_command
from internvlx_jax.core.ranges import COUNT, whole_number


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = CommandParser(
        prog="internvlx replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN_DIR", help="output_dir of a training run")
    parser.add_argument(
        "--step",
        type=whole_number(COUNT),
        required=True,
        help="as in bad_steps.jsonl and metrics.jsonl, from 1",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="replace settings of the run, e.g. mesh.data=1",
    )
    args = parser.parse_args(argv)
    configure_logging()
    from internvlx_jax.training.replay import replay  # with jax, which --help does without

    return run_command(
        lambda: print(json.dumps(replay(args.run, args.step, args.settings), indent=2))
    )
