"""The measurement for a GPU runs at toy size, so that the first GPU finds a script that works."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu

PARTS = ["ceilings", "attention", "train", "decode", "lora"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_benchmark")
    assert gpu.main(["--size", "toy", "--in_process", "--out", str(folder), "--parts", *PARTS]) == 0
    return json.loads((folder / "gpu.json").read_text())


def test_every_part_is_measured(report):
    assert {row["part"] for row in report["rows"]} == set(PARTS)
    assert report["skipped"] == 0 and report["facts"]["jax"]
    for row in report["rows"]:
        assert row.get("ms", 1) > 0 and row.get("within_tolerance", True)


def test_a_frame_of_lvtc_has_its_slots(report):
    slots = {
        row["name"].split(",")[1]: (row["slots"], row["short_slots"])
        for row in report["rows"]
        if row["part"] == "train"
    }
    assert slots == {" LVTC fast": (40, 34), " LVTC off": (40, 0), " LVTC paper": (64, 40)}


def test_rows_beyond_the_time_are_counted(tmp_path):
    report = gpu.Report(tmp_path / "gpu.json", time.time() + 1, {})
    report.attempt("train", "late", 40, lambda: pytest.fail("was begun"))
    report.attempt("train", "broken", 0, lambda: 1 / 0)
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["skipped"] == 1 and "may need 40" in saved["rows"][0]["skipped"]
    assert saved["rows"][1]["error"].startswith("ZeroDivisionError")


def test_pytorch_has_a_process_of_its_own():
    assert gpu.groups(gpu.PARTS) == [
        ["ceilings", "attention", "train"],
        ["torch"],
        ["decode"],
        ["lora"],
    ]
    assert gpu.groups(["decode", "ceilings"]) == [["ceilings", "decode"]]


def test_the_step_in_pytorch(tmp_path):
    if (
        importlib.util.find_spec("torch") is None
        or importlib.util.find_spec("transformers") is None
    ):
        if os.environ.get("REQUIRE_TORCH"):
            pytest.fail("torch and transformers are not installed")
        pytest.skip("torch and transformers are not installed")
    assert gpu.main(["--size", "toy", "--out", str(tmp_path), "--parts", "torch"]) == 0
