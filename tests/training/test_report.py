"""Learning curves from metrics.jsonl (design: training.md 7)."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from internvlx_jax.cli.report import main
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.training.replay import replay
from internvlx_jax.training.report import CHANCE, VALIDATION, draw_curves, read_metrics
from internvlx_jax.training.report_page import write_page
from internvlx_jax.training.store_costs import NAMES, costs

TRAINING = [
    {"step": step, "loss": 2.0 - step / 100, "learning_rate": 1e-3} for step in (20, 40, 60)
]
VALIDATIONS = [{"step": step, "eval/loss": 2.0, "eval/exact": step / 100} for step in (30, 60)]


def run_folder(tmp_path, rows, tail=""):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return run


def pixels_of(path, color):
    """Number of pixels of exactly this "#rrggbb"."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.asarray(Image.open(path).convert("RGB")) == wanted).all(axis=-1).sum())


def test_series_keep_the_steps_of_their_own_rows(tmp_path):
    series = read_metrics(run_folder(tmp_path, [*TRAINING, *VALIDATIONS]) / "metrics.jsonl")
    assert series["loss"] == ([20, 40, 60], [1.8, 1.6, 1.4])
    assert series["eval/exact"] == ([30, 60], [0.3, 0.6])
    assert "step" not in series


def test_unfinished_last_line_is_left_out(tmp_path):
    run = run_folder(tmp_path, TRAINING, tail='{"step": 80, "lo')
    assert read_metrics(run / "metrics.jsonl")["loss"][0] == [20, 40, 60]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1.0}'])
def test_bad_line_is_named(tmp_path, line):
    run = run_folder(tmp_path, TRAINING, tail=f"{line}\n")
    with pytest.raises(ConfigError, match="line 4"):
        read_metrics(run / "metrics.jsonl")


def test_curves_show_what_the_run_has_logged(tmp_path):
    run = run_folder(tmp_path, TRAINING)
    training_only = draw_curves(run)
    assert training_only == run / "curves.png"
    width = Image.open(training_only).width
    assert pixels_of(training_only, VALIDATION) == 0

    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in VALIDATIONS)
    both = draw_curves(run)
    assert Image.open(both).width == 2 * width
    assert pixels_of(both, VALIDATION) > 0 and pixels_of(both, CHANCE) == 0

    assert pixels_of(draw_curves(run, chance=0.11), CHANCE) > 0
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(FileNotFoundError, match="output_dir"):
        draw_curves(tmp_path)
    with pytest.raises(ConfigError, match='no "loss"'):
        draw_curves(run_folder(tmp_path, VALIDATIONS))


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = run_folder(tmp_path, TRAINING)
    assert main([str(run)]) == 1
    assert "pip install 'internvlx-jax[report]'" in capsys.readouterr().err
    assert not (run / "curves.png").exists()


def test_costs_in_an_object_store_are_told_apart():
    """A step costs the median of the windows; what is above it is of the checkpoints."""
    series = {name: ([2, 4, 6, 8, 10, 12], [2, 2, 12, 2, 2, 14]) for name in NAMES}
    starts = [dict.fromkeys(NAMES, 30), {"step": 4}, dict.fromkeys(NAMES, 10)]
    found = costs(series, starts, save_every=6)
    assert found.keys() == {"step", "checkpoint", "start"}
    assert found["step"] == dict.fromkeys(NAMES, 1)
    assert found["checkpoint"] == dict.fromkeys(NAMES, 11)
    assert found["start"] == dict.fromkeys(NAMES, 20)
    assert costs({}, starts, save_every=4) == {}


@pytest.mark.parametrize(
    "content, message",
    [
        ("null", "config.json holds no JSON object"),
        ('{"train": null, "model": {}}', 'config.json: "train" is None, expected the settings'),
        ('{"train": {}}', 'config.json: "model" is None'),
        ("{", "config.json is not valid JSON"),
    ],
)
def test_damaged_settings_of_a_run_are_named(tmp_path, content, message):
    run = run_folder(tmp_path, TRAINING)
    (run / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        write_page(run)
    with pytest.raises(ConfigError, match=message):
        replay(run, 1, [])


def test_replay_names_the_file_of_a_setting(tmp_path):
    run = run_folder(tmp_path, TRAINING)
    (run / "config.json").write_text('{"train": {"steps": "x"}, "model": {}}')
    with pytest.raises(ConfigError, match="config.json: steps: expected int"):
        replay(run, 1, [])
    (run / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json does not exist; give the folder"):
        replay(run, 1, [])
