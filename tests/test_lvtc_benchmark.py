"""Rehearses the measurement of LVTC at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_every_variant_is_compared_in_both_steps(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "lvtc.py", "--sizes", "toy", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "lvtc.json").read_text())["results"]
    variants = ["all-1024", "all-256", "paper", "fast"]
    assert [(row["step"], row["variant"]) for row in rows] == [
        (step, variant) for step in ("prefill", "train step") for variant in variants
    ]
    for step in (rows[:4], rows[4:]):
        first, *others = step
        assert first["ratio"] == first["rest_ratio"] == first["predicted_ratio"] == 1
        assert all(row["predicted_rest_ratio"] < row["predicted_ratio"] for row in others)
    assert all(row["seconds"] > 0 and row["peak_gib"] > 0 for row in rows)
    assert all((row["attention_s"] or 0) > 0 for row in rows[:4])
    assert (tmp_path / "lvtc.png").stat().st_size > 0
