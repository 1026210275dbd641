"""Compiles recipes for pods that are not attached, for the tables of docs/scaling.md.

    python benchmarks/scaling.py --write docs/scaling.md

Two tables: the models of the paper (configs/hd_finetune.py), and InternVL-X on InternVL3 and 3.5
(configs/x_full.py). Each row is a model, an LVTC preset and a topology, with the largest bucket:
all tiles at full length.
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


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        config: Config file with its arguments, `{model}` and `{preset}` in their places.
        models: Values of `{model}`.
        presets: LVTC presets.
        topologies: Names of devices.
    """

    config: str
    models: tuple[str, ...]
    presets: tuple[str, ...]
    topologies: tuple[str, ...]

    @property
    def begin(self) -> str:
        """The line of the page in front of the table."""
        file = self.config.partition(":")[0]
        return f"<!-- made by benchmarks/scaling.py from configs/{file} -->"


TABLES = {
    "paper": Table(
        "hd_finetune.py:size={model},lvtc={preset}",
        ("2b", "8b"),
        ("off", "paper", "fast"),
        ("v5e:16x16", "v5p:4x4x8", "v6e:16x16"),
    ),
    "family": Table(
        "x_full.py:base={model},lvtc={preset}",
        ("internvl3_2b", "internvl3_8b", "internvl3_5_2b", "internvl3_5_8b"),
        ("off", "fast"),
        ("v5e:16x16", "v6e:16x16"),
    ),
}
TILES = 7
CONFIGS = Path(__file__).parents[1] / "configs"
END = "<!-- end -->"
HEAD = (
    "| model | LVTC | topology | data x fsdp x tensor | rows | slots | peak GiB of | "
    "TFLOP per device | collectives GB | compute ms | memory ms | network ms | "
    "roofline MFU | compile s |\n" + "|" + "---|" * 14
)


def row(
    config: str, model: str, preset: str, topology: str, settings: list[str]
) -> tuple[str, dict[str, Any]]:
    """Compiles one case.

    Args:
        config: Config file with its arguments, as in `Table`.
        model: A size or a base.
        preset: Of LVTC.
        topology: Name of the devices, such as `v5e:16x16`.
        settings: Further `field=value` of the config.

    Returns:
        The line of the table, and all numbers.

    Raises:
        ConfigError: The step does not fit the memory of a device.
    """
    name = config.format(model=model, preset=preset)
    target, (report,), mesh = report_config(CONFIGS / name, settings, topology, [TILES])
    check_fits([report], target)
    assert target.memory is not None  # every topology names a chip of known memory
    received = sum(each["bytes"] for each in report.collectives.values())
    slots = f"{report.length}" + (f" ({report.short_length})" if report.short_length else "")
    cells = [
        model.upper() if model in TABLES["paper"].models else model,
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
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--models", nargs="*", help="only these of a table")
    parser.add_argument("--presets", nargs="*", help="only these of a table")
    parser.add_argument("--topologies", nargs="*", help="instead of those of a table")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", dest="settings")
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="replace the tables in this page"
    )
    parser.add_argument("--out", type=Path, help="write all numbers to this file as JSON")
    args = parser.parse_args()
    failed, reports = False, []
    for name in args.tables:
        table = TABLES[name]
        cases = list(
            itertools.product(
                [model for model in table.models if not args.models or model in args.models],
                [each for each in table.presets if not args.presets or each in args.presets],
                args.topologies or table.topologies,
            )
        )
        lines, numbers = compile_table(table, cases, args.settings)
        failed |= len(lines) < len(cases)
        reports += numbers
        if args.write:
            write_table(args.write, table, lines)
    if args.out:
        args.out.write_text(json.dumps(reports, indent=1))
    return 1 if failed else 0


def compile_table(
    table: Table, cases: list[tuple[str, str, str]], settings: list[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Compiles and prints the rows of a table.

    Args:
        table: The table.
        cases: (model, preset, topology) of each row.
        settings: Further `field=value` of the config.

    Returns:
        Lines and numbers of the rows that could be compiled; the others are told on stderr.
    """

    def attempt(case: tuple[str, str, str]) -> tuple[str, dict[str, Any]] | None:
        try:
            line, report = row(table.config, *case, settings)
        except ConfigError as error:
            print(f"{' '.join(case)}: {error}", file=sys.stderr, flush=True)
            return None
        print(line, flush=True)
        return line, report

    print(HEAD)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        made = [each for each in threads.map(attempt, cases) if each is not None]
    return [line for line, _ in made], [report for _, report in made]


def write_table(page: Path, table: Table, lines: list[str]) -> None:
    """Replaces a table in a page.

    Raises:
        SystemExit: The page has no place for it.
    """
    before, found, rest = page.read_text().partition(table.begin)
    if not found:
        sys.exit(f"{page}: no line {table.begin!r}; add it, and {END!r} after the table")
    after = rest.partition(END)[2]
    page.write_text(f"{before}{table.begin}\n{HEAD}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
