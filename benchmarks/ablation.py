"""Measures what PVTC, LVTC and RVTC are worth: the tables of docs/evidence.md.

    python benchmarks/ablation.py pages [--quick] [--device gpu]     # table A, generated forms
    python benchmarks/ablation.py easyvqa                            # table B, a pretrained decoder
    python benchmarks/ablation.py measure pages|easyvqa              # times and memory of a table
    python benchmarks/ablation.py report [--check]                   # docs/evidence.md, the picture

A grid first makes what its cells share, data and what they begin with. Then it runs the cells (a
variant and a seed), seed by seed, each in a process of its own, and keeps what is finished as JSON
in benchmarks/results; the same command goes on after an interruption and leaves out what is there.
On a CPU as many cells run side by side as it has cores, one core each, which these small models use
far better than several. Run folders, logs and data lie in runs/ablation. `--quick` is the five rows
of the core with one seed.

`measure` is for a machine that does nothing else: it times train step and prefill of all variants
in one process, in turn.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# As in the demo: two host devices use two cores, and XLA sizes its thread pool by NPROC. Cells have
# one device.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "NPROC": "16",
}
# By itself glibc returns the temporaries of a step to the system and gets them anew in the next
# one: a quarter of the time of a cell. It reads these when a process begins.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
TABLES = ("pages", "easyvqa")
PLACES = ("images", "llm")  # flags for easyvqa
PRESETS = {"cpu": "cpu", "gpu": "gpu"}  # --device -> preset
RESULTS, RUNS = Path("benchmarks/results"), Path("runs/ablation")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        Exit status: 0 if everything asked for is finished.
    """
    args = _parser().parse_args(argv)
    if args.command == "report":
        from ablation_report import report

        return report(args.results, check=args.check)
    args.preset = args.preset or PRESETS[args.device]
    if args.command == "measure":
        _set_environment(args.preset)  # jax reads it when it is imported
        from ablation_measure import measure

        table = _table(args)
        _check_variants(table, args.variants or ())
        measure(table, args.results, variants=args.variants, rounds=args.rounds)
        return 0
    if args.only:
        return run_part(args)
    return grid(args)


def grid(args: argparse.Namespace) -> int:
    """Runs the cells of a table that are not finished yet."""
    from internvlx_jax.core.errors import ConfigError

    table = _table(args)
    seeds = args.seeds or ([0] if args.quick else list(table.seeds))
    variants = args.variants or (table.core if args.quick else table.variants)
    _check_variants(table, variants)
    cells = [table.cell(variant, seed) for seed in seeds for variant in variants]
    left, failed = [], 0
    for cell in cells:
        try:
            if table.finished(cell, args.results):
                print(f"{cell}: finished already", flush=True)
            else:
                left.append(cell)
        except ConfigError as error:
            print(f"{cell}: error: {error}", file=sys.stderr, flush=True)
            failed += 1
    if left:
        failed += _run_cells(args, left)
    print(f"{len(cells)} cells, {failed} failed", flush=True)
    return 1 if failed else 0


def _run_cells(args: argparse.Namespace, cells: Sequence[Any]) -> int:
    """Runs cells side by side, each in a process of its own, and returns how many failed."""
    if not _run_in_process(args, "shared", cells):
        return len(cells)
    jobs = args.jobs or (1 if args.preset == "gpu" else len(_cores()))
    free: queue.Queue[list[int]] = queue.Queue()
    for number in range(jobs):
        free.put(_cores()[number::jobs])

    def run(cell: Any) -> bool:
        cores = free.get()
        try:
            return _run_in_process(args, "cells", [cell], cores)
        finally:
            free.put(cores)

    with ThreadPoolExecutor(jobs) as pool:
        return sum(not done for done in pool.map(run, cells))


