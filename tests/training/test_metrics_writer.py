"""metrics.jsonl, TensorBoard events, rates and the progress line (spec: training.md 7)."""

import json

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from internvlx_jax.data.pipeline import StepCounts
from internvlx_jax.training import metrics
from internvlx_jax.training.metrics import MetricsWriter, Throughput, progress_line, window_means
from internvlx_jax.training.step import Metrics


def read(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write(run, start_step, steps):
    writer = MetricsWriter(run, start_step)
    for step in steps:
        writer.write(step, {"loss": start_step + step / 10})
    writer.close()


def test_one_line_a_step(tmp_path):
    write(tmp_path, 0, [1, 2])
    assert read(tmp_path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]


def test_a_resumed_run_writes_each_step_once(tmp_path):
    """Killed after step 5, resumed from the checkpoint of step 3."""
    write(tmp_path, 0, [1, 2, 3, 4, 5])
    write(tmp_path, 3, [4, 5, 6])
    assert [(row["step"], row["loss"]) for row in read(tmp_path)] == [
        (1, 0.1), (2, 0.2), (3, 0.3), (4, 3.4), (5, 3.5), (6, 3.6)]  # fmt: skip


def test_a_run_that_begins_again_repeats_everything(tmp_path):
    """Killed before its first checkpoint; the validation before the first step is at step 0."""
    write(tmp_path, 0, [0, 1])
    write(tmp_path, 0, [0, 1, 2])
    assert [row["step"] for row in read(tmp_path)] == [0, 1, 2]


def test_several_lines_of_the_same_step_are_kept(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(3, {"loss": 1.0})
    writer.write(3, {"eval/loss": 2.0})
    writer.close()
    MetricsWriter(tmp_path, 3).close()
    assert read(tmp_path) == [{"step": 3, "loss": 1.0}, {"step": 3, "eval/loss": 2.0}]


@pytest.mark.parametrize("half", ['{"step": 2, "lo', '{"step": 2, "loss": 0.2}'])
def test_a_half_written_last_line_is_dropped(half, tmp_path):
    write(tmp_path, 0, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    write(tmp_path, 2, [3])
    assert [row["step"] for row in read(tmp_path)] == [1, 3]
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"], "nothing stays aside"


def test_tensorboard_holds_the_same_numbers(tmp_path):
    write(tmp_path, 0, [1, 2])
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, values = file.read_bytes(), []
    while data:  # records: length, its checksum, event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        values += [(event.step, value.tag, round(value.simple_value, 6)) for value in event.summary.value]
        data = data[16 + length :]
    assert values == [(1, "loss", 0.1), (2, "loss", 0.2)]


def test_rates_count_real_quantities_and_leave_pauses_out(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    throughput = Throughput()
    for _ in range(2):
        throughput.add(StepCounts(samples=3, tokens=300, tiles=10, images=4, masked_rows=1, slots=400, tile_slots=16))
    throughput.pause(6.0)
    now = 110.0
    assert throughput.take() == {"tokens_per_s": 150.0, "tiles_per_s": 5.0, "images_per_s": 2.0, "step_s": 2.0,
                                 "token_fill": 0.75, "tile_fill": 0.625, "masked_rows": 2,
                                 "data_wait_share": 0.0}  # fmt: skip
    now = 112.0
    throughput.add(StepCounts(samples=1, tokens=100, tiles=0, images=0, masked_rows=0, slots=100, tile_slots=0))
    assert throughput.take()["tokens_per_s"] == 50.0, "the next window begins anew"


def test_waiting_for_data_is_a_share_of_the_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)

    def slow():
        nonlocal now
        for item in "ab":
            now += 3.0
            yield item

    throughput, seen = Throughput(), []
    for item in throughput.waited(slow()):
        now += 1.0
        seen.append(item)
    assert seen == ["a", "b"] and throughput.take()["data_wait_share"] == 6 / 8


def test_a_window_shows_mean_loss_and_the_last_rate():
    window = [Metrics(np.float32(loss), np.float32(norm), np.float32(rate))
              for loss, norm, rate in ((1, 4, 0.5), (2, 6, 0.25), (6, 8, 0.125))]  # fmt: skip
    assert window_means(window) == {"loss": 3.0, "grad_norm": 6.0, "learning_rate": 0.125}


def test_the_progress_line():
    values = {"loss": 1.23456, "learning_rate": 4e-5, "grad_norm": 0.987, "tokens_per_s": 12345.6, "images_per_s": 7.89,
              "step_s": 2.5}  # fmt: skip
    assert progress_line(50, 100, values) == (
        "step 50/100  loss 1.2346  lr 4.00e-05  grad 0.99  12,346 tokens/s  7.9 images/s  eta 2:05")
