"""Measures what PVTC, LVTC and RVTC are worth: the tables of docs/evidence.md.

    python benchmarks/ablation.py pages [--quick] [--device gpu]     # table A, generated forms
    python benchmarks/ablation.py easyvqa                            # table B, a pretrained decoder
    python benchmarks/ablation.py measure                            # table A's times and memory
    python benchmarks/ablation.py report [--check]                   # docs/evidence.md, the picture

A grid runs cell by cell (a variant and a seed), seed by seed, each in a process of its own, and
keeps what is finished as JSON in benchmarks/results; the same command goes on after an interruption
and leaves out what is there. Run folders and data lie in runs/ablation. `--quick` is the five rows
of the core with one seed.

`measure` is for a machine that does nothing else: it times train step and prefill of all variants
in one process, in turn.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# As in the demo: two host devices use two cores, and XLA sizes its thread pool by NPROC.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "NPROC": "16",
}
TABLES = ("pages", "easyvqa")
PLACES = ("images", "llm")  # flags of easyvqa
PRESETS = {"cpu": "cpu", "gpu": "gpu"}  # --device -> preset
RESULTS, RUNS = Path("benchmarks/results"), Path("runs/ablation")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        Exit status: 0 if everything asked for is finished.
    """
    args = _parser().parse_args(argv)
    if args.command != "report":
        args.preset = args.preset or PRESETS[args.device]
        _set_environment(args)
    if args.command == "report":
        from ablation_report import report

        return report(args.results, check=args.check)
    if args.command == "measure":
        from ablation_measure import measure

        measure(args.preset, args.runs, args.results, variants=args.variants, rounds=args.rounds)
        return 0
    return grid(args)


def grid(args: argparse.Namespace) -> int:
    """Runs the cells of a table that are not finished yet."""
    from ablation_tables import open_table

    from internvlx_jax.core.errors import ConfigError

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    places = {name: vars(args)[name] for name in PLACES if args.command == "easyvqa"}
    table = open_table(args.command, args.preset, args.runs, **places)
    seeds = args.seeds or ([0] if args.quick else list(table.seeds))
    variants = args.variants or (table.core if args.quick else table.variants)
    if unknown := set(variants) - set(table.variants):
        raise SystemExit(f"error: unknown variants {sorted(unknown)}; known: {table.variants}")
    cells = [table.cell(variant, seed) for seed in seeds for variant in variants]
    failed = 0
    for number, cell in enumerate(cells, start=1):
        name = f"{cell.group}: {cell.variant}, seed {cell.seed} ({number} of {len(cells)})"
        try:
            if table.finished(cell, args.results):
                print(f"{name}: finished already", flush=True)
                continue
            print(f"{name}: begins", flush=True)
            started = time.perf_counter()
            if args.in_process:
                table.run(cell, args.results)
            else:
                _run_in_process(args, cell.variant, cell.seed)
            print(f"{name}: done after {time.perf_counter() - started:.0f} s", flush=True)
        except (ConfigError, subprocess.CalledProcessError) as error:
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
            failed += 1
    print(f"{len(cells)} cells, {failed} failed", flush=True)
    return 1 if failed else 0


def _run_in_process(args: argparse.Namespace, variant: str, seed: int) -> None:
    """Runs one cell in a process of its own, so that memory and compiled steps go with it."""
    command = [sys.executable, __file__, args.command, "--in_process", "--preset", args.preset]
    command += ["--variants", variant, "--seeds", str(seed)]
    command += ["--runs", str(args.runs), "--results", str(args.results)]
    for name in PLACES if args.command == "easyvqa" else ():
        command += [f"--{name}", str(vars(args)[name])] if vars(args)[name] else []
    subprocess.run(command, check=True)


def _set_environment(args: argparse.Namespace) -> None:
    """Sets what jax reads when it is imported; the user's environment comes first."""
    wanted = {} if args.preset == "gpu" else ENVIRONMENT
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--results", type=Path, default=RESULTS, help="folder of finished cells")
    sized = argparse.ArgumentParser(add_help=False, parents=[common])
    sized.add_argument("--runs", type=Path, default=RUNS, help="folder of data and run folders")
    sized.add_argument("--device", choices=PRESETS, default="cpu", help="chooses the preset")
    sized.add_argument("--preset", help="a size of the config, in place of the device's")
    for name in TABLES:
        one = commands.add_parser(name, parents=[sized], help=f"runs the table {name}")
        one.add_argument("--quick", action="store_true", help="the core rows with one seed")
        one.add_argument("--variants", type=lambda text: text.split(","), help="some rows, a,b,c")
        one.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")])
        one.add_argument("--in_process", action="store_true", help="all cells in this process")
        if name == "easyvqa":
            one.add_argument("--images", type=Path, help="easy-VQA's folder `data`")
            one.add_argument("--llm", type=Path, help="folder or GGUF file of the decoder")
    one = commands.add_parser("measure", parents=[sized], help="times and memory of table A")
    one.add_argument("--variants", type=lambda text: text.split(","), help="some rows, a,b,c")
    one.add_argument("--rounds", type=int, default=5, help="0 measures memory only")
    one = commands.add_parser("report", parents=[common], help="writes tables and picture")
    one.add_argument("--check", action="store_true", help="writes nothing; 1 if anything differs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
