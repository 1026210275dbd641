"""What each start of a run ran on and with: RUN/starts.jsonl, a line a start (spec: training.md 10)."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

FILE = "starts.jsonl"  # in the run folder
LIBRARIES = ("internvlx-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def record_start(run: Path, step: int, mesh: Mesh) -> None:
    """step: how many are done."""
    start = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "mesh": dict(mesh.shape),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "git": _git_state(),
    }
    with (run / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def read_starts(run: Path) -> list[dict[str, Any]]:
    """In order; none of a run without the file."""
    path = run / FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _git_state() -> str | None:
    """Commit of the checkout that this package is in, with "-dirty" where it is changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