def _run_in_process(
    args: argparse.Namespace, part: str, cells: Sequence[Any], cores: Sequence[int] = ()
) -> bool:
    """Runs a part of a grid; memory and compiled steps go with its process.

    Args:
        args: Of the grid.
        part: `cells`, or what they have `shared`.
        cells: All variants of some seeds.
        cores: Those that the process may use; none is all.

    Returns:
        Whether it succeeded.
    """
    variants = dict.fromkeys(cell.variant for cell in cells)
    seeds = dict.fromkeys(str(cell.seed) for cell in cells)
    command = [sys.executable, __file__, args.command, "--only", part, "--preset", args.preset]
    command += ["--variants", ",".join(variants), "--seeds", ",".join(seeds)]
    command += ["--runs", str(args.runs), "--results", str(args.results)]
    for name in PLACES if args.table == "easyvqa" else ():
        command += [f"--{name}", str(vars(args)[name])] if vars(args)[name] else []
    if cores:
        command += ["--cores", ",".join(map(str, cores))]
    group = cells[0].group
    name = str(cells[0]) if part == "cells" else f"{group}: what cells begin with"
    file = f"{cells[0].variant}-s{cells[0].seed}.log" if part == "cells" else "shared.log"
    log = args.runs / group / file
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name}: begins, see {log}", flush=True)
    started = time.perf_counter()
    with log.open("ab") as output:
        environment = os.environ if args.preset == "gpu" else ALLOCATOR | os.environ
        done = subprocess.run(command, stdout=output, stderr=output, env=environment)
    how = f"failed (exit status {done.returncode})" if done.returncode else "done"
    print(f"{name}: {how} after {time.perf_counter() - started:.0f} s", flush=True)
    return done.returncode == 0


def run_part(args: argparse.Namespace) -> int:
    """Runs cells, or makes what they share, in this process."""
    if args.preset != "gpu" and args.cores:
        os.environ.setdefault("XLA_FLAGS", "")  # one device
        os.environ.setdefault("NPROC", str(len(args.cores)))
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, args.cores)
    _set_environment(args.preset)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    table = _table(args)
    for cell in [table.cell(variant, seed) for seed in args.seeds for variant in args.variants]:
        if args.only == "shared":
            table.begin(cell)
        else:
            table.run(cell, args.results)
    return 0


def _table(args: argparse.Namespace) -> Any:
    from ablation_tables import open_table

    places = {name: vars(args)[name] for name in PLACES if args.table == "easyvqa"}
    return open_table(args.table, args.preset, args.runs, **places)


def _check_variants(table: Any, variants: Sequence[str]) -> None:
    if unknown := set(variants) - set(table.variants):
        raise SystemExit(f"error: unknown variants {sorted(unknown)}; known: {table.variants}")


def _set_environment(preset: str) -> None:
    """Sets what jax reads when it is imported; the user's environment comes first."""
    for name, value in ENVIRONMENT.items() if preset != "gpu" else ():
        os.environ.setdefault(name, value)


def _cores() -> list[int]:
    """Returns the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


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
    sized.add_argument("--variants", type=lambda text: text.split(","), help="some rows, a,b,c")
    placed = argparse.ArgumentParser(add_help=False)
    placed.add_argument("--images", type=Path, help="easy-VQA's folder `data`, for easyvqa")
    placed.add_argument("--llm", type=Path, help="folder or GGUF file of easyvqa's decoder")
    for name in TABLES:
        parents = [sized, placed] if name == "easyvqa" else [sized]
        one = commands.add_parser(name, parents=parents, help=f"runs the table {name}")
        one.set_defaults(table=name)
        one.add_argument("--quick", action="store_true", help="the core rows with one seed")
        one.add_argument("--seeds", type=_numbers, help="some seeds, 0,1")
        one.add_argument("--jobs", type=int, help="cells side by side; one for each CPU core")
        one.add_argument("--only", choices=("shared", "cells"), help=argparse.SUPPRESS)
        one.add_argument("--cores", type=_numbers, help=argparse.SUPPRESS)
    one = commands.add_parser("measure", parents=[sized, placed], help="times and memory of rows")
    one.add_argument("table", choices=TABLES)
    one.add_argument("--rounds", type=int, default=5, help="0 is memory only; times stay")
    one = commands.add_parser("report", parents=[common], help="writes tables and picture")
    one.add_argument("--check", action="store_true", help="writes nothing; 1 if anything differs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
