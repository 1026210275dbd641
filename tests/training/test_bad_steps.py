"""Steps that went wrong are recorded with their samples, and end a run when they are too many.

Definition: design: training.md 6.
"""

import json

import numpy as np
import pytest

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.run_config import StabilityConfig
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.training.bad_steps import MEDIAN_FROM, BadSteps, read_bad_steps
from internvlx_jax.training.step import Metrics

NAN, INF = float("nan"), float("inf")


def step(loss, norm=1.0, weight=1.0):
    applied = np.isfinite(loss) and np.isfinite(norm) and weight > 0
    norms = {"vision": np.float32(0.5), "decoder": np.float32(norm)}
    return Metrics(
        *map(np.float32, (loss, [loss * weight], [weight], norm)),
        norms,
        *map(np.float32, (1, 1, 1)),
        np.bool_(applied),
    )


def bad_steps(run, first=0, writes=True, **limits):
    return BadSteps(
        run,
        first,
        StabilityConfig(**limits),
        planned_ids=lambda number: [[f"pages:{number}"], []],
        writes=writes,
    )


def look(bad, *metrics, first=1):
    return bad.look(
        [(number, Bucket(3, 128), each) for number, each in enumerate(metrics, start=first)]
    )


def test_a_bad_step_is_written_with_what_it_was_made_of(tmp_path):
    bad = bad_steps(tmp_path)
    said = look(bad, step(1.0), step(NAN, INF), step(0.0, 0.0, weight=0.0), step(1.0, INF))
    assert [line.split(":")[0] for line in said] == ["step 2", "step 3", "step 4"]
    assert dict(bad.counts) == {"nonfinite": 2, "unsupervised": 1}
    lines = read_bad_steps(tmp_path)
    assert lines[0] == {
        "step": 2,
        "kind": "nonfinite",
        "loss": "nan",
        "grad_norm": {"all": "inf", "vision": 0.5, "decoder": "inf"},
        "bucket": {"tiles": 3, "length": 128, "short_length": 0},
        "samples": [["pages:1"], []],
    }
    assert [(line["step"], line["kind"]) for line in lines] == [
        (2, "nonfinite"),
        (3, "unsupervised"),
        (4, "nonfinite"),
    ]


def test_a_spike_is_held_against_the_running_median(tmp_path):
    bad = bad_steps(tmp_path, spike_factor=2.0)
    assert look(bad, *[step(1.0)] * (MEDIAN_FROM - 1), step(50.0)) == [], (
        "too few steps to know what is usual"
    )
    assert look(bad, step(2.0), step(NAN), step(2.1), first=30)[1] == (
        "step 32: loss 2.1000 is over 2 x the median 1.0000; samples in bad_steps.jsonl"
    )
    assert [line["kind"] for line in read_bad_steps(tmp_path)] == ["nonfinite", "spike"]
    look(bad, *[step(5.0)] * 200, first=40)
    assert look(bad, step(9.0), first=300) == [], "the median has moved on"
    assert bad.verdict() is None, "spikes end no run"


@pytest.mark.parametrize("middle, sigma", [(0.02, 1.0), (0.3, 0.6), (2.0, 0.05)])
def test_noise_is_no_spike(tmp_path, middle, sigma):
    """Losses of small batches differ by factors, most of all late in a run.

    What towers over them is still a spike.
    """
    bad, rng = bad_steps(tmp_path), np.random.default_rng(0)
    losses = middle * np.exp(sigma * rng.standard_normal(2000))
    assert look(bad, *map(step, losses)) == [] and bad.counts["spike"] == 0
    far = middle * max(4, np.exp(10 * sigma))
    assert "over 3 x the median" in look(bad, step(far), first=2001)[0]


def test_too_many_in_a_row_end_the_run(tmp_path):
    bad = bad_steps(tmp_path, max_consecutive_nonfinite=3)
    look(
        bad, step(NAN), step(NAN), step(1.0), step(NAN), step(0.0, weight=0.0), step(NAN), step(NAN)
    )
    assert bad.verdict() is None
    look(bad, step(NAN), first=8)
    assert "3 steps in a row (max_consecutive_nonfinite = 3)" in bad.verdict()


def test_too_many_in_all_end_the_run_across_restarts(tmp_path):
    """A restart counts the steps before its checkpoint, and forgets those that it runs again."""
    look(bad_steps(tmp_path), step(NAN), step(1.0), step(NAN), step(NAN))
    for writes in (True, False):
        bad = bad_steps(tmp_path, first=3, writes=writes, max_total_nonfinite=3)
        assert bad.counts["nonfinite"] == 2 and bad.verdict() is None
    assert [line["step"] for line in read_bad_steps(tmp_path)] == [1, 3]
    look(bad, step(NAN), first=4)
    assert "3 steps in all (max_total_nonfinite = 3)" in bad.verdict()
    assert len(read_bad_steps(tmp_path)) == 2, "only the first process writes"


def test_the_file_after_a_kill(tmp_path):
    look(bad_steps(tmp_path), step(NAN))
    with (tmp_path / "bad_steps.jsonl").open("a") as file:
        file.write('{"step": 2, "ki')
    assert len(read_bad_steps(tmp_path)) == 1
    (tmp_path / "bad_steps.jsonl").write_text(json.dumps({"step": 2}) + "\n")
    with pytest.raises(
        ConfigError, match="bad_steps.jsonl line 1: not a JSON object .* remove the line"
    ):
        read_bad_steps(tmp_path)


@pytest.mark.parametrize(
    "limit",
    [dict(max_total_nonfinite=0), dict(max_consecutive_nonfinite=0), dict(spike_factor=1.0)],
)
def test_limits_that_make_no_sense(limit):
    with pytest.raises(ConfigError, match=f"stability.{next(iter(limit))}"):
        StabilityConfig(**limit)
