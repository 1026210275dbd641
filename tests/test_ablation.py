"""Rehearses both tables of the ablation at toy size, and checks the page against its cells."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from internvlx_jax.checkpoints.hf_config_write import chat_config
from internvlx_jax.checkpoints.name_table import name_table
from internvlx_jax.checkpoints.torch_checkpoint import expected_tensors
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.overrides import load_config_file
from internvlx_jax.data.synthetic_forms import FORM_KINDS, make_form
from internvlx_jax.models.params import abstract_model

ROOT = Path(__file__).parents[1]
BLOCKS = ("state", "main", "kinds", "pairs", "picture", "repeated")
TOKENIZER = ROOT / "internvlx_jax/data/assets/synthetic_tokenizer"


BENCHMARKS = ROOT / "benchmarks"
# As the suite compiles (conftest.py), on two devices as the runs that cells share.
FLAGS = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"


def ablation(*words, status=0, flags=FLAGS):
    """Runs the program and returns what it printed."""
    command = [sys.executable, str(BENCHMARKS / "ablation.py"), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def report(monkeypatch, capsys):
    """Runs `ablation.py report` in this process; it computes nothing on a device."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    main = importlib.import_module("ablation").main

    def run(*words, cwd=ROOT, status=0):
        monkeypatch.chdir(cwd)
        assert main(["report", *map(str, words)]) == status
        return capsys.readouterr().out

    return run


def write_decoder(folder):
    """Writes a decoder as table B imports one, with random weights."""
    model = load_config_file(
        f"{ROOT}/configs/ablation_easyvqa.py:preset=tiny,variant=mlp1",
    ).model
    shapes = expected_tensors(name_table(model, "internvl"), abstract_model(model, dtype="float32"))
    rng = np.random.default_rng(0)
    prefix = "language_model."
    tensors = {
        name.removeprefix(prefix): rng.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = chat_config(model, dtype="float32")["llm_config"]
    (folder / "config.json").write_text(json.dumps(config))
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)


