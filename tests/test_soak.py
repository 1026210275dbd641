"""The short form of benchmarks/soak.py, a test that is too long for the suite (training.md 10)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(minutes=2)

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"
CHECKS = {"bits", "tracebacks", "messages", "left over", "orphans", "surprises", "memory"}


def test_a_killed_run_passes_every_check(tmp_path):
    folder = tmp_path / "soak"
    command = [sys.executable, SOAK, "--folder", folder, "--minutes", "0.3", "--only", "kill"]
    command += ["--save_every", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["passed"] and report["checks"].keys() == CHECKS
    assert report["starts"] >= 2 and report["steps"] > 0
    assert any(name.startswith("kill ") for name in report["met"])
    assert (folder / "report.txt").read_text().startswith("soak: passed, seed 0")


def test_kinds_are_checked(tmp_path):
    command = [sys.executable, SOAK, "--folder", tmp_path / "soak", "--only", "kil"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "choose from kill, " in done.stderr
