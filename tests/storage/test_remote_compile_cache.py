"""A compile cache behind gs://, by this package or by jax (design: platform.md 9)."""

import os
import subprocess
import sys

import pytest

from internvlx_jax.core.paths import as_path

PROGRAM = """
import jax, jax.monitoring, jax.numpy as jnp
from internvlx_jax.models.compile_cache import keep_compiled
keep_compiled()
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event.rpartition("/")[2]))
jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((4, 4))).block_until_ready()
print(found.count("cache_misses"), found.count("cache_hits"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["INTERNVLX_COMPILE_CACHE", "JAX_COMPILATION_CACHE_DIR"])
def test_a_second_start_compiles_nothing(variable, gcs, folder, tmp_path):
    others = {name: each for name, each in os.environ.items() if "COMPIL" not in name}
    environment = others | {
        **gcs.environment,
        variable: f"{folder}/cache",
        "XLA_FLAGS": "",  # one device: several of a CPU keep nothing
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start() -> list[int]:
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        return list(map(int, run.stdout.split()))

    misses, hits = start()
    assert misses > 0 == hits
    assert start() == [0, misses]
    assert any(path.name.startswith("jit_") for path in as_path(f"{folder}/cache").iterdir())
    assert list(tmp_path.iterdir()) == [], "nothing makes a local folder out of the URL"
