"""Measures one NVIDIA GPU: attention, train steps against PyTorch, generation, and memory.

    python benchmarks/gpu.py [--parts ceilings attention train torch decode lora]
    python benchmarks/gpu.py --size toy      # a rehearsal on a CPU, in less than a minute

* ceilings: a large copy and a large bfloat16 product, the most that this card gives.
* attention: every backend against the plain formula in float32, forward and backward, in the
  layouts of packed rows.
* train: 2B, projector and decoder trained, tower frozen. A row packs three samples with seven
  tiles and 2,304 text tokens (4,096 slots without LVTC); LVTC is off, fast and paper.
* torch: the same step of transformers' InternVL of equal shape. It needs torch and transformers.
* decode: prefill of seven tiles and 256 text tokens and greedy decoding, at batch 1, 8 and 32.
* lora: 8B with adapters on the decoder.

Weights are random and made on the device. Each row is printed and written to gpu.json as soon as it
is measured. MFU counts the FLOPs of the samples, attention within each of them, without
recomputation, against the peak of the datasheet.

The guard of --budget_seconds checks before each row whether the time left covers what such a row
may take, compilation included; if not, the row is recorded as skipped. A row that has begun and is
slower than that overruns the budget, until its process is ended 5 seconds after the deadline; what
was left is then recorded as skipped, too. A measurement in this process alone (one group of parts,
or --in_process) is not ended. PyTorch and the 8B model have processes of their own, because no
process gives device memory back.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import flax
import jax
from gpu_decode import decode
from gpu_kernels import attention, ceilings
from gpu_shared import PARTS, SIZES, Report, Size, failed
from gpu_steps import lora, train

ALONE = ("torch", "lora")  # parts that need the memory of the whole card
GRACE = 5  # seconds after the deadline until a process is ended


def torch_part(report: Report, size: Size) -> None:
    """Measures PyTorch's step, where torch and transformers are installed."""
    try:
        import gpu_torch  # only here: the other parts need neither torch nor transformers
    except ImportError as error:
        report.add("torch", "2B", {"skipped": f"{error.name} is not installed"})
        return
    gpu_torch.train_steps(report, size)


RUN = {
    "ceilings": ceilings,
    "attention": attention,
    "train": train,
    "torch": torch_part,
    "decode": decode,
    "lora": lora,
}


def groups(parts: Sequence[str]) -> list[list[str]]:
    """Divides parts into processes: PyTorch and JAX each keep the memory they have taken."""
    divided: list[list[str]] = []
    for part in (part for part in PARTS if part in parts):
        if not divided or part in ALONE or divided[-1][-1] in ALONE:
            divided.append([])
        divided[-1].append(part)
    return divided


def run_here(report: Report, size: Size, parts: Sequence[str]) -> None:
    """Measures parts in this process."""
    for part in (part for part in PARTS if part in parts):
        try:
            RUN[part](report, size)
        except Exception as error:  # in what a part prepares for all its rows
            report.add(part, "all", failed(error))


def run_in_process(args: argparse.Namespace, path: Path, deadline: float, parts: list[str]) -> None:
    """Measures parts in a process of their own, which is ended soon after the deadline."""
    print(f"process: {' '.join(parts)}", flush=True)
    command = [sys.executable, __file__, "--size", args.size, "--out", str(args.out)]
    command += ["--deadline", str(deadline), "--parts", *parts]
    left = deadline - time.time()
    try:
        if left <= 0:
            raise subprocess.TimeoutExpired(command, 0)
        subprocess.run(command, timeout=left + GRACE)
    except subprocess.TimeoutExpired:
        report = Report(path, deadline, {})
        # A part is over when the next one has rows.
        begun = [part for part in parts if any(row["part"] == part for row in report.rows)]
        for part in parts[parts.index(begun[-1]) if begun else 0 :]:
            report.add(part, "rest", {"skipped": "cut off at the deadline"})


def summary(report: Report) -> str:
    """Returns a table of the targets and what was measured.

    The speed is compared with PyTorch's at equal recomputation: both keep the inputs of layers only
    (remat full, gradient checkpointing), LVTC is off, and PyTorch's faster variant counts. MFU is
    the best of the remat policies.
    """

    def best(part: str, key: str, name: str = "") -> float | None:
        values = [
            row[key]
            for row in report.rows
            if row["part"] == part and name in row["name"] and row.get(key) is not None
        ]
        return max(values, default=None)

    ours, theirs = (
        best("train", "rows_per_s", "LVTC off, remat full"),
        best("torch", "rows_per_s", "packed"),
    )
    ratios = [
        row["measured_over_predicted"] for row in report.rows if row.get("measured_over_predicted")
    ]
    off = max((abs(ratio - 1) for ratio in ratios), default=None)
    decoding = best("decode", "share_of_bandwidth", "batch 1")
    targets = (
        ("MFU, 2B", best("train", "mfu", "LVTC off"), ">=", 0.45),
        ("MFU, 8B LoRA", best("lora", "mfu"), ">=", 0.50),
        (
            "speed over PyTorch, both remat full",
            ours / theirs if ours and theirs else None,
            ">=",
            1.3,
        ),
        ("decoding at batch 1, share of bandwidth", decoding, ">=", 0.60),
        ("memory off its prediction", off, "<=", 0.10),
    )
    lines = ["| target | measured | |", "|---|---|---|"]
    for name, value, sign, bound in targets:
        met = value is not None and (value >= bound if sign == ">=" else value <= bound)
        shown = "-" if value is None else f"{value:.3f}"
        lines.append(f"| {name} {sign} {bound:.2f} | {shown} | {'met' if met else 'not met'} |")
    skipped, errors = (sum(key in row for row in report.rows) for key in ("skipped", "error"))
    return "\n".join([*lines, f"{len(report.rows)} rows, {skipped} skipped, {errors} failed"])


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--size", choices=list(SIZES), default="full")
    made.add_argument("--out", type=Path, default=Path("runs/gpu_benchmark"))
    made.add_argument("--budget_seconds", type=float, default=460)
    # Given by the process that starts this one.
    made.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    made.add_argument(
        "--in_process",
        action="store_true",
        help="measure all parts in this process, with the memory that is left",
    )
    return made


def main() -> int:
    """Runs the command.

    Returns:
        Exit status, 1 if a row failed.
    """
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path, deadline = args.out / "gpu.json", args.deadline or time.time() + args.budget_seconds
    if args.deadline is None:
        path.unlink(missing_ok=True)
    divided = groups(args.parts)
    if len(divided) > 1 and not args.in_process:
        for parts in divided:
            run_in_process(args, path, deadline, parts)
        report = Report(path, deadline, {})
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
        facts = {"jax": jax.__version__, "flax": flax.__version__}
        if list(args.parts) != ["torch"]:  # PyTorch needs the device for itself
            facts |= {"device": jax.devices()[0].device_kind, "size": args.size}
        report = Report(path, deadline, facts)
        run_here(report, SIZES[args.size], args.parts)
    if args.deadline is None:
        print(summary(report))
    return int(any("error" in row for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
