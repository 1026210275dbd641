"""Everything that a run reads and writes is behind gs:// (platform.md 8)."""

import dataclasses
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath
from kill_run import (
    Kill,
    differences,
    finish,
    kill_at,
    launch,
    run_and_kill,
    start,
    tiny_config,
    write_config,
)
from object_stores import FAULTS

from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.checkpoints.run_format import finished_steps
from internvlx_jax.checkpoints.run_writer import CheckpointWriter
from internvlx_jax.cli import convert, evaluate, report
from internvlx_jax.core.files import read_json_lines
from internvlx_jax.core.line_log import read_whole
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.uploads import MARKER, upload_folder
from internvlx_jax.data.synthetic import FILES, TOKENIZER_FOLDER
from internvlx_jax.training.loop import train

pytestmark = pytest.mark.slow(minutes=5)

STEPS, SAVE_EVERY = 8, 4


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty working directory, which has to stay empty."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("INTERNVLX_CACHE", str(tmp_path / "cache"))
    yield cwd
    assert list(cwd.rglob("*")) == []


@pytest.fixture(params=["gs", "s3"])
def uploaded(request, pages):
    """The generated pages and the tokenizer in a bucket of each kind."""
    folder = request.getfixturevalue({"gs": "folder", "s3": "s3_folder"}[request.param])
    upload_folder(pages, as_path(f"{folder}/data"))
    upload_folder(TOKENIZER_FOLDER, as_path(f"{folder}/tokenizer"))
    return folder


def on_store(config, folder):
    """Returns the config with data, tokenizer and run folder in the bucket."""
    data = dataclasses.replace(
        config.data,
        meta=f"{folder}/data/{FILES['meta_train']}",
        val_meta=f"{folder}/data/{FILES['meta_val']}",
        tokenizer=f"{folder}/tokenizer",
    )
    return dataclasses.replace(config, data=data, output_dir=f"{folder}/run")


def test_from_training_to_report(uploaded, run_in, tmp_path, nowhere):
    """Train in two starts, evaluate, export, import and report, each from and to the bucket."""
    folder = uploaded
    config = on_store(run_in(tmp_path, steps=4, save_every=2, eval_every=2), folder)
    if folder.startswith("s3"):  # orbax cannot write there
        config = dataclasses.replace(config, local_checkpoint_dir=str(tmp_path / "stage"))
    straight = dataclasses.replace(config, output_dir=f"{folder}/straight")
    whole = train(straight)
    train(config, stop_after=2)
    metrics = train(config)
    assert metrics["loss"] == whole["loss"] and metrics["eval/loss"] == whole["eval/loss"]
    run = as_path(config.output_dir)
    assert differences(as_path(straight.output_dir), run, 4) == []
    assert finished_steps(run) == [2, 4] and not (run / "lock.json").exists()
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "tokenizer", "metrics.jsonl", "starts.jsonl", "tensorboard", "checkpoints",
    }  # fmt: skip

    data = f"{folder}/data/{FILES['val_vqa']}"
    command = ["--checkpoint", config.output_dir, "--data", data, "--metric", "exact"]
    command += ["--out_dir", f"{folder}/eval", "--limit", "2", "--max_new_tokens", "4"]
    assert evaluate.main(command) == 0
    out = as_path(f"{folder}/eval")
    assert {path.name for path in out.iterdir()} >= {"predictions.jsonl", "summary.json"}
    assert json.loads((out / "summary.json").read_text())["samples"] == 2
    assert not (out / "parts").exists()
    if folder.startswith("gs"):
        command[command.index("--out_dir") + 1] = f"{folder}/eval_by_two"
        codes, outputs = finish(launch(["eval.py", *command], 4, 2))
        assert codes == [0, 0], "\n".join(outputs)
        two = as_path(f"{folder}/eval_by_two")
        assert (two / "predictions.jsonl").read_text() == (out / "predictions.jsonl").read_text()

    layout = ["--layout", "internvl-x", "--dtype", "keep"]
    exported, imported = f"{folder}/hf", f"{folder}/imported"
    assert convert.main(["export", "--from", config.output_dir, "--to", exported, *layout]) == 0
    assert convert.main(["import", "--from", exported, "--to", imported]) == 0
    one, other = RunFolder(config.output_dir), RunFolder(imported)
    for (path, ours), (_, theirs) in zip(
        one.read_all(one.shapes), other.read_all(one.shapes), strict=True
    ):
        assert ours.tobytes() == theirs.tobytes(), path
    assert report.main([config.output_dir]) == 0
    assert (run / "curves.png").stat().st_size > 1000
    page = (run / "report.html").read_text()
    assert "<h2>Object store</h2>" in page
    rows = read_json_lines(run / "starts.jsonl", "store_requests")
    assert rows and all(row["store_requests"] > 0 for row in rows)


