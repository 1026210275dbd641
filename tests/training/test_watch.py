"""Watched runs: bad steps, logs, profiler, SIGTERM, replay, report (training.md 4, 6, 7, 10)."""

import dataclasses
import os
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from kill_run import logged, tiny_config

from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.run_config import GroupConfig, StabilityConfig
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.training.bad_steps import NonFiniteError, read_bad_steps
from internvlx_jax.training.loop import train
from internvlx_jax.training.metrics_logger import read_starts
from internvlx_jax.training.preemption import Preempted
from internvlx_jax.training.profiler import Window
from internvlx_jax.training.replay import replay
from internvlx_jax.training.report_page import write_page

STEPS = 8
NAN_STEP, EMPTY_STEP = 3, 5
HEAD = "decoder.head"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Text alone, so that it compiles in seconds."""
    config = tiny_config(tmp_path_factory.mktemp("watch"), STEPS, save_every=4)
    return dataclasses.replace(
        config,
        compute=dataclasses.replace(config.compute, peak_tflops=1e-3),
        optimizer=dataclasses.replace(
            config.optimizer, groups=(GroupConfig(params=HEAD, multiplier=0.5),)
        ),
    )


def spoil(patch, steps):
    """Gives every supervised label of these steps, {step: weight}, that weight.

    A function in place of a weight is called instead.
    """
    load = Loader.load

    def spoiled(self, planned):
        loaded, weight = load(self, planned), steps.get(planned.number + 1)
        if callable(weight):
            weight()
        elif weight is not None:
            weights = np.where(loaded.batch.loss_weight > 0, np.float32(weight), np.float32(0))
            loaded = loaded._replace(batch=loaded.batch._replace(loss_weight=weights))
        return loaded

    patch.setattr(Loader, "load", spoiled)


@pytest.fixture(scope="module")
def watched(config):
    """Returns a run with a trace of its second step and two bad steps.

    One step is not finite, and one has nothing supervised.
    """
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, {NAN_STEP: np.nan, EMPTY_STEP: 0})
        train(config, profile=Window(2, 2))
    return Path(config.output_dir)


def test_bad_steps_change_nothing_and_are_written_down(watched):
    """The schedule waits, the step number and the data go on; both are counted to the end."""
    rows = {row["step"]: row for row in logged(watched)}
    assert list(rows) == list(range(1, STEPS + 1))
    for step in (NAN_STEP, EMPTY_STEP):
        assert (
            "loss" not in rows[step]
            and rows[step]["learning_rate"] == rows[step + 1]["learning_rate"]
        )
        assert rows[step + 1]["param_norm"] == pytest.approx(rows[step - 1]["param_norm"], rel=0.1)
    rates = [rows[step]["learning_rate"] for step in rows if step not in (NAN_STEP, EMPTY_STEP)]
    assert len(set(rates)) == len(rates) and all(
        np.isfinite(list(row.values())).all() for row in rows.values()
    )
    assert [rows[STEPS][f"{kind}_steps"] for kind in ("nonfinite", "unsupervised", "spike")] == [
        1,
        1,
        0,
    ]
    lines = read_bad_steps(watched)
    assert [(line["step"], line["kind"], line["loss"]) for line in lines] == [
        (NAN_STEP, "nonfinite", "nan"),
        (EMPTY_STEP, "unsupervised", 0.0),
    ]
    assert (
        lines[0]["grad_norm"].keys() == {"all", "decoder"}
        and lines[0]["grad_norm"]["decoder"] == "nan"
    )
    assert (
        all(name.startswith("texts:") for row in lines[0]["samples"] for name in row)
        and lines[0]["samples"][0]
    )


def test_every_metric_is_there(watched):
    row = logged(watched)[-1]
    assert {
        "loss",
        "grad_norm",
        "grad_norm/decoder",
        "param_norm",
        "update_ratio",
        "learning_rate",
        "tokens_per_s",
        "useful_tokens_per_s",
        "supervised_tokens_per_s",
        "tiles_per_s",
        "images_per_s",
        "samples_per_s",
        "mfu_padded",
        "mfu_useful",
        "token_fill",
        "tile_fill",
        "masked_rows",
        "bad_samples",
        "data_wait_share",
        "step_ms_p50",
        "step_ms_p95",
        "compile_count",
        "compile_s",
        "train_s",
        "checkpoint_s",
        "evaluation_s",
    } <= row.keys()
    assert row["loss_by_dataset/texts"] == pytest.approx(row["loss"])
    assert row[f"learning_rate/{HEAD}"] == 0.5 * row["learning_rate"]
    assert 0 < row["mfu_useful"] < row["mfu_padded"] and "hbm_peak_gib" not in row, (
        "a CPU does not tell"
    )
    assert row["grad_norm/decoder"] == pytest.approx(row["grad_norm"]), "the rest is frozen"
    assert 0 < row["supervised_tokens_per_s"] < row["useful_tokens_per_s"] < row["tokens_per_s"]


def test_nothing_compiles_once_the_run_is_under_way(watched):
    counts = [row["compile_count"] for row in logged(watched)]
    assert len(set(counts[5:])) == 1, counts  # saves bring small programs of their own, at step 4


def test_the_trace_of_a_window(watched):
    assert len(list((watched / "profile").rglob("*.xplane.pb"))) == 1
    assert Window.parse("20:24") == (20, 24)
    for text in ("5", "5:4", "0:3", "a:b"):
        with pytest.raises(ConfigError, match="expected START:STOP"):
            Window.parse(text)


def test_a_step_is_run_again(watched):
    """The samples are those of the plan; sound weights here make the row losses finite."""
    result = replay(watched, NAN_STEP, ["mesh.data=8", "mesh.fsdp=1"])
    assert result["parameters_of_step"] == 4, "the oldest checkpoint that is kept"
    assert [row["samples"] for row in result["rows"]] == read_bad_steps(watched)[0]["samples"]
    assert all(0 < row["loss"] < 20 for row in result["rows"]) and np.isfinite(
        result["grad_norm"]["decoder"]
    )
    with pytest.raises(ConfigError, match="the run has the steps 1 to 8"):
        replay(watched, STEPS + 1, [])


def test_too_many_bad_steps_end_a_run_that_is_saved(config, monkeypatch, tmp_path):
    spoil(monkeypatch, {2: np.nan, 3: np.inf})
    stopping = dataclasses.replace(
        config,
        output_dir=str(tmp_path / "run"),
        stability=StabilityConfig(max_consecutive_nonfinite=2),
    )
    with pytest.raises(
        NonFiniteError, match=r"in 2 steps in a row \(max_consecutive_nonfinite = 2\).*is saved"
    ):
        train(stopping)
    assert RunFolder(tmp_path / "run").step == 3 and len(read_bad_steps(tmp_path / "run")) == 2


def test_sigterm_saves_and_the_same_command_goes_on(config, monkeypatch, tmp_path):
    spoil(monkeypatch, {3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    told = dataclasses.replace(config, output_dir=str(tmp_path / "run"), log_every=100)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="saved at step"):
        train(told)
    saved = RunFolder(tmp_path / "run").step
    assert (
        saved < STEPS
        and logged(tmp_path / "run")[-1]["step"] == saved
        and signal.getsignal(signal.SIGTERM) == before
    )
    monkeypatch.undo()
    train(told)
    starts = read_starts(tmp_path / "run")
    assert [start["step"] for start in starts] == [0, saved]
    assert starts[0]["devices"] == jax.device_count() == 8 and starts[0]["mesh"]["fsdp"] == 2
    assert RunFolder(tmp_path / "run").step == STEPS


def test_the_loop_moves_nothing_but_the_batch_to_the_devices(config, monkeypatch, tmp_path):
    """The guard that the loop sets fails a step that is given an array of the host."""
    from internvlx_jax.training import loop

    def step_on_the_host(setup, buckets, rows):
        def run(state, batch):
            jax.numpy.sum(np.ones(3))  # what a careless line in the loop would do
            raise AssertionError("not reached")

        return dict.fromkeys(buckets, run)

    monkeypatch.setattr(loop, "compile_train_steps", step_on_the_host)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(dataclasses.replace(config, output_dir=str(tmp_path / "run")))


def test_the_page_of_a_run(watched):
    """One file holds settings, buckets, curves, bad steps and starts.

    It refers to nothing outside.
    """
    page = write_page(watched).read_text()
    text, pictures = re.subn(r"data:image/png;base64,[\w+/=]*", "", page)  # may spell any word
    assert pictures >= 1 and "http" not in text and "<script" not in text
    for text in (
        "tokens_per_step",
        "learning_rate",
        "nonfinite",
        "unsupervised",
        "texts:",
        "Starts",
    ):
        assert text in page, text
