"""Trains a model, or resumes a run that was stopped.

    internvlx train --config configs/NAME.py --set output_dir=runs/mine

The same command resumes a run. Exit status: 0 done, 1 wrong input or too many bad steps, 2 wrong
flags, 75 stopped by SIGTERM or Ctrl-C with a checkpoint (run the same command again), 130 stopped
by Ctrl-C outside the steps.
"""
# What computes is imported once the flags are right: --help and wrong flags answer at once.

from __future__ import annotations

import argparse
import sys

from internvlx_jax.cli.console import (
    CommandParser,
    add_config_flags,
    configure_logging,
    run_command,
)
from internvlx_jax.core.overrides import load_config_file, override
from internvlx_jax.core.ranges import COUNT, whole_number
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.training import distributed


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = _parser().parse_args(argv)
    configure_logging()

    def run() -> int:
        # These load jax, which takes seconds, in which Ctrl-C has its one line as well.
        from internvlx_jax.training.bad_steps import NonFiniteError
        from internvlx_jax.training.preemption import EXIT_STATUS, Preempted

        try:
            _run(override(load_config_file(args.config), args.settings), args)
        except Preempted as told:
            print(told, file=sys.stderr)
            return EXIT_STATUS
        except NonFiniteError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    words = "interrupted; the same command goes on from the newest checkpoint, if there is one"
    return run_command(run, interrupted=words)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="internvlx train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_flags(parser, "data.max_length=2048 mesh.fsdp=8")
    parser.add_argument(
        "--stop_after",
        type=whole_number(COUNT),
        metavar="STEPS",
        help="stop after this many steps, with a checkpoint to resume from",
    )
    parser.add_argument(
        "--profile", metavar="START:STOP", help="trace these steps to profile/ of the run folder"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="compile the step of every bucket, print memory, FLOPs and traffic, and stop",
    )
    distributed.add_flags(parser)
    return parser


def _run(config: TrainConfig, args: argparse.Namespace) -> None:
    from internvlx_jax.aot.compile_report import check_fits, table
    from internvlx_jax.aot.dry_run import dry_run
    from internvlx_jax.evaluation.in_loop import InLoop
    from internvlx_jax.training.loop import train
    from internvlx_jax.training.peers import ending_together
    from internvlx_jax.training.preemption import Preempted
    from internvlx_jax.training.profiler import Window

    profile = args.profile and Window.parse(args.profile)
    configure_logging(distributed.start_from(args))
    if not args.dry_run:
        with ending_together(Preempted):
            train(config, stop_after=args.stop_after, profile=profile, benchmarks=InLoop)
        return
    where, reports, mesh = dry_run(config)
    print(table(reports, where, mesh))
    check_fits(reports, where)
