"""Compile a run for devices that need not be attached, and say what each step takes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import jax

from internvlx_jax.aot.compile_report import check_fits, report_config, table
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import write_json


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="internvlx compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument(
        "--topology",
        required=True,
        help="v5e:16x16, v5p:4x4x8, v6e:16x16*2 (two slices), h200:1x1x8, ...",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="override fields, e.g. data.samples_per_step=256 mesh.tensor=2",
    )
    parser.add_argument(
        "--tiles", nargs="*", type=int, help="only the buckets with so many tile slots"
    )
    parser.add_argument("--out", type=Path, help="write the report there as JSON")
    args = parser.parse_args(argv)
    jax.config.update(
        "jax_platforms", "cpu"
    )  # nothing runs here, and no device is to be taken from a job
    try:
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
                    "hbm_limit_bytes": int(where.memory),
                    "buckets": [dataclasses.asdict(report) for report in reports],
                },
            )
        check_fits(reports, where)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
