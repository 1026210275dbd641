"""Rehearses the comparison with PyTorch at toy size; it needs torch and transformers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGE = "before\n<!-- peers: begin -->\nan old table\n<!-- peers: end -->\nafter\n"


def run(folder, *flags):
    command = [sys.executable, ROOT / "benchmarks" / "peers.py", "--quick", "--out", folder, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def needs_torch():
    if None in map(importlib.util.find_spec, ("torch", "transformers")):
        if os.environ.get("REQUIRE_TORCH"):
            pytest.fail("torch and transformers are not installed")
        pytest.skip("torch and transformers are not installed")


def test_every_part_in_both_types(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    done = run(tmp_path, "--write", page)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)
    of_type = {
        dtype: [row["part"] for row in rows if row["dtype"] == dtype]
        for dtype in ("bfloat16", "float32", "uint8")
    }
    both = ["tower", "prefill", "decode", "weights", "train", "train", "answers"]
    assert of_type == {"bfloat16": both, "float32": both, "uint8": ["images"]}
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + len(rows)
    again = run(tmp_path, "--parts", "images", "--keep")
    assert again.returncode == 0, again.stdout + again.stderr
    kept = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert [row for row in kept if row["part"] != "images"] == [
        row for row in rows if row["part"] != "images"
    ]


def test_rows_for_which_no_time_is_left_are_named(tmp_path):
    done = run(tmp_path, "--parts", "images", "--budget_seconds", "0")
    assert done.returncode == 1 and "skipped, no time is left: images, bfloat16" in done.stdout
