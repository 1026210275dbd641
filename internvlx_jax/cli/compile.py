"""Compiles a run for devices that need not be attached, and reports what each step takes.

    internvlx compile --config configs/hd_finetune.py --topology v5e:16x16 --out report.json

Exit status: 0 done, 1 a step does not fit or the input is wrong, 2 wrong flags.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from internvlx_jax.cli.console import (
    CommandParser,
    add_config_flags,
    configure_logging,
    run_command,
)
from internvlx_jax.core.files import write_json
from internvlx_jax.core.ranges import NUMBER, whole_number


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = _parser().parse_args(argv)
    configure_logging()
    return run_command(lambda: _run(args))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="internvlx compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_flags(parser, "data.samples_per_step=256 mesh.tensor=2")
    parser.add_argument(
        "--topology",
        required=True,
        help="v5e:16x16, v5p:4x4x8, v6e:16x16*2 (two slices), h200:1x1x8, ...",
    )
    parser.add_argument(
        "--tiles",
        nargs="*",
        type=whole_number(NUMBER),
        help="report only buckets with these numbers of tile slots",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report as JSON")
    return parser


def _run(args: argparse.Namespace) -> None:
    import jax  # not for --help

    from internvlx_jax.aot.compile_report import check_fits, report_config, table

    # Nothing is executed here, so no device should be taken from a job that uses it.
    jax.config.update("jax_platforms", "cpu")
    where, reports, mesh = report_config(args.config, args.settings, args.topology, args.tiles)
    print(table(reports, where, mesh))
    if args.out:
        write_json(
            args.out,
            {
                "config": args.config,
                "settings": args.settings,
                "topology": where.name,
                "devices": len(where.devices),
                "mesh": dict(mesh.shape),
                "hbm_limit_bytes": None if where.memory is None else int(where.memory),
                "buckets": [dataclasses.asdict(report) for report in reports],
            },
        )
    check_fits(reports, where)