def write_images(folder):
    """Writes images and questions as easy-VQA has them."""
    for split, count in (("train", 10), ("test", 5)):
        (folder / split / "images").mkdir(parents=True)
        asked = []
        for number in range(count):
            color = (255, 0, 0) if number % 2 else (0, 0, 255)
            Image.new("RGB", (64, 64), color).save(folder / split / "images" / f"{number}.png")
            name = "red" if number % 2 else "blue"
            asked.append(["what color is the shape?", name, number])
            asked.append(["is there a red shape?", "yes" if number % 2 else "no", number])
        (folder / split / "questions.json").write_text(json.dumps(asked))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with two cells of each table."""
    folder = tmp_path_factory.mktemp("ablation")
    write_decoder(folder / "llm")
    write_images(folder / "easy")
    common = ("--preset", "tiny", "--runs", folder / "runs", "--results", folder / "results")
    common += ("--seeds", "0", "--variants")
    places = ("--images", folder / "easy", "--llm", folder / "llm")
    with ThreadPoolExecutor(1) as other:  # the tables side by side
        easy = other.submit(ablation, "easyvqa", *common, "mlp1,x-fast", *places)
        pages = ablation("pages", *common, "internvl,x")
    return folder, pages, easy.result()


@pytest.fixture(scope="module")
def measured(finished):
    """Measures time and memory of a row of table A; returns the folder of `finished`."""
    folder = finished[0]
    sized = ("--preset", "tiny", "--runs", folder / "runs", "--results", folder / "results")
    ablation("measure", "pages", *sized, "--variants", "x", "--rounds", 1)
    return folder


@pytest.mark.slow
def test_cells_hold_scores_controls_and_costs(finished):
    folder, pages, easy = finished
    assert "2 cells, 0 failed" in pages and "2 cells, 0 failed" in easy
    cells = {
        path.name: json.loads(path.read_text()) for path in (folder / "results").rglob("*-s0.json")
    }
    assert len(cells) == 4
    for cell in cells.values():
        assert set(cell["scores"]) == set(cell["counts"]) and cell["counts"]["test"]["all"] > 0
        assert 0 <= cell["scores"]["test"]["all"] <= 1
        for split, counts in cell["counts"].items():
            assert sum(counts.values()) == 2 * counts["all"]
            assert counts.keys() == cell["scores"][split].keys()
        assert all(curve["loss"] for curve in cell["curves"])
    assert set(cells["x-s0.json"]["scores"]) == {"test", "blank", "downsized"}
    x, internvl = cells["x-s0.json"]["cost"], cells["internvl-s0.json"]["cost"]
    # RVTC cuts fewer tiles; LVTC has a quarter of the tokens in the shallow layers.
    assert x["tiles"] < internvl["tiles"] and x["deep"] == pytest.approx(16 * x["tiles"])
    assert x["shallow"] == x["deep"] / 4 < x["tokens"] < x["deep"]
    assert x["gflop"]["total"] < internvl["gflop"]["total"]
    assert cells["x-fast-s0.json"]["recipe"][0]["begins_with"]["steps"] == 2  # of the tower
    assert set(cells["mlp1-s0.json"]["scores"]["test"]) == {"all", "open", "yes or no"}
    # Four of the five test images; the blank page is asked each question once and scored for all.
    assert [cells["mlp1-s0.json"]["counts"][name]["all"] for name in ("test", "blank")] == [8, 10]
    asked = (folder / "runs" / "data" / "easyvqa-tiny" / "asked.jsonl").read_text()
    assert asked.count('"test/') == 8 and asked.count('"blank/') == 2


@pytest.mark.slow
def test_finished_cells_are_left_alone_and_others_refused(finished):
    folder = finished[0]
    common = ("pages", "--preset", "tiny", "--seeds", "0", "--variants", "x")
    common += ("--runs", folder / "runs", "--results", folder / "results")
    path = folder / "results" / "pages-tiny" / "x-s0.json"
    before = path.stat().st_mtime_ns
    assert "finished already" in ablation(*common)
    assert path.stat().st_mtime_ns == before
    cell = json.loads(path.read_text())
    path.write_text(json.dumps(cell | {"settings": "0" * 16}))
    assert "was made with other settings" in ablation(*common, status=1)
    path.write_text(json.dumps(cell))


@pytest.mark.slow
def test_memory_is_not_measured_into_the_times_of_other_devices(measured, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(ROOT)
    measure = importlib.import_module("ablation_measure").measure
    table = importlib.import_module("ablation_tables").open_table(
        "pages", "tiny", measured / "runs"
    )
    results = measured / "results"
    with pytest.raises(ConfigError, match=r"has times of 2 x cpu, here is 8 x cpu; delete it"):
        measure(table, results, variants=["x"], rounds=0)


@pytest.mark.slow
def test_rows_with_a_pretrained_decoder_and_adapters_are_measured(finished, tmp_path):
    folder = finished[0]
    places = ("--images", folder / "easy", "--llm", folder / "llm")
    sized = ("--preset", "tiny", "--runs", folder / "runs", "--results", tmp_path)
    # The cells ran on two devices.
    flags = FLAGS.replace("count=2", "count=4")
    ablation(
        "measure", "easyvqa", *sized, *places, "--variants", "x-fast", "--rounds", 1, flags=flags
    )
    kept = json.loads((tmp_path / "easyvqa-tiny" / "measured.json").read_text())
    assert kept["baseline"] == "mlp1" and kept["rows"].keys() == {"mlp1", "x-fast"}
    assert kept["rows"]["mlp1"]["train"] == kept["rows"]["mlp1"]["prefill"] == 1
    assert all(value > 0 for value in kept["rows"]["x-fast"].values())


@pytest.mark.slow
def test_page_and_picture_come_out_of_cells(measured, tmp_path, report):
    """The tables of toy cells, put where the report looks for those of the CPU."""
    for table in ("pages", "easyvqa"):
        shutil.copytree(measured / "results" / f"{table}-tiny", tmp_path / "r" / f"{table}-cpu")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "docs").mkdir()
    names = [f"{t}-cpu-{n}" for t in ("pages", "easyvqa") for n in BLOCKS]
    empty = "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in names)
    (tmp_path / "docs" / "evidence.md").write_text(empty)
    assert "differs" in report("--check", "--results", "r", cwd=tmp_path, status=1)
    report("--results", "r", cwd=tmp_path)
    report("--check", "--results", "r", cwd=tmp_path)
    page = (tmp_path / "docs" / "evidence.md").read_text()
    assert "2 of 51 cells are finished" in page and "`mlp1-4` s0, s1, s2" in page
    path = tmp_path / "r" / "pages-cpu" / "x-s0.json"
    cell = json.loads(path.read_text())
    line = next(line for line in page.splitlines() if line.startswith("| `x` "))
    assert f"| {100 * cell['scores']['test']['all']:.1f} | 1 |" in line
    times = json.loads((tmp_path / "r" / "pages-cpu" / "measured.json").read_text())["rows"]
    assert times["internvl"]["train"] == times["internvl"]["prefill"] == 1
    assert f"| {times['x']['train']:.2f} | {times['x']['prefill']:.2f} |" in line
    assert "whole: InternVL-X against InternVL" in page
    assert not (tmp_path / "docs" / "evidence.png").exists()  # rows of the core are missing
    for row in ("mlp1-16", "pvtc-16", "pvtc-4"):
        shutil.copy(path, path.with_name(f"{row}-s0.json"))
    # One cell began with a decoder that was trained elsewhere.
    cell["curves"][0]["loss"][0][1] += 0.001
    path.with_name("pvtc-4-s0.json").write_text(json.dumps(cell))
    # Another seed has a beginning of its own.
    path.with_name("x-s1.json").write_text(json.dumps(cell | {"seed": 1}))
    # One was made a second time.
    again = tmp_path / "r" / "repeated" / "pages-cpu" / "x-s0.json"
    again.parent.mkdir(parents=True)
    cell["scores"]["test"]["all"] += 0.1
    again.write_text(json.dumps(cell))
    report("--results", "r", cwd=tmp_path)
    page = (tmp_path / "docs" / "evidence.md").read_text()
    assert "(evidence.png)" in page
    began = [line for line in page.splitlines() if line.startswith("Began with another training")]
    before = 100 * cell["scores"]["test"]["all"] - 10  # with the seed that was repeated
    assert f"| 0 | {before:.1f} | {before + 10:.1f} | +10.0 |" in page
    assert len(began) == 1 and began[0].endswith("at equal settings: `pvtc-4` s0.")
    with Image.open(tmp_path / "docs" / "evidence.png") as picture:
        assert picture.size[0] > 500


def test_the_tower_is_asked_for_what_each_cell_shows(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    tower = importlib.import_module("ablation_tower")
    kinds = list(FORM_KINDS)
    for seed in range(30):
        form = make_form(np.random.default_rng(seed), (2, 2))
        known = tower.labels(form)
        shown = {kinds[kind] for kind in known[:, 0] if kind != tower.EMPTY}
        assert shown == {field.kind for field in form.fields}
        for field in form.fields:
            (cell,) = np.flatnonzero(known[:, 0] == kinds.index(field.kind))
            left, top, right, bottom = field.box
            middle = form.image.width / 2
            assert (cell % 2, cell // 2) == (left + right > 2 * middle, top + bottom > 2 * middle)
            told = [
                known[cell, slot]
                for slot, (kind, *_) in enumerate(tower.SLOTS)
                if kind == field.kind
            ]
            values = FORM_KINDS[field.kind].values
            if field.value.isdigit():
                assert "".join(map(str, told)) == field.value
            else:
                assert values[told[0]] == field.value
            asked = 1 + len(told)
            assert np.sum(known[cell] != tower.UNKNOWN) == asked


@pytest.mark.parametrize("command", [["pages"], ["measure", "pages"], ["easyvqa"]])
def test_unknown_rows_are_refused(command, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(ROOT)
    main = importlib.import_module("ablation").main
    with pytest.raises(SystemExit, match=r"unknown variants \['y'\]; known: .*'mlp1"):
        main([*command, "--variants", "y"])


def test_numbers_of_the_page_are_those_of_the_cells(report):
    assert "the pages are what the cells make" in report("--check")


def test_questions_give_away_what_the_tower_of_table_b_is_asked_for(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    labels = importlib.import_module("ablation_easyvqa").image_labels
    shapes, colors = importlib.import_module("ablation_easyvqa").CLASSES
    circle, gray = shapes.index("circle"), colors.index("gray")
    assert labels([("what is the gray shape?", "circle")])[0] == circle
    assert labels([("what color is the shape?", "gray")]) == [-1, gray]
    assert labels([("does the image contain a circle?", "yes")]) == [circle, -1]
    assert labels([("is there not a circle in the image?", "no")]) == [circle, -1]
    # That something is not there leaves open what is.
    assert labels([("is no gray shape present?", "yes")]) == [-1, -1]
    assert labels([("is a gray shape present?", "no")]) == [-1, -1]
