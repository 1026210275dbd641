"""Object stores on the loopback interface, for tests in this process and in others."""

import json
import subprocess
import sys
import urllib.request
import uuid
from pathlib import Path

import fsspec
import pytest

SERVER = Path(__file__).with_name("gcs_server.py")


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


@pytest.fixture(scope="session")
def gcs_server():
    process = subprocess.Popen(
        [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield Gcs(process.stdout.readline().strip())
    process.communicate("\n")


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
