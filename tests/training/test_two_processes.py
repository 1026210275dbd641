"""Two processes with 4 devices each run train.py (training.md 10, 13).

They are killed, get SIGTERM, resume on other devices and miss a peer.
"""

import dataclasses
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_run
import numpy as np
import pytest
from kill_run import (
    Kill,
    differences,
    finish,
    logged,
    run_and_kill,
    start,
    tiny_config,
    write_config,
)

from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.training.loop import train
from internvlx_jax.training.preemption import EXIT_STATUS

pytestmark = pytest.mark.slow

STEPS, SAVE_EVERY = 16, 4


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run in two processes -> its config, and the output of each."""
    folder = tmp_path_factory.mktemp("two")
    config = tiny_config(folder, STEPS, SAVE_EVERY)
    codes, outputs = finish(start(write_config(config, folder), 4))
    assert codes == [0, 0], "\n".join(outputs)
    return config, outputs


def beside(config, name, **changes):
    return dataclasses.replace(
        config, output_dir=str(Path(config.output_dir).with_name(name)), **changes
    )


def test_the_first_process_speaks(straight):
    config, outputs = straight
    assert f"step {STEPS}/{STEPS}" in outputs[0] and "step" not in outputs[1]
    assert len(logged(Path(config.output_dir))) == STEPS


def test_kill_9_changes_no_bit(straight):
    """Kills come at a step and inside saves; kill_run.py does this ten times over 200 steps."""
    config, _ = straight
    kills = [Kill("save", 4), Kill("step", 7), Kill("save", 12)]
    killed = beside(config, "killed")
    result = run_and_kill(
        killed, Path(config.output_dir).parent, kills, random.Random(0), 4, Path(config.output_dir)
    )
    assert result["differences"] == [] and result["starts"] >= 3
    assert any(happened["inside_a_save"] for happened in result["kills"]), result


def test_differences_are_seen(straight, tmp_path):
    """What the test above relies on: another learning rate changes arrays and metrics."""
    config, _ = straight
    other = dataclasses.replace(config, output_dir=str(tmp_path / "other"), seed=1)
    train(other)
    found = differences(Path(config.output_dir), tmp_path / "other", STEPS)
    assert "params decoder.head" in found and "metrics of step 16" in found


def test_sigterm_to_one_ends_both_and_one_process_goes_on(straight):
    """Both save at a step that both reach.

    A process with 8 devices and another mesh takes the same data from there.
    """
    config, _ = straight
    told = beside(config, "told")
    run = Path(told.output_dir)
    processes = start(write_config(told, run.parent), 4)
    try:
        kill_after = time.monotonic() + 300
        while not logged(run) and time.monotonic() < kill_after and processes[1].poll() is None:
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        codes, outputs = finish(processes)
    assert codes == [EXIT_STATUS] * 2, "\n".join(outputs)
    saved = RunFolder(run).step
    assert 0 < saved < STEPS and f"saved at step {saved}" in outputs[0]

    # Told while it starts: the run stops after its first step, whose number is no longer 1.
    processes = start(write_config(told, run.parent), 4)
    try:
        kill_after = time.monotonic() + 300
        while not (run / "lock.json").exists() and time.monotonic() < kill_after:
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        codes, outputs = finish(processes)
    assert codes == [EXIT_STATUS] * 2, "\n".join(outputs)
    assert RunFolder(run).step == saved + 1

    train(dataclasses.replace(told, mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    for ours, theirs in zip(logged(run), logged(Path(config.output_dir)), strict=True):
        assert ours["supervised_tokens_per_s"] > 0
        for name in ("loss", "grad_norm", "learning_rate"):
            np.testing.assert_allclose(
                ours[name], theirs[name], rtol=1e-3, err_msg=f"{name} of step {ours['step']}"
            )


def test_ctrl_c_in_the_terminal_of_both_saves_one_step(straight, request):
    """A terminal sends SIGINT to every process; they agree on a step as with one SIGTERM."""
    # A shell lets its background jobs ignore Ctrl-C, and their children inherit it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    config, _ = straight
    told = beside(config, "interrupted")
    run = Path(told.output_dir)
    processes = start(write_config(told, run.parent), 4)
    try:
        kill_after = time.monotonic() + 300
        while not logged(run) and time.monotonic() < kill_after and processes[1].poll() is None:
            time.sleep(0.01)
        for process in processes:
            process.send_signal(signal.SIGINT)
    finally:
        codes, outputs = finish(processes)
    assert codes == [EXIT_STATUS] * 2, "\n".join(outputs)
    saved = RunFolder(run).step
    for output in outputs:
        assert f"stopped by Ctrl-C: saved at step {saved}" in output and "Traceback" not in output
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == str(saved)
    assert not (run / "lock.json").exists()


def test_a_missing_process_is_named(straight):
    config, _ = straight
    file = write_config(config, Path(config.output_dir).parent)
    command = [
        sys.executable,
        kill_run.ROOT / "train.py",
        "--config",
        file,
        "--coordinator",
        "localhost",
        "--port",
        "0",
    ]
    done = subprocess.run(
        [*command, "--num_processes", "3", "--process_id", "0", "--timeout", "1"],
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert (
        done.returncode == 1
        and "processes 1, 2 of 3 did not come to localhost:0 within 1 s" in done.stderr
    )