def test_a_step_without_its_marker_is_no_step(folder, tmp_path, nowhere):
    """It is neither loaded nor in the way, and the next save of that step replaces it."""
    config = dataclasses.replace(tiny_config(tmp_path, 8, 2), output_dir=f"{folder}/run")
    straight = dataclasses.replace(config, output_dir=str(tmp_path / "straight"))
    train(straight)
    train(config, stop_after=4)
    run = as_path(config.output_dir)
    (run / "checkpoints" / "4" / MARKER).unlink()
    assert finished_steps(run) == [2] and RunFolder(run).step == 2
    with pytest.raises(FileNotFoundError, match="4: no finished checkpoint; the steps there are 2"):
        RunFolder(f"{run}/checkpoints/4")
    train(config)
    assert finished_steps(run) == [6, 8]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["6", "8"]
    assert differences(Path(straight.output_dir), run, 8) == []


def test_what_is_left_of_a_step_is_gone_before_steps_are_listed(gcs, folder):
    """orbax removes it in a thread, and fails if the folder vanishes while it lists it."""
    run = as_path(folder)
    (run / "checkpoints" / "4" / "params" / "_sharding").write_text("{}")
    gcs.faults(slow_removals=2)
    with CheckpointWriter(run, keep_last=2) as writer:
        assert not (run / "checkpoints").exists()
        assert writer.latest_step is None


@pytest.mark.parametrize("of", [as_path, epath.Path])  # the latter is orbax's
def test_a_removal_whose_answer_got_lost_has_succeeded(gcs, folder, of):
    as_path(f"{folder}/4/_sharding").write_text("{}")
    gcs.faults(lost_removals=1)
    of(f"{folder}/4").rmtree()
    assert gcs.faults()["lost_removals"] > 0 and not as_path(folder).exists()
    with pytest.raises(FileNotFoundError):
        epath.Path(f"{folder}/4").rmtree()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The config of an undisturbed run of two processes on the disk."""
    folder = tmp_path_factory.mktemp("straight")
    config = tiny_config(folder, STEPS, SAVE_EVERY)
    codes, outputs = finish(start(write_config(config, folder), 4))
    assert codes == [0, 0], "\n".join(outputs)
    return config


def in_bucket(config, folder):
    """Returns the config with data and run folder in a bucket."""
    texts = Path(config.data.meta).with_name("texts.jsonl").read_bytes()
    (as_path(folder) / "texts.jsonl").write_bytes(texts)
    meta = {"texts": {"root": folder, "annotation": f"{folder}/texts.jsonl"}}
    (as_path(folder) / "meta.json").write_text(json.dumps(meta))
    data = dataclasses.replace(config.data, meta=f"{folder}/meta.json")
    return dataclasses.replace(config, data=data, output_dir=f"{folder}/killed")


def test_two_processes_are_killed_inside_a_save(straight, gcs, folder, tmp_path, nowhere):
    """Some requests fail, some answers are cut, and some are late."""
    config = in_bucket(straight, folder)
    gcs.faults(**FAULTS)
    kills = [Kill("save", 4), Kill("step", 6)]
    undisturbed = Path(straight.output_dir)
    result = run_and_kill(config, tmp_path, kills, random.Random(0), 4, undisturbed)
    assert result["differences"] == [] and result["leftovers"] == []
    assert result["kills"][0]["inside_a_save"] and result["kills"][0]["saved"] == 0, result
    assert {*result["begun_at"]} <= {0, *(kill["saved"] for kill in result["kills"])}
    assert {"unavailable", "cut"} <= gcs.faults().keys()
    export = ["export", "--from", config.output_dir, "--to", f"{folder}/hf"]
    assert convert.main([*export, "--layout", "internvl-x", "--dtype", "keep"]) == 0
    assert convert.main(["import", "--from", f"{folder}/hf", "--to", f"{folder}/imported"]) == 0
    assert report.main([config.output_dir]) == 0
    rows = read_json_lines(as_path(config.output_dir) / "starts.jsonl", "store_requests_others")
    assert rows and all(row["store_requests"] > 0 for row in rows)
    assert all(row["store_requests_others"] > 0 for row in rows), rows


def test_two_processes_are_killed_while_a_checkpoint_is_copied(
    straight, s3_folder, tmp_path, nowhere
):
    """They go on from the copy on the disk, and without it from the one in the bucket."""
    stage, bucket = tmp_path / "stage", in_bucket(straight, s3_folder)
    config = dataclasses.replace(bucket, local_checkpoint_dir=str(stage))
    file = write_config(config, tmp_path)
    run = as_path(config.output_dir)
    happened = kill_at(run, Kill("save", 4), start(file, 4), random.Random(0))
    assert happened["inside_a_save"] and happened["saved"] == 0, happened
    codes, outputs = finish(start(file, 4, "--stop_after", "2"))
    assert codes == [0, 0], "\n".join(outputs)
    assert "going on from checkpoint 4 of" in outputs[0] and finished_steps(run) == [4, 6]
    shutil.rmtree(stage)  # as on another machine
    codes, outputs = finish(start(file, 4))
    assert codes == [0, 0], "\n".join(outputs)
    assert "fetched checkpoint 6 of" in outputs[0] and finished_steps(run) == [6, 8]
    assert differences(Path(straight.output_dir), run, STEPS) == []


@pytest.fixture(scope="module")
def start_seconds(tmp_path_factory):
    """What two processes take that are refused before they look at a bucket."""
    folder = tmp_path_factory.mktemp("refused")
    begun = time.monotonic()
    file = write_config(tiny_config(folder, STEPS, SAVE_EVERY), folder)
    finish(start(file, 1, "--set", "output_dir=gss://bucket/run"))
    return time.monotonic() - begun


@pytest.mark.parametrize(
    "output_dir, words",
    [
        ("gs://forbidden/run", "permission denied"),
        ("gs://absent/run", "there is no bucket gs://absent"),
        ("gs://expired/run", "the credentials are not valid or have expired"),
        ("gs://bucket/run", "needs gcsfs, which is not installed; pip install"),
        ("s3://bucket/run", "cannot be written to s3:// directly; set local_checkpoint_dir"),
        ("gss://bucket/run", "gss:// cannot be used here; use gs://, s3:// or a local path"),
    ],
)
def test_what_cannot_be_used_is_one_line_in_each_process(
    gcs, tmp_path, nowhere, monkeypatch, start_seconds, output_dir, words
):
    config = tiny_config(tmp_path, STEPS, SAVE_EVERY)
    file = write_config(dataclasses.replace(config, output_dir=str(tmp_path / "x")), tmp_path)
    if "gcsfs" in words:  # as if it were not there
        (tmp_path / "gcsfs.py").write_text("raise ModuleNotFoundError(name='gcsfs')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    begun = time.monotonic()
    codes, outputs = finish(start(file, 1, "--set", f"output_dir={output_dir}"), timeout=120)
    assert codes == [1, 1]
    assert time.monotonic() - begun < start_seconds + 30
    for output in outputs:
        lines = [line for line in output.splitlines() if "Gloo" not in line]
        assert lines[-1].startswith("error: ") and words in lines[-1], output
        assert len([line for line in lines if "error" in line]) == 1
        assert "Traceback" not in output


PEERS = """import sys, time, jax
from internvlx_jax.cli.console import run_command
from internvlx_jax.training.peers import ending_together

