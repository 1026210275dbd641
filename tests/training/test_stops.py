"""A run that meets trouble loses no finished step (design: training.md 9, 10)."""

import dataclasses
import errno
import json
import logging
import signal
from pathlib import Path

import pytest
from PIL import Image

from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.checkpoints.run_writer import CheckpointWriter
from internvlx_jax.core import disk
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import read_json_lines, write_json
from internvlx_jax.training import loop, metrics
from internvlx_jax.training.loop import train
from internvlx_jax.training.preemption import Preempted

FULL = ValueError("RESOURCE_EXHAUSTED: Error writing: [Errno 28] No space left on device")


@pytest.fixture
def validated(tiny_run, pages, tmp_path):
    """Returns a run with held-out samples of its own, and their images."""
    folder = tmp_path / "held_out"
    folder.mkdir()
    shown = [folder / f"{n}.png" for n in range(4)]
    lines = []
    for image in shown:
        Image.new("RGB", (56, 56)).save(image)
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A page."}]
        size = {"width": 56, "height": 56}
        lines.append(json.dumps({"image": image.name, **size, "conversations": turns}))
    (folder / "val.jsonl").write_text("\n".join(lines) + "\n")
    entry = {"root": str(folder), "annotation": str(folder / "val.jsonl")}
    (folder / "meta.json").write_text(json.dumps({"synthetic": entry}))
    config = tiny_run(steps=4, eval_every=2, save_every=2)
    data = dataclasses.replace(config.data, val_meta=str(folder / "meta.json"))
    return dataclasses.replace(config, data=data), shown


@pytest.mark.slow
def test_validation_without_a_readable_sample_is_a_line(validated, caplog):
    config, shown = validated
    for image in shown:
        image.write_bytes(b"the disk with them is gone")
    with caplog.at_level(logging.INFO):
        train(config)
    assert RunFolder(config.output_dir).step == 4
    told = [record.message for record in caplog.records if "validation: " in record.message]
    assert told.count("validation: none of its samples could be read, see quarantine-*.jsonl in "
                      "the run folder") == 3  # fmt: skip
    assert told[0].startswith("validation: bad samples (synthetic: unreadable ")
    rows = read_json_lines(Path(config.output_dir) / "quarantine-0.jsonl", "annotation", "line")
    assert sorted((Path(row["annotation"]).name, row["line"]) for row in rows) == [
        ("val.jsonl", line) for line in (1, 2, 3, 4)
    ]
    assert not any("eval/loss" in row for row in logged(config)), "nothing was measured"


@pytest.mark.slow
def test_a_step_is_saved_before_it_is_scored(validated, monkeypatch):
    config, _ = validated
    scored = []

    class Breaks(loop.Validation):
        def __call__(self, step, params):
            scored.append(step)
            if step == 2:
                raise OSError(errno.EIO, "Input/output error", "held_out")
            return super().__call__(step, params)

    monkeypatch.setattr(loop, "Validation", Breaks)
    with pytest.raises(OSError, match="Input/output error"):
        train(config)
    assert scored == [0, 2] and RunFolder(config.output_dir).step == 2
    monkeypatch.undo()
    train(config)
    steps = [row["step"] for row in logged(config) if "eval/loss" in row]
    assert steps == [0, 2, 4], "what was saved and not scored is scored first"


def logged(config):
    return read_json_lines(Path(config.output_dir) / "metrics.jsonl", "step")


@pytest.mark.slow
def test_ctrl_c_saves_as_sigterm_does(tiny_run, monkeypatch, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    config = tiny_run(steps=6)
    send, seen = loop.to_devices, []

    def interrupt(loaded, mesh):
        seen.append(loaded)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return send(loaded, mesh)

    monkeypatch.setattr(loop, "to_devices", interrupt)
    with pytest.raises(Preempted, match="stopped by Ctrl-C: saved at step 2, the same command"):
        train(config)
    assert RunFolder(config.output_dir).step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    train(config)
    assert RunFolder(config.output_dir).step == 6

    def twice(loaded, mesh):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "to_devices", twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run("again"))


# --- disks ----------------------------------------------------------------------------------------


class Response:
    """Stands for orbax's answer to a save: under way, failed or done."""

    def __init__(self, error):
        self.error = error

    def result(self, timeout=None):
        if self.error is not None:
            raise self.error
        return True


def test_a_full_disk_is_one_line_at_the_save_that_failed(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    rest = tmp_path / "checkpoints" / "150.orbax-checkpoint-tmp"
    with pytest.raises(OSError) as error, CheckpointWriter(tmp_path, 2) as writer:
        rest.mkdir()
        responses = iter([Response(TimeoutError()), Response(FULL)])
        monkeypatch.setattr(
            writer._checkpointer, "save_checkpointables_async", lambda *_, **__: next(responses)
        )
        writer._saving = (150, next(responses))
        writer.check()  # under way
        writer._saving = (150, next(responses))
        writer.check()
    message = str(error.value)
    assert message.startswith("[Errno 28] No space left on device, ") and "\n" not in message
    assert " free; the last complete checkpoint is 100: " in message
    assert message.endswith("checkpoints/150'") and not rest.exists()


def test_files_on_a_full_disk_are_named(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def no_room(*_):
        raise full

    monkeypatch.setattr(Path, "write_bytes", no_room)
    with pytest.raises(OSError, match=r"No space left on device, .* free: '.*/config.json'"):
        write_json(tmp_path / "config.json", {})
    assert not list(tmp_path.iterdir()), "nothing half-written stays"
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(OSError, match="device, .*metrics.jsonl"), disk.named_on_error(path):
        raise full


@pytest.mark.slow
def test_a_disk_without_room_is_known_before_the_first_step(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(loop, "_compile", lambda *_: pytest.fail("compiled"))
    config = tiny_run()
    with pytest.raises(ConfigError, match="one checkpoint of this run takes about .* but only 1.0"):
        train(config)
    assert not Path(config.output_dir).exists()
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, OSError), match="file/run"):
        train(tiny_run("file/run"))


def test_the_metrics_file_keeps_texts_with_other_line_ends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = "loss/a\u2028b\u0085"
    path.write_text(json.dumps({"step": 1, odd: 2.0}, ensure_ascii=False) + "\n" + '{"step": 9')
    metrics.MetricsWriter(tmp_path, 5).close()
    assert read_json_lines(path, "step") == [{"step": 1, odd: 2.0}]
    path.write_text("not json\n")
    with pytest.raises(ConfigError, match="metrics.jsonl line 1: not a JSON object"):
        metrics.MetricsWriter(tmp_path, 5)
