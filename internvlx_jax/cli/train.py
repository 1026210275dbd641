"""Train a model: `python train.py --config configs/NAME.py --set optimizer.learning_rate=1e-4`.

The same command resumes a run that was stopped. Exit status: 0 done, 1 wrong input or too many bad steps, 75 ended by
SIGTERM with a checkpoint: start the same command again.
"""

from __future__ import annotations

import argparse
import sys

from internvlx_jax.core.errors import CheckpointError, ConfigError, SampleError
from internvlx_jax.core.overrides import load_config_file, override
from internvlx_jax.training import distributed
from internvlx_jax.training.bad_steps import NonFiniteError
from internvlx_jax.training.loop import train
from internvlx_jax.training.preemption import EXIT_STATUS, Preempted
from internvlx_jax.training.profiler import Window


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="override fields, e.g. data.max_length=2048 mesh.fsdp=8",
    )
    parser.add_argument(
        "--stop_after",
        type=int,
        help="stop after this many steps, with a checkpoint to resume from",
    )
    parser.add_argument(
        "--profile", metavar="START:STOP", help="trace these steps to profile/ of the run folder"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="compile the step of every bucket, print memory, FLOPs and traffic, and end",
    )
    distributed.add_flags(parser)
    args = parser.parse_args(argv)
    try:
        config = override(load_config_file(args.config), args.settings)
        profile = args.profile and Window.parse(args.profile)
        distributed.start_from(args)
        train(config, stop_after=args.stop_after, profile=profile, dry_run=args.dry_run)
    except (ConfigError, CheckpointError, SampleError, NonFiniteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Preempted as told:
        print(told, file=sys.stderr)
        return EXIT_STATUS
    return 0