process = int(sys.argv[2])
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, process)
jax.devices()

def work():
    with ending_together():
        if process == int(sys.argv[3]):
            raise OSError("the disk of this host has failed")
        time.sleep(300)  # as in a collective

sys.exit(run_command(work))
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_no_process_waits_for_one_that_has_failed(tmp_path, failing):
    """The others end, too, each with one line, before jax would miss it."""
    (tmp_path / "work.py").write_text(PEERS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(tmp_path / "work.py"), port]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(n), str(failing)], **pipes) for n in (0, 1)]
    codes, outputs = finish(processes, timeout=90)
    assert codes == [1, 1], outputs
    said = [[line for line in text.splitlines() if "error:" in line] for text in outputs]
    assert said[failing] == ["error: the disk of this host has failed"]
    assert said[1 - failing] == [
        f"error: stopped because of process {failing}: OSError: the disk of this host has failed"
    ]


def test_a_run_in_a_bucket_is_locked(folder, tmp_path, nowhere):
    from internvlx_jax.checkpoints.run_lock import RunLock
    from internvlx_jax.core.errors import ConfigError

    with (
        RunLock(as_path(folder), beat=0.2) as lock,
        pytest.raises(ConfigError, match="in use by process"),
        RunLock(as_path(folder)),
    ):
        pass
    lock.check()
    assert not as_path(folder).exists()


def test_lines_are_kept_in_segments(folder, monkeypatch):
    from internvlx_jax.core import line_log

    monkeypatch.setattr(line_log, "SEGMENT_BYTES", 20)
    path = as_path(f"{folder}/x.jsonl")
    log = line_log.LineLog(path)
    for number in range(9):
        log.append([b"line %d\n" % number])
        log.flush()
    assert len(line_log.segments(path)) == 3
    assert read_whole(path) == b"".join(b"line %d\n" % number for number in range(9))
    again = line_log.LineLog(path)
    again.keep(lambda line: int(line.split()[1]) < 5)
    again.append([b"line 5\n"])
    again.close()
    assert read_whole(path) == b"".join(b"line %d\n" % number for number in range(6))
    assert sys.modules["internvlx_jax.core.line_log"].holds_lines(path)
