"""Eight CPU devices for every test; third-party data is optional outside CI and never silently absent."""

import os
import tempfile
from importlib.metadata import version

os.environ.setdefault(
    "NPROC", "16"
)  # a bigger XLA thread pool: 8 devices on 2 cores deadlock otherwise
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation: compile cheaply, and each program once a session, subprocesses included.
os.environ["JAX_OPTIMIZATION_LEVEL"] = "O0"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers take that of the process that starts them
    CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
)
if version("jaxlib").startswith("0.10."):  # later ones do not know it
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import logging
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Measured inputs and outputs of the original PyTorch model, committed under tests/golden."""
    return GOLDEN


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Third-party sample data beside the checkout (never committed). Required under CI=true."""
    if SHARED_DATA.is_dir():
        return SHARED_DATA
    message = f"third-party sample data not found at {SHARED_DATA}"
    if os.environ.get("CI") == "true":
        pytest.fail(message + " (required under CI=true)")
    pytest.skip(message)


@pytest.fixture(autouse=True)
def log_of_the_package():
    """Undoes what a command that ran inside a test has done to the package's logger."""
    yield
    logger = logging.getLogger("internvlx_jax")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
