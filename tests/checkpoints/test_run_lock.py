"""One run at a time in a run folder, and locks that a killed run leaves behind (training.md 10)."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from internvlx_jax.checkpoints import run_lock
from internvlx_jax.checkpoints.run_lock import LOCK, RunLock, refuse_if_used
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.lock_file import LocalLockFile, TakenError

HOLDER = """
import sys, time
from pathlib import Path
from internvlx_jax.checkpoints.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_in_one_line_and_a_killed_one_is_replaced(holder, tmp_path):
    run = tmp_path / "run"
    before = (run / LOCK).read_bytes()
    for refused in (lambda: RunLock(run).__enter__(), lambda: refuse_if_used(run)):
        with pytest.raises(ConfigError) as error:
            refused()
        message = str(error.value)
        assert f"in use by process {holder.pid} on host" in message and "\n" not in message
        assert str(run) in message
    assert (run / LOCK).read_bytes() == before

    holder.send_signal(signal.SIGKILL)
    while run_lock._process_started(holder.pid) is not None:  # until it is a zombie
        time.sleep(0.01)
    with RunLock(run):
        assert json.loads((run / LOCK).read_text())["process"] == os.getpid()
    assert list(run.iterdir()) == []


def elsewhere(run, beat=0):
    """Makes the lock look like one of another machine."""
    owner = run_lock._this_process() | {"machine": "another", "host": "pod-3", "process": 7}
    (run / LOCK).write_text(json.dumps(owner | {"beat": beat}))


def test_an_owner_on_another_host_is_watched(tmp_path):
    """It is dead if its counter stands still, and alive as soon as that moves."""
    elsewhere(tmp_path)
    with RunLock(tmp_path, patience=0.3) as lock:
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        lock.check()

    elsewhere(tmp_path)
    beating = threading.Timer(0.3, elsewhere, (tmp_path, 1))
    beating.start()
    with pytest.raises(ConfigError, match="in use by process 7 on host pod-3, since 20"):
        refuse_if_used(tmp_path, patience=20)
    beating.join()


def test_a_run_that_stood_still_notices_that_it_was_replaced(tmp_path):
    with RunLock(tmp_path, beat=0.01) as lock:
        elsewhere(tmp_path)
        end = time.monotonic() + 20
        while not lock._lost and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(ConfigError, match="was taken over by another run"):
            lock.check()
    assert json.loads((tmp_path / LOCK).read_text())["process"] == 7  # it is not ours to remove


def test_of_many_that_start_together_one_gets_the_lock(tmp_path):
    file = LocalLockFile(tmp_path / LOCK)
    file.write("stale", None)
    won, start = [], threading.Barrier(16)

    def take(name):
        start.wait()
        try:
            LocalLockFile(tmp_path / LOCK).write(name, "stale")
            won.append(name)
        except TakenError:
            pass

    threads = [threading.Thread(target=take, args=(f"run {n}",)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and file.read() == (won[0], won[0])
    file.remove("another")
    assert file.read() is not None
    file.remove(won[0])
    assert file.read() is None


def test_a_full_disk_takes_no_lock_from_its_owner(tmp_path, monkeypatch):
    """Neither is its content lost, nor does one that could not be written stay."""
    write = os.pwrite

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunLock(tmp_path / "run", beat=0.01) as lock:
        before = (tmp_path / "run" / LOCK).read_text()
        monkeypatch.setattr(os, "pwrite", full)
        time.sleep(0.1)
        lock.check()
        assert json.loads((tmp_path / "run" / LOCK).read_text())["token"] in before
        monkeypatch.setattr(os, "pwrite", write)
        time.sleep(0.1)
        lock.check()
    assert not (tmp_path / "run").exists(), "it was made for the lock"
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device, .* free: .*new/lock.json"):
        RunLock(tmp_path / "new").__enter__()
    assert not (tmp_path / "new").exists()
