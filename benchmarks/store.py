"""Measures what a run costs in an object store, and computes what it costs with many hosts.

    python benchmarks/store.py [--hosts 256] [--billions 2.15]

Trains a tiny model in two processes with four devices each, twice, with everything behind gs:// on
a server of this machine (tests/gcs_server.py), and prints the tables of docs/tpu.md: requests and
bytes of process 0 and of another one, as the run's report has them, and those of all hosts.

Requests are measured. Of the bytes, those of a checkpoint are computed for a model of --billions
parameters with two moments, all float32, which the hosts share; a host reads at a restart what it
wrote. Images come on top: a request and its bytes for each that is not in the host's cache.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")]

from kill_run import finish, start, tiny_config, write_config  # noqa: E402
from object_stores import running_gcs  # noqa: E402

STEPS, SAVE_EVERY = 24, 8
BYTES = 12  # of a parameter, its two moments included
TARGET = 400 * 2**20  # bytes of a data file, as orbax writes it to gs://
UNITS = {"step": "step", "checkpoint": "checkpoint", "start": "restart"}


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Runs two starts of a run, and returns the costs that its report shows."""
    from internvlx_jax.core.files import read_json_lines
    from internvlx_jax.core.paths import as_path
    from internvlx_jax.training.report import read_metrics
    from internvlx_jax.training.store_costs import costs

    config = tiny_config(folder, STEPS, SAVE_EVERY)
    config = dataclasses.replace(config, output_dir="gs://bucket/run")
    file = write_config(config, folder)
    for flags in (("--stop_after", str(STEPS // 2)), ()):
        codes, outputs = finish(start(file, 4, *flags))
        if any(codes):
            raise RuntimeError("\n".join(outputs))
    run = as_path(config.output_dir)
    starts = read_json_lines(run / "starts.jsonl", "step", "time")
    return costs(read_metrics(run / "metrics.jsonl"), starts[1:], SAVE_EVERY)


def measured_table(found: dict[str, dict[str, float]]) -> str:
    """Returns what two processes have cost."""
    lines = [
        "| two processes, tiny model | requests of process 0 | of the other | kB read | written |",
        "|---|---|---|---|---|",
    ]
    for name, unit in UNITS.items():
        both = found[name], found[name + "_others"]
        read, written = (
            sum(each[f"store_{what}_bytes"] for each in both) / 1e3 for what in ("received", "sent")
        )
        requests = " | ".join(f"{each['store_requests']:.1f}" for each in both)
        lines.append(f"| a {unit} | {requests} | {read:.0f} | {written:.0f} |")
    return "\n".join(lines)


def computed_table(found: dict[str, dict[str, float]], hosts: int, billions: float) -> str:
    """Returns what the hosts cost together."""
    state = billions * 1e9 * BYTES
    files = hosts * max(round(state / hosts / TARGET), 1)
    lines = [
        f"| {hosts} hosts, {billions} B parameters | requests | GB read | GB written |",
        "|---|---|---|---|",
    ]
    for name, unit in UNITS.items():
        first, other = (found[name + end]["store_requests"] for end in ("", "_others"))
        more = files - hosts if name != "step" else 0  # the tiny model has one file a host
        requests = first + (hosts - 1) * other + more
        read = state / 1e9 if name == "start" else 0
        written = state / 1e9 if name == "checkpoint" else 0
        lines.append(f"| a {unit} | {requests:,.0f} | {read:,.1f} | {written:,.1f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=256)
    parser.add_argument("--billions", type=float, default=2.15)
    args = parser.parse_args()
    with running_gcs() as server, tempfile.TemporaryDirectory() as folder:
        os.environ.update(server.environment)
        found = measure(Path(folder))
        served = server.faults()["requests"]
    print(json.dumps({"served": served, **found}, indent=2))
    print(measured_table(found))
    print()
    print(computed_table(found, args.hosts, args.billions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
