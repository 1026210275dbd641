"""Measures this package against PyTorch and transformers: same shapes, same machine, one run.

    python benchmarks/peers.py [--parts tower prefill ...] [--write docs/performance.md]
    python benchmarks/peers.py --parts train --keep     # the table in several runs
    python benchmarks/peers.py --quick       # a rehearsal at toy size, in a minute

Needs torch and transformers beside JAX. The peer is transformers' InternVL with the two-layer
projector (`mlp1`) and a Llama decoder, which equal this package's model in shape; weights are
random. The two sides of a row run in turns (A B A B) after one call each that warms up, and the
medians count. On a CPU each row also has the processor time of both sides, which other programs of
the machine hardly change.

* tower, prefill: forward passes; prefill keeps keys and values and computes the last logits.
* train: loss and gradients of all parameters, without the optimizer; PyTorch computes bfloat16
  under autocast, with parameters in float32 on both sides.
* decode: one greedy token per row behind a prompt; "weights" compares a step at batch 1 with
  reading its weights once.
* images: a JPEG to uint8 tiles, against a plain loop over Pillow's resize and crop.
* answers: 48 questions with an image each, from JPEG to text, in batches of 8.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from peers_rows import PARTS, SIZES, Row, rows_of

from internvlx_jax.core.files import write_json

MARKS = ("<!-- peers: begin -->", "<!-- peers: end -->")


@dataclasses.dataclass(frozen=True)
class Result:
    """Holds the measurement of one row.

    Attributes:
        part, name, dtype: Of the row.
        target: The largest ratio that it should have; None without one.
        ours, theirs: Median seconds per call.
        ours_cpu, theirs_cpu: Median processor seconds per call, of all threads.
    """

    part: str
    name: str
    dtype: str
    target: float | None
    ours: float
    theirs: float
    ours_cpu: float
    theirs_cpu: float

    @property
    def ratio(self) -> float:
        """Our time over theirs."""
        return self.ours / self.theirs

    @property
    def cpu_ratio(self) -> float:
        """Our processor time over theirs."""
        return self.ours_cpu / self.theirs_cpu


def measure(row: Row, rounds: int) -> Result:
    """Runs both sides in turns."""
    sides = (row.ours, row.theirs)
    taken: list[list[tuple[float, float]]] = [[], []]
    for side in sides:
        side()
    for _ in range(rounds):
        for side, times in zip(sides, taken, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
    (ours, ours_cpu), (theirs, theirs_cpu) = (
        np.median(times, axis=0) / row.calls for times in taken
    )
    return Result(
        row.part, row.name, row.dtype, row.target, *map(float, (ours, theirs, ours_cpu, theirs_cpu))
    )


def table(results: list[Result]) -> str:
    """Returns the results as a Markdown table."""
    lines = [
        "| part | shape | dtype | ours, ms | PyTorch, ms | ratio | of processor time | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        target = "" if each.target is None else f"{each.target:.1f}"
        lines.append(
            f"| {each.part} | {each.name} | {each.dtype} | {1e3 * each.ours:.4g} | "
            f"{1e3 * each.theirs:.4g} | {each.ratio:.2f} | {each.cpu_ratio:.2f} | {target} |"
        )
    return "\n".join(lines)


def facts() -> dict[str, Any]:
    """Returns versions and devices."""
    return {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "flags": _cpu_flags(),
    }


def _cpu_flags() -> list[str]:
    """Returns what this processor has for 16-bit products, as Linux tells."""
    path = Path("/proc/cpuinfo")
    words = path.read_text().split() if path.exists() else []
    return sorted({word for word in words if "bf16" in word or word.startswith("amx")})


def write_table(path: Path, text: str) -> None:
    """Puts the table between its marks in a page.

    Raises:
        SystemExit: The page has no such marks.
    """
    begin, end = MARKS
    page = path.read_text()
    if begin not in page or end not in page:
        raise SystemExit(f"{path} has no lines {begin} and {end} to write between")
    head, tail = page.split(begin)[0], page.split(end)[1]
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def results_of(
    parts: list[str], dtypes: list[str], quick: bool, deadline: float
) -> Iterator[Result | str]:
    """Yields a result per row, or the name of a row for which no time is left."""
    size = SIZES["quick" if quick else "full"]
    for dtype in dtypes:
        for part in parts:
            for make in rows_of(part, dtype, size):
                if time.time() > deadline:
                    yield f"{part}, {dtype}"
                    continue
                yield measure(make(), size.rounds)
                gc.collect()


def earlier(path: Path) -> list[Result]:
    """Returns the rows of a peers.json, none where there is no such file."""
    if not path.exists():
        return []
    fields = [field.name for field in dataclasses.fields(Result)]
    rows = json.loads(path.read_text())["rows"]
    return [Result(**{name: row[name] for name in fields}) for row in rows]


def merged(old: list[Result], new: list[Result]) -> list[Result]:
    """Returns new rows, and old ones that are not measured again, by dtype and part."""
    rows = {(row.dtype, row.part, row.name): row for row in [*old, *new]}
    order = ("bfloat16", "uint8", "float32")
    return sorted(rows.values(), key=lambda row: (order.index(row.dtype), PARTS.index(row.part)))


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., Any] = made.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    add("--quick", action="store_true", help="toy shapes and one round, for a rehearsal")
    add("--out", type=Path, default=Path("runs/peers"), help="folder of peers.json")
    add("--keep", action="store_true", help="rows in that file that this run does not measure stay")
    add("--write", type=Path, metavar="PAGE", help="page that gets the table, between its marks")
    add("--budget_seconds", type=float, default=1200, help="no row is begun after so long")
    return made


def main() -> int:
    """Runs the command and returns its exit status, 1 if rows were skipped."""
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    old = earlier(args.out / "peers.json") if args.keep else []
    results: list[Result] = []
    skipped: list[str] = []
    deadline = time.time() + args.budget_seconds
    for result in results_of(args.parts, args.dtypes, args.quick, deadline):
        if isinstance(result, str):
            skipped.append(result)
            print(f"skipped, no time is left: {result}", flush=True)
            continue
        results.append(result)
        print(table([result]).splitlines()[-1], flush=True)
        rows = merged(old, results)
        kept = [{**dataclasses.asdict(each), "ratio": each.ratio} for each in rows]
        write_json(args.out / "peers.json", {"facts": facts(), "skipped": skipped, "rows": kept})
    print(table(merged(old, results)))
    if args.write is not None:
        write_table(args.write, table(merged(old, results)))
    return int(bool(skipped))


if __name__ == "__main__":
    sys.exit(main())
