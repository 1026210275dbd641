"""Compiles configs/hd_finetune.py for pods that are not attached, for the table of docs/scaling.md.

    python benchmarks/scaling.py --write docs/scaling.md

Each row is a model, an LVTC preset and a topology, with the largest bucket: all tiles at full
length.
Needs the compiler for TPUs (pip install 'internvlx-jax[tpu]') but no TPU. JAX_OPTIMIZATION_LEVEL=O0
compiles several times faster and changes memory by about 1 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from internvlx_jax.aot.compile_report import check_fits, report_config
from internvlx_jax.core.chips import GIB
from internvlx_jax.core.errors import ConfigError

MODELS = ("2b", "8b")
PRESETS = ("off", "paper", "fast")
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16")
TILES = 7
CONFIGS = Path(__file__).parents[1] / "configs"
BEGIN, END = "<!-- made by benchmarks/scaling.py -->", "<!-- end -->"
HEAD = (
    "| model | LVTC | topology | data x fsdp x tensor | rows | slots | peak GiB of | "
    "TFLOP per device | collectives GB | compute ms | memory ms | network ms | "
    "roofline MFU | compile s |\n" + "|" + "---|" * 14
)


def row(model: str, preset: str, topology: str, settings: list[str]) -> tuple[str, dict[str, Any]]:
    """Compiles one case.

    Args:
        model: "2b" or "8b".
        preset: Of LVTC.
        topology: Name of the devices, such as `v5e:16x16`.
        settings: Further `field=value` of the config.

    Returns:
        The line of the table, and all numbers.

    Raises:
        ConfigError: The step does not fit the memory of a device.
    """
    name = f"hd_finetune.py:size={model},lvtc={preset}"
    target, (report,), mesh = report_config(CONFIGS / name, settings, topology, [TILES])
    check_fits([report], target)
    assert target.memory is not None  # every topology names a chip of known memory
    received = sum(each["bytes"] for each in report.collectives.values())
    slots = f"{report.length}" + (f" ({report.short_length})" if report.short_length else "")
    cells = [
        model.upper(),
        preset,
        topology,
        " x ".join(map(str, mesh.shape.values())),
        report.batch,
        slots,
        f"{report.peak_hbm_bytes / GIB:.2f} of {target.memory / GIB:.2f}",
        f"{report.flops['total'] / 1e12:.1f}",
        f"{received / 1e9:.1f}",
        *(f"{ms:.0f}" for ms in (report.compute_ms, report.memory_ms, report.network_ms)),
        f"{report.roofline_mfu:.0%}",
        f"{report.compile_s:.0f}",
    ]
    return (
        "| " + " | ".join(map(str, cells)) + " |",
        {
            "config": name,
            "topology": topology,
            "mesh": dict(mesh.shape),
            "hbm_limit_bytes": target.memory,
            **dataclasses.asdict(report),
        },
    )


def main() -> int:
    """Runs the command.

    Returns:
        Exit status, 1 if a case does not fit or cannot be compiled.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--topologies", nargs="*", default=TOPOLOGIES)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", dest="settings")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the table in this page")
    parser.add_argument("--out", type=Path, help="write all numbers to this file as JSON")
    args = parser.parse_args()
    failed, lines, reports = [], [], []

    def attempt(case: tuple[str, str, str]) -> tuple[str, dict[str, Any]] | None:
        try:
            line, report = row(*case, args.settings)
        except ConfigError as error:
            print(f"{' '.join(case)}: {error}", file=sys.stderr, flush=True)
            return None
        print(line, flush=True)
        return line, report

    cases = list(itertools.product(args.models, args.presets, args.topologies))
    print(HEAD)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        for case, made in zip(cases, threads.map(attempt, cases)):
            if made is None:
                failed.append(case)
            else:
                lines.append(made[0])
                reports.append(made[1])
    if args.out:
        args.out.write_text(json.dumps(reports, indent=1))
    if args.write:
        before, _, rest = args.write.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        args.write.write_text(f"{before}{BEGIN}\n{HEAD}\n" + "\n".join(lines) + f"\n{END}{after}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
