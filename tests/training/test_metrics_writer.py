"""metrics.jsonl, TensorBoard events, rates and the progress line (design: training.md 7)."""

import errno
import json
from collections import deque
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from internvlx_jax.data.pipeline import StepCounts
from internvlx_jax.training import metrics
from internvlx_jax.training.event_files import EventFiles
from internvlx_jax.training.metrics import (
    MetricsWriter,
    Throughput,
    over_processes,
    progress_line,
    window_means,
)
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
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 3.4),
        (5, 3.5),
        (6, 3.6),
    ]


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
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"], (
        "nothing stays aside"
    )


def test_tensorboard_holds_the_same_numbers(tmp_path):
    write(tmp_path, 0, [1, 2])
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, values = file.read_bytes(), []
    while data:  # records: length, its checksum, event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        values += [
            (event.step, value.tag, round(value.simple_value, 6)) for value in event.summary.value
        ]
        data = data[16 + length :]
    assert values == [(1, "loss", 0.1), (2, "loss", 0.2)]


def test_without_tensorboard_the_numbers_are_written_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with caplog.at_level("INFO", logger="internvlx_jax"):
        writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 2.0})
    writer.flush()
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
    assert not (tmp_path / "tensorboard").exists()
    assert "pip install 'internvlx-jax[tensorboard]'" in caplog.text


def test_names_of_parameter_groups_are_no_matter_for_the_log(tmp_path, caplog):
    files = EventFiles(tmp_path / "tensorboard", 0)
    with caplog.at_level("INFO"):
        files.write(1, {r"learning_rate/(vision|decoder)\.": 1.0})
    files.close()
    assert not caplog.messages
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"learning_rate/_vision_decoder__." in file.read_bytes()


def test_a_full_disk_is_named_where_tensorboard_meets_it(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    files = EventFiles(tmp_path / "tensorboard", 0)
    files.write(1, {"loss": 1.0})
    monkeypatch.setattr(EventsWriter, "flush", full)
    with pytest.raises(OSError, match="No space left on device, .* free: .*tensorboard"):
        files.write(2, {"loss": 1.0})
    monkeypatch.undo()
    files.close()


@pytest.fixture
def clock(monkeypatch):
    """clock.now is what time.perf_counter tells."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    return clock


def test_rates_count_real_quantities_and_leave_pauses_out(clock):
    throughput = Throughput({"train_s": 50.0, "checkpoint_s": 1.0})
    for _ in range(2):
        throughput.add(
            StepCounts(
                samples=3,
                tokens=300,
                supervised=30,
                tiles=10,
                images=4,
                masked_rows=1,
                slots=400,
                tile_slots=16,
            )
        )
    with throughput.paused("evaluation_s"):
        clock.now = 106.0
    clock.now = 110.0
    assert throughput.take() == {
        "tokens_per_s": 200.0,
        "useful_tokens_per_s": 150.0,
        "supervised_tokens_per_s": 15.0,
        "tiles_per_s": 5.0,
        "images_per_s": 2.0,
        "samples_per_s": 1.5,
        "step_s": 2.0,
        "token_fill": 0.75,
        "tile_fill": 0.625,
        "masked_rows": 2,
        "data_wait_share": 0.0,
        "train_s": 54.0,
        "compile_s": 0.0,
        "checkpoint_s": 1.0,
        "evaluation_s": 6.0,
    }
    clock.now = 112.0
    throughput.add(
        StepCounts(
            samples=1,
            tokens=100,
            supervised=1,
            tiles=0,
            images=0,
            masked_rows=0,
            slots=100,
            tile_slots=0,
        )
    )
    assert throughput.take()["useful_tokens_per_s"] == 50.0, "the next window begins anew"


def test_waiting_for_data_is_a_share_of_the_time(clock):
    def slow():
        for item in "ab":
            clock.now += 3.0
            yield item

    throughput, seen = Throughput(), []
    for item in throughput.waited(slow()):
        clock.now += 1.0
        seen.append(item)
    assert seen == ["a", "b"] and throughput.take()["data_wait_share"] == 6 / 8


def test_step_times_are_those_of_the_devices(clock, monkeypatch):
    """The host goes on until two steps are in flight; a pause belongs to no step."""
    seconds, waited = iter([2.0, 3.0, 10.0]), []

    def block(result):
        waited.append(result)
        clock.now += next(seconds)

    monkeypatch.setattr(metrics.jax, "block_until_ready", block)
    throughput, in_flight = Throughput(), deque(["a", "b"])
    throughput.wait(in_flight, leave=2)
    assert waited == []
    in_flight.append("c")
    throughput.wait(in_flight, leave=2)
    with throughput.paused("checkpoint_s"):
        clock.now += 100.0
    throughput.wait(in_flight, leave=0)
    assert waited == ["a", "b", "c"]
    rates = throughput.take()
    assert rates["step_ms_p50"] == 3000.0 and rates["step_ms_p95"] == pytest.approx(9300.0)
    assert rates["checkpoint_s"] == 100.0 and rates["train_s"] == 15.0


def step_metrics(loss, norm=1.0, weight=1.0, rate=1.0, applied=True):
    return Metrics(
        *map(np.float32, (loss, (loss * weight, 0), (weight, 0), norm)),
        {"decoder": np.float32(norm / 2)},
        np.float32(10),
        np.float32(0.1),
        np.float32(rate),
        np.bool_(applied),
    )


def test_a_window_shows_the_loss_of_its_tokens_and_the_last_rate():
    window = [
        step_metrics(1, 4, 3, 0.5),
        step_metrics(5, 6, 1, 0.25),
        step_metrics(np.nan, np.nan, 7, 0.125, False),
    ]
    assert window_means(window, ("a", "b")) == pytest.approx(
        {
            "loss": 2.0,
            "loss_by_dataset/a": 2.0,
            "grad_norm": 5.0,
            "grad_norm/decoder": 2.5,
            "param_norm": 10.0,
            "update_ratio": 0.01,
            "learning_rate": 0.125,
        }
    )
    assert window_means(window[2:], ("a", "b")) == {"learning_rate": 0.125}, (
        "no number where no step made an update"
    )


def test_the_largest_of_all_processes_and_the_sum_of_counts(monkeypatch):
    monkeypatch.setattr(
        metrics.multihost_utils,
        "process_allgather",
        lambda tree: jax.tree.map(lambda x: np.stack([x, 2 * x]), tree),
    )
    largest, faults = over_processes({"data_wait_share": 0.25}, np.array([[5, 1]]))
    assert largest == {"data_wait_share": 0.5} and faults.tolist() == [[15, 3]]


def test_device_memory_is_that_of_the_fullest(monkeypatch):
    def devices(*stats):
        monkeypatch.setattr(
            metrics.jax,
            "local_devices",
            lambda: [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats],
        )
        return metrics.hbm_peak_gib()

    assert devices({"peak_bytes_in_use": 2**30}, {"peak_bytes_in_use": 3 * 2**30}) == {
        "hbm_peak_gib": 3.0
    }
    assert devices(None, None) == devices({}) == {}


def test_the_progress_line():
    values = {
        "loss": 1.23456,
        "learning_rate": 4e-5,
        "grad_norm": 0.987,
        "useful_tokens_per_s": 12345.6,
        "images_per_s": 7.89,
        "step_s": 2.5,
    }
    assert progress_line(50, 100, values) == (
        "step 50/100  loss 1.2346  lr 4.00e-05  grad 0.99  12,346 tokens/s  7.9 images/s  eta 2:05"
    )
    assert "loss nan" in progress_line(
        50, 100, {name: values[name] for name in values if name not in ("loss", "grad_norm")}
    )
