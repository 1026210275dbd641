"""Rehearses the measurement for a GPU at toy size, so that the first GPU finds a working script."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PARTS = ["ceilings", "attention", "train", "decode", "lora"]


def run(folder, *flags, status=0, path=()):
    """Runs the benchmark at toy size.

    Returns:
        What it wrote to gpu.json, and what it printed.
    """
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--size", "toy", "--out", folder]
    paths = os.pathsep.join(map(str, (*path, ROOT)))
    done = subprocess.run(
        [*command, *flags],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads((folder / "gpu.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_benchmark")
    return run(folder, "--in_process", "--parts", *PARTS)[0]


def test_every_part_is_measured(report):
    assert {row["part"] for row in report["rows"]} == set(PARTS)
    assert report["skipped"] == 0 and report["facts"]["jax"]
    for row in report["rows"]:
        assert row.get("ms", 1) > 0 and row.get("within_tolerance", True)


def test_a_step_may_be_computed_in_parts(report):
    """They divide the activations of the 8B's step, which a card with 80 GB cannot keep whole."""
    whole, parts = (row for row in report["rows"] if row["part"] == "lora")
    assert parts["name"] == f"{whole['name']}, 2 parts"
    assert (parts["tflop"], parts["slots"]) == (whole["tflop"], whole["slots"])


def test_a_layout_of_lvtc_has_its_slots(report):
    slots = {
        row["name"]: (row["slots"], row["short_slots"])
        for row in report["rows"]
        if row["part"] == "train"
    }
    assert slots == {"2B, LVTC off, remat full": (40, 0), "2B, LVTC fast, remat full": (40, 34)}
    shapes = [row["shape"] for row in report["rows"] if row["part"] == "attention"]
    # Off, the short layout of fast, the long one of paper, and the tower.
    assert [int(shape.split(", ")[1]) for shape in shapes] == [40, 34, 64, 17]


def test_memory_rises_from_row_to_row(report):
    """Only then can the peak of each row be read: a device tells the peak of its whole process."""
    predicted = [row["predicted_gib"] for row in report["rows"] if row["part"] == "train"]
    assert predicted == sorted(predicted)


def test_a_step_that_is_larger_than_the_card_is_skipped(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    steps = importlib.import_module("gpu_steps")
    monkeypatch.setattr(steps, "device_memory", lambda device: 2**10)
    compiled = Future()
    compiled.set_result((jax.jit(lambda x: x + 1).lower(jnp.ones(2**20)).compile(), 0.0))
    assert steps._measure(None, None, None, compiled) == {"skipped": "it needs 0.0 GiB of 0.0"}


def test_rows_that_are_late_or_broken_are_counted(tmp_path):
    """Neither stops the rows after it."""
    (tmp_path / "torch.py").write_text("1 / 0")
    flags = ("--budget_seconds", "0", "--in_process", "--parts", "torch", "ceilings")
    saved, shown = run(tmp_path, *flags, status=1, path=[tmp_path])
    copy, product, torch = saved["rows"]
    assert saved["skipped"] == 2 and "may need 1" in copy["skipped"] and product["skipped"]
    assert torch["error"].startswith("ZeroDivisionError")
    assert "3 rows, 2 skipped, 1 failed" in shown


def test_pytorch_and_the_8b_model_have_processes_of_their_own(tmp_path):
    saved, shown = run(tmp_path, "--budget_seconds", "0")
    processes = [line for line in shown.splitlines() if line.startswith("process: ")]
    assert processes == [
        "process: ceilings attention train",
        "process: torch",
        "process: decode",
        "process: lora",
    ]
    # No time was left for any of them, which is recorded too.
    assert saved["skipped"] == 6 and {"cut off at the deadline"} == {
        row["skipped"] for row in saved["rows"]
    }


def test_the_step_in_pytorch(tmp_path):
    installed = map(importlib.util.find_spec, ("torch", "transformers"))
    if None in installed:
        if os.environ.get("REQUIRE_TORCH"):
            pytest.fail("torch and transformers are not installed")
        pytest.skip("torch and transformers are not installed")
    saved, _ = run(tmp_path, "--parts", "torch")
    assert all(row["ms"] > 0 for row in saved["rows"])
