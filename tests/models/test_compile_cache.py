"""Compiled programs are kept, for several processes (design: platform.md 9)."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.uploads import cache_folder
from internvlx_jax.models import compile_cache
from internvlx_jax.models.compile_cache import MOST_BYTES, VARIABLE, keep_compiled

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)
ONE_DEVICE = {
    "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
    "JAX_ENABLE_COMPILATION_CACHE": "true",
}
# Compiles some programs, with every warning of the cache an error, and counts what was found.
PROGRAM = """
import json, warnings
import jax, jax.numpy as jnp
from jax._src import monitoring
from internvlx_jax.models.compile_cache import keep_compiled

found = []
monitoring.register_event_listener(lambda event, **_: found.append(event.rpartition("/")[2]))
keep_compiled()
warnings.simplefilter("error")
for n in range(8):
    total = jax.jit(lambda x: jnp.tanh(x @ x.T).sum())(jnp.ones((n + 8, 8))).item()
print(json.dumps({"hits": found.count("cache_hits"), "misses": found.count("cache_misses")}))
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """JAX as a user has it: one device, no cache, and a cache folder that is not theirs."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("INTERNVLX_CACHE", str(tmp_path / "caches"))
    monkeypatch.delenv(VARIABLE, raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr(compile_cache, "may_hang_when_read_back", lambda: False)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def start(environment, **changes):
    environment = {**os.environ, **ONE_DEVICE, **environment, **changes}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True
    )


def counts(process):
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(shown)


def test_two_processes_share_one(tmp_path):
    """Both at once, without a fault; a third finds all programs of either."""
    place = {VARIABLE: str(tmp_path / "cache")}
    for process in [start(place), start(place)]:
        told = counts(process)
        assert told["hits"] + told["misses"] >= 8
    told = counts(start(place))
    assert told["misses"] == 0 and told["hits"] >= 8


def test_a_url(tmp_path, gcs, folder):
    place = {**gcs.environment, VARIABLE: f"{folder}/cache"}
    assert counts(start(place))["misses"] >= 8
    assert counts(start(place))["misses"] == 0


def test_the_folder(fresh):
    assert keep_compiled() == fresh / "caches" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(fresh / "caches" / "compiled")
    assert jax.config.jax_compilation_cache_max_size == MOST_BYTES
    assert keep_compiled() is None  # set already


def test_several_devices_of_a_cpu_keep_nothing(fresh, monkeypatch):
    """XLA forgets the order of collectives in what it reads back, and devices deadlock."""
    monkeypatch.undo()
    monkeypatch.setenv(VARIABLE, str(fresh / "mine"))
    assert len(jax.devices()) == 8 and compile_cache.may_hang_when_read_back()
    assert keep_compiled() is None and jax.config.jax_compilation_cache_dir is None


def test_the_switch_and_settings_of_jax(fresh, monkeypatch):
    monkeypatch.setenv(VARIABLE, "off")
    assert keep_compiled() is None and jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv(VARIABLE, str(fresh / "mine"))
    jax.config.update("jax_compilation_cache_dir", str(fresh / "jax"))
    assert keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir == str(fresh / "jax")


def test_the_folder_of_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("INTERNVLX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "internvlx_jax"


def test_what_a_killed_process_left_is_dropped(fresh):
    place = fresh / "caches" / "compiled"
    place.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (place / name).write_bytes(b"12345678")
    keep_compiled()
    assert {path.name for path in place.glob("*-*")} == {"whole-cache", "whole-atime"}


def test_a_folder_that_cannot_be_made_is_told(fresh, monkeypatch, caplog):
    (fresh / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(fresh / "file" / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keep_compiled() is None
    assert VARIABLE in caplog.text and jax.config.jax_compilation_cache_dir is None


def test_a_url_of_another_kind_is_refused(fresh, monkeypatch):
    monkeypatch.setenv(VARIABLE, "ftp://host/cache")
    with pytest.raises(ConfigError, match="use gs://"):
        keep_compiled()


def test_this_suite_reads_no_program_of_several_devices_back():
    def of_several(x):
        return x.sum()

    def of_one(x):
        return x.sum()

    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    jax.jit(of_several)(jax.device_put(jnp.ones(8), everywhere)).block_until_ready()
    jax.jit(of_one)(jnp.ones(8)).block_until_ready()
    kept = [path.name for path in Path(jax.config.jax_compilation_cache_dir).iterdir()]
    of_one_is_kept = any(name.startswith("jit_of_one-") for name in kept)
    assert of_one_is_kept == jax.config.jax_enable_compilation_cache
    assert not any(name.startswith("jit_of_several-") for name in kept)
