"""Gives every test eight CPU devices, and the data that several files of tests share.

Third-party data are optional outside CI and never silently absent.
"""

import os
import tempfile
from importlib.metadata import version

# XLA sizes its thread pool by NPROC: 8 devices deadlock in the pool of a machine with 2 cores.
os.environ.setdefault("NPROC", "16")
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation: compile cheaply, and each program of one device once per
# session, subprocesses included.
os.environ["JAX_OPTIMIZATION_LEVEL"] = "O0"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers take that of the process that starts them
    CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
    os.environ["INTERNVLX_COMPILE_CACHE"] = CACHE.name
    COPIES = tempfile.TemporaryDirectory(prefix="internvlx-cache-")
    os.environ["INTERNVLX_CACHE"] = COPIES.name  # not that of the user
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
)
if version("jaxlib").startswith("0.10."):  # later ones do not know it
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
else:  # with the cache on, XLA has crashed while it compiled
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import logging
from pathlib import Path

import jax
import pytest
from jax._src import compilation_cache
from object_stores import folder, gcs, gcs_server, s3_folder, s3_server  # noqa: F401 (fixtures)

jax.config.update("jax_compilation_cache_dir", os.environ["INTERNVLX_COMPILE_CACHE"])

GOLDEN = Path(__file__).parent / "golden"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def programs_of_several_devices_stay_in_memory():
    """Keeps them in JAX's cache for this process only: what is read back from files may hang.

    XLA:CPU loses the order of the collectives on the way (design: platform.md 6).
    """
    kept = {}
    put, get = compilation_cache.put_executable_and_time, compilation_cache.get_executable_and_time

    def put_by_devices(key, name, executable, backend, seconds):
        if len(executable.local_devices()) > 1:
            kept[key] = executable, seconds
        else:
            put(key, name, executable, backend, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation_cache, "put_executable_and_time", put_by_devices)
        patch.setattr(
            compilation_cache,
            "get_executable_and_time",
            lambda key, *args: kept[key] if key in kept else get(key, *args),
        )
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    """Returns the folder of measured inputs and outputs of the original PyTorch model."""
    return GOLDEN


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Returns the third-party sample data beside the checkout, which are required under CI=true."""
    if SHARED_DATA.is_dir():
        return SHARED_DATA
    message = f"third-party sample data not found at {SHARED_DATA}"
    if os.environ.get("CI") == "true":
        pytest.fail(message + " (required under CI=true)")
    pytest.skip(message)


def pytest_collection_modifyitems(items):
    """Puts files with slow tests first, the longest ahead: no worker is left alone with one."""
    minutes = {
        item.path: marker.kwargs.get("minutes", 1)
        for item in items
        if (marker := item.get_closest_marker("slow"))
    }
    items.sort(key=lambda item: -minutes.get(item.path, 0))


@pytest.fixture(autouse=True)
def log_of_the_package():
    """Undoes what a command that ran inside a test has done to the package's logger."""
    yield
    logger = logging.getLogger("internvlx_jax")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
