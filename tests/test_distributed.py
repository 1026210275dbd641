"""Processes of several hosts find each other and name the missing (design: training.md 12)."""

import argparse
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from jax._src.clusters import cloud_tpu_cluster

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.training import distributed
from internvlx_jax.training.distributed import ProcessInfo, find_process, wait_for_peers


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def roll(port, *process_ids, processes=3, timeout=1.0):
    """Returns what each of these processes gets from wait_for_peers: None or its error."""

    def one(process):
        try:
            wait_for_peers(
                ProcessInfo(coordinator=f"localhost:{port}", processes=processes, process=process),
                timeout,
            )
        except (ConfigError, OSError) as error:
            return error

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, process_ids))


def test_all_are_there(port):
    assert roll(port, 2, 1, 0, timeout=20) == [None, None, None]
    assert roll(port, 0, 1, 2, timeout=20) == [None, None, None], "the port is free again"


def test_missing_processes_are_named_by_those_who_are_there(port):
    for error in roll(port, 0, 2, 4, processes=6):
        assert isinstance(error, TimeoutError)
        assert f"processes 1, 3, 5 of 6 did not come to localhost:{port} within 1 s" in str(error)
    (error,) = roll(port, 0, processes=40, timeout=0.1)
    assert "15, 16 and 23 more of 40" in str(error)


def test_a_missing_first_process_is_named(port):
    (error,) = roll(port, 1)
    assert isinstance(
        error, TimeoutError
    ) and f"process 0 does not answer at localhost:{port}" in str(error)


def test_contradictions_are_told_to_all(port):
    errors = roll(port, 0, 1, 1, timeout=20)
    assert all("two processes were started as process 1" in str(error) for error in errors)

    def other():
        with pytest.raises(
            ConfigError, match="process 1 was started with 4 processes, process 0 with 3"
        ):
            wait_for_peers(ProcessInfo(coordinator=f"localhost:{port}", processes=4, process=1), 20)

    thread = threading.Thread(target=other)
    thread.start()
    (error,) = roll(port, 0, timeout=20)
    thread.join()
    assert isinstance(error, ConfigError)


def test_strangers_and_restarted_processes_do_not_disturb(port):
    """Strangers and restarts are ignored.

    A connection says nothing sensible, and a process is killed while it waits and comes again.
    """
    with ThreadPoolExecutor() as pool:
        all_three = pool.submit(roll, port, 0, processes=3, timeout=20)
        for words in (
            b"PRI * HTTP/2.0\r\n",
            json.dumps({"process": 1, "processes": 3}).encode() + b"\n",
        ):
            while True:
                try:
                    stranger = socket.create_connection(("localhost", port))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
            with stranger:
                stranger.sendall(words)
        second = pool.submit(roll, port, 2, timeout=20)
        time.sleep(0.5)  # all numbers have come once, but the first process of number 1 is gone
        assert roll(port, 1, timeout=20) + second.result() + all_three.result() == [None] * 3


def test_a_port_in_use(port):
    with socket.create_server(("localhost", port)):
        (error,) = roll(port, 0)
    assert f"cannot listen on port {port}" in str(error)


def place(*flags):
    parser = argparse.ArgumentParser()
    distributed.add_flags(parser)
    args = parser.parse_args(flags)
    return find_process(
        args.coordinator, args.port, args.num_processes, args.process_id, args.timeout
    )


def test_explicit_flags():
    expected = ProcessInfo(coordinator="host:1234", processes=4, process=3)
    assert (
        place("--coordinator", "host:1234", "--num_processes", "4", "--process_id", "3") == expected
    )
    assert (
        place(
            "--coordinator", "host", "--port", "1234", "--num_processes", "4", "--process_id", "3"
        )
        == expected
    )
    assert ProcessInfo(coordinator="[::1]:80", processes=1, process=0).address == ("::1", 80)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_processes", "2"], "need --coordinator HOST:PORT"),
        (["--process_id", "1"], "need --coordinator HOST:PORT"),
        (["--coordinator", "host:1"], "needs --num_processes and --process_id"),
        (["--coordinator", "host", "--num_processes", "2", "--process_id", "0"], "has no port"),
        (
            ["--coordinator", "host:1", "--port", "2", "--num_processes", "2", "--process_id", "0"],
            "different ports",
        ),
        (["--coordinator", "host:1", "--num_processes", "2", "--process_id", "2"], "not in 0 to 1"),
        (["--coordinator", "auto"], "neither SLURM .* nor Cloud TPU"),
    ],
    ids=[
        "count alone",
        "number alone",
        "incomplete",
        "no port",
        "two ports",
        "number too large",
        "no cluster",
    ],
)
def test_flags_that_make_no_job(flags, message):
    with pytest.raises(ConfigError, match=message):
        place(*flags)


def test_slurm_is_found(monkeypatch):
    """Inside srun; the same variables in a job of one process start nothing."""
    assert place() is None
    for name, value in {
        "JOB_ID": "4097",
        "STEP_NODELIST": "gpu[007-008],x3",
        "NTASKS": "16",
        "PROCID": "9",
        "LOCALID": "1",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = place()
    assert (found.processes, found.process, found.devices) == (16, 9, [1])
    assert found.address == ("gpu007", 61441)
    assert place("--port", "1234").address == ("gpu007", 1234)
    assert place("--num_processes", "1") is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert place() is None and place("--coordinator", "auto") is None


def test_cloud_tpu_slices_are_found(monkeypatch):
    """As GKE describes them: the second host of the second slice of two."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "a,b",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    }.items():
        monkeypatch.setenv(name, value)
    assert place() == ProcessInfo(coordinator="localhost:8482", processes=4, process=3)
