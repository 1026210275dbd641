"""The demo calls its stages in order.

The data are real; train.py and eval.py are replaced by stand-ins in an empty folder.
"""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from internvlx_jax import demo
from internvlx_jax.core.overrides import load_config_file
from internvlx_jax.data.synthetic import FILES, SyntheticConfig

ROOT = Path(__file__).parents[1]

TRAIN = """
import json, os, pathlib, sys
assert sys.argv[1:] == ["--config", "configs/demo.py"], sys.argv
assert pathlib.Path("runs/demo/data/meta_train.json").is_file()
print("NPROC", os.environ["NPROC"])
print("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS"))
run = pathlib.Path("runs/demo/train")
run.mkdir()
rows = [{"step": 1, "loss": 1.0}, {"step": 1, "eval/loss": 1.0, "eval/exact": 0.5}]
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
EVAL = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("checkpoint", "data", "metric", "out_dir", "dtype", "max_new_tokens", "batch_size"):
    parser.add_argument("--" + name, required=True)
args = parser.parse_args()
assert args.checkpoint == "runs/demo/train" and args.metric == "exact"
data, out = pathlib.Path(args.data), pathlib.Path(args.out_dir)
questions = [json.loads(line) for line in data.read_text().splitlines()]
out.mkdir()
right = "blank" not in data.name
rows = [
    {
        "prompt": q["question"],
        "images": [str(data.parent / q["image"])],
        "prediction": q["answer"],
        "answer": [q["answer"]],
        "score": float(right),
        "error": None,
    }
    for q in questions
]
(out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(out / "summary.json").write_text(json.dumps({"score": float(right)}))
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "PAGES", SyntheticConfig(train_samples=3, val_samples=4))
    monkeypatch.delenv("NPROC", raising=False)
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "demo.py", tmp_path / "configs")
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "eval.py").write_text(EVAL)
    return tmp_path


def test_every_stage_runs_and_the_last_line_is_fixed(checkout, capfd):
    other, stale = checkout / "runs" / "other", checkout / "runs" / "demo" / "stale"
    for folder in (other, stale):
        folder.mkdir(parents=True)
    assert demo.main() == 0
    lines = capfd.readouterr().out.splitlines()
    chance = json.loads((checkout / "runs/demo/data/synthetic.json").read_text())["chance"]
    measured = f"demo: exact_match=1.00 chance={chance:.2f} blank=0.00"
    assert re.fullmatch(
        re.escape(measured) + r" visual_tokens=\d+\.\d \(InternVL: \d+\.\d\)", lines[-1]
    )
    assert "NPROC 16" in lines
    found = {line.split()[0]: Path(line.split()[-1]) for line in lines[-6:-1]}
    assert list(found) == ["checkpoint", "metrics", "curves", "answers", "picture"]
    assert all(path.is_file() for name, path in found.items() if name != "checkpoint")
    assert other.is_dir() and not stale.exists()


def test_environment_of_the_user_is_kept(checkout, capfd, monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert demo.main() == 0
    assert {"NPROC 3", "JAX_PLATFORMS cuda,cpu"} <= set(capfd.readouterr().out.splitlines())


@pytest.mark.parametrize("attached, platforms", [(False, "cpu"), (True, None)])
def test_jax_looks_for_accelerators_only_where_there_are_device_nodes(
    checkout, capfd, monkeypatch, attached, platforms
):
    """Otherwise libtpu prints errors about a TPU that nobody has."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(demo, "has_accelerator", lambda: attached)
    assert demo.main() == 0
    assert f"JAX_PLATFORMS {platforms}" in capfd.readouterr().out.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="device nodes of Linux")
@pytest.mark.parametrize(
    "node, found", [("accel0", True), ("vfio/0", True), ("nvidia0", True), ("null", False)]
)
def test_device_nodes(tmp_path, node, found):
    (tmp_path / node).parent.mkdir(exist_ok=True)
    (tmp_path / node).touch()
    assert demo.has_accelerator(tmp_path) == found


def test_what_the_compressors_spend():
    """Two pages: a narrow one of one tile, and one of two tiles and a thumbnail.

    InternVL cuts the narrow one 2 x 3 with a thumbnail.
    """
    model = load_config_file(ROOT / demo.CONFIG).model
    spent = demo.Spent.of(model, [(72, 108), (220, 110)])
    assert (spent.tiles, spent.tiles_off) == (2, 5)
    assert (spent.shallow, spent.deep, spent.internvl) == (2, 8, 20)
    assert spent.tokens == (2 + 8 + 8) / 3
    off = demo.Spent.of(dataclasses.replace(model, lvtc=None), [(72, 108), (220, 110)])
    assert off.shallow == off.deep == off.tokens == 8


def test_failing_stage_is_shown(checkout, capfd):
    (checkout / "train.py").write_text("import sys; sys.exit(3)")
    assert demo.main() == 1
    captured = capfd.readouterr()
    command = f"{sys.executable} train.py --config configs/demo.py"
    assert captured.err.strip() == f"error: exit status 3 of: {command}"
    assert "exact_match" not in captured.out


def test_outside_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert demo.main() == 1
    assert "root of the checkout" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_config_and_demo_name_the_same_folders():
    config = load_config_file(ROOT / demo.CONFIG)
    assert Path(config.output_dir) == demo.TRAIN
    assert Path(config.data.meta) == demo.DATA / FILES["meta_train"]
    assert Path(config.data.val_meta) == demo.DATA / FILES["meta_val"]
