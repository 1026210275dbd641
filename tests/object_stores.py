"""Object stores on the loopback interface, for tests in this process and in others."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import fsspec
import pytest

SERVER = Path(__file__).with_name("gcs_server.py")
FAULTS = {"unavailable": 0.05, "cut": 0.02, "stall": 0.02, "seconds": 1}


class Gcs:
    """A running server of gs://bucket.

    Attributes:
        environment: Variables that lead all clients to it.
    """

    def __init__(self, port: str):
        self.address = f"http://127.0.0.1:{port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def faults(self, **shares: float) -> dict[str, int]:
        """Injects these from now on; returns what was counted until now."""
        request = urllib.request.Request(
            self.address + "/_faults", json.dumps(shares).encode(), method="PUT"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@contextlib.contextmanager
def running_gcs():
    """Runs the server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield Gcs(process.stdout.readline().strip())
    process.communicate("\n")


@pytest.fixture(scope="session")
def gcs_server():
    with running_gcs() as server:
        yield server


@pytest.fixture
def gcs(gcs_server, monkeypatch):
    """The server, also for this process."""
    for name, value in gcs_server.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    yield gcs_server
    gcs_server.faults()
    fsspec.get_filesystem_class("gs").clear_instance_cache()


@pytest.fixture
def folder(gcs):
    """A folder of the bucket that nothing else writes to."""
    return f"gs://bucket/{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def s3_server():
    """Environment variables that lead all clients to a server of s3://bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            bucket = urllib.request.Request(f"{address}/bucket", method="PUT")
            urllib.request.urlopen(bucket, timeout=60).close()
            break
        except OSError:  # it is not up yet
            assert process.poll() is None
            time.sleep(0.1)
    yield {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    process.kill()
    process.wait()


@pytest.fixture
def s3_folder(s3_server, monkeypatch):
    """A folder of s3://bucket that nothing else writes to."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield f"s3://bucket/{uuid.uuid4().hex[:8]}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
