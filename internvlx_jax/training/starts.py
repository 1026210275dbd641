"""What each start of a run ran on and with: RUN/starts.jsonl, a line a start (design: training.md 10)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from internvlx_jax.core.files import read_json_lines
from internvlx_jax.data.plan import Bucket

FILE = "starts.jsonl"  # in the run folder
LIBRARIES = (
    "internvlx-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
)


def record_start(run: Path, step: int, mesh: Mesh, buckets: Mapping[Bucket, int]) -> None:
    """step: how many are done; buckets: the rows of each."""
    start = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "mesh": dict(mesh.shape),
        "buckets": [
            {**dataclasses.asdict(bucket), "rows": rows} for bucket, rows in buckets.items()
        ],
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "git": _git_state(),
    }
    with (run / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def read_starts(run: Path) -> list[dict[str, Any]]:
    """In order; none of a run without the file."""
    return read_json_lines(run / FILE, "step", "time")


def _git_state() -> str | None:
    """Commit of the checkout that this package is in, with "-dirty" where it is changed; None outside a checkout."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
