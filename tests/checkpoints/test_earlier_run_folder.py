"""A run folder that an earlier version wrote is resumed and evaluated (training.md 10)."""

import json
import shutil
from pathlib import Path

import pytest

from internvlx_jax.checkpoints.run_writer import check_run_folder
from internvlx_jax.cli import evaluate, train
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.overrides import load_config_file, override, to_dict

CONFIG = """
import json
from pathlib import Path

from internvlx_jax.core.overrides import from_dict
from internvlx_jax.core.run_config import TrainConfig


def get_config():
    return from_dict(TrainConfig, json.loads(Path("run/config.json").read_text())["train"])
"""


@pytest.fixture(scope="module")
def earlier(golden, tmp_path_factory):
    """A copy of the folder, with the tokenizer where the run's config expects it."""
    folder = tmp_path_factory.mktemp("earlier") / "copy"
    shutil.copytree(golden / "run_folder_0_1", folder)
    shutil.copytree(folder / "run" / "tokenizer", folder / "data" / "tokenizer")
    (folder / "config.py").write_text(CONFIG)
    return folder


@pytest.fixture
def expected(earlier, monkeypatch):
    """What the earlier version computed; the paths of the saved config are relative to the copy."""
    monkeypatch.chdir(earlier)
    return json.loads(Path("expected.json").read_text())


@pytest.mark.parametrize(
    "flags, name", [((), "predictions"), (("--ema",), "predictions_ema")], ids=["last", "average"]
)
def test_it_is_evaluated(expected, flags, name):
    """The parameters of step 4 and their average give the same answers as then."""
    assert evaluate_run("run/checkpoints/4", f"eval_{name}", *flags) == expected[name]


@pytest.mark.slow
def test_it_is_resumed(expected):
    """Two more steps have the losses of a run that was never stopped, and keep the average."""
    assert train.main(["--config", "config.py"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, then in zip(rows, expected["steps"], strict=True):
        assert {name: row[name] for name in then} == pytest.approx(then, rel=1e-6)
    last = evaluate_run("run", "eval_resumed", "--ema")
    assert len(last["raw"]) == 4
    # Only the newest steps are kept, and the earlier one is among them.
    assert evaluate_run("run/checkpoints/4", "eval_again", "--ema") == expected["predictions_ema"]


def evaluate_run(checkpoint, out, *flags):
    """Score and answers of the eval command on the questions of the folder."""
    status = evaluate.main(
        ["--checkpoint", checkpoint, "--data", "data/synthetic_pages/val_vqa.jsonl"]
        + ["--metric", "exact", "--out_dir", out, "--dtype", "float32"]
        + ["--max_new_tokens", "6", "--batch_size", "4", *flags]
    )
    assert status == 0
    lines = (Path(out) / "predictions.jsonl").read_text().splitlines()
    score = json.loads((Path(out) / "summary.json").read_text())["score"]
    return {"score": score, "raw": [json.loads(line)["raw"] for line in lines]}


def test_a_setting_that_an_earlier_version_lacked_counts_as_its_default(tmp_path):
    config = load_config_file("configs/demo.py")
    config = override(config, ["lora=[{'part': 'decoder', 'rank': 4, 'alpha': 8.0}]"])
    now = {"train": to_dict(config), "model": to_dict(config.model)}
    stored = json.loads(json.dumps(now))
    del stored["model"]["decoder"]["qk_norm"], stored["train"]["model"]["decoder"]["qk_norm"]
    del stored["train"]["optimizer"]["clip_norm"], stored["train"]["data"]["video"]
    del stored["train"]["lora"][0]["use_rslora"], stored["train"]["freeze"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert check_run_folder(tmp_path, now) is False
    for setting in ("model.decoder.qk_norm=true", "optimizer.clip_norm=2.0", "freeze.vit=true"):
        changed = override(config, [setting])
        again = {"train": to_dict(changed), "model": to_dict(changed.model)}
        with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]}: .* -> "):
            check_run_folder(tmp_path, again)
    del stored["train"]["optimizer"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="optimizer.learning_rate: .* -> 0.0015"):
        check_run_folder(tmp_path, now)
