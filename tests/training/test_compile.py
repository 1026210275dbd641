"""Reports about steps that were only compiled: buckets, topologies, figures (platform.md 2).

A gate keeps the memory and the collectives of two presets from growing.
"""

import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from internvlx_jax.aot.compile_report import bounding_buckets, check_fits, compile_report, table
from internvlx_jax.aot.dry_run import dry_run
from internvlx_jax.aot.topologies import Topology, topology
from internvlx_jax.core.chips import CHIPS
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.overrides import load_config_file
from internvlx_jax.core.run_config import ComputeConfig
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.flops import train_flops
from internvlx_jax.models.sharding import make_mesh
from internvlx_jax.training.data import open_loaders
from internvlx_jax.training.executables import peak_bytes
from internvlx_jax.training.loop import train
from internvlx_jax.training.setup import prepare

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
GATE = Path(__file__).with_name("compile_gate.json")
GROWTH = 1.05


def test_bounding_buckets():
    hd = load_config_file(CONFIGS / "hd_finetune.py")
    assert bounding_buckets(hd.data, hd.model) == [
        Bucket(0, 4096),
        Bucket(1, 4096),
        Bucket(7, 4096),
    ]
    paper = load_config_file(CONFIGS / "hd_finetune.py:lvtc=paper")
    assert bounding_buckets(paper.data, paper.model)[-1] == Bucket(7, 8192, 8192 - 7 * 768)
    plain = load_config_file(CONFIGS / "finetune.py")
    assert bounding_buckets(plain.data, plain.model) == [Bucket(0, 4096), Bucket(1, 4096)]
    packed = dataclasses.replace(hd.data, batch_mode="pack", max_length=16384)
    assert bounding_buckets(packed, hd.model) == [Bucket(64, 16384)]


@pytest.mark.parametrize("name", ["v5e", "v7x:2x2", "v5e:2xb", "", "16x16"])
def test_names_of_topologies(name):
    with pytest.raises(ConfigError, match="expected CHIP:AxB"):
        topology(name)


@pytest.fixture(scope="module")
def one_bucket(run_in, tmp_path_factory):
    """The tiny run in one bucket; all tests compile the same step."""
    config = run_in(
        tmp_path_factory.mktemp("one") / "run", compute=ComputeConfig(dtype="float32", remat="full")
    )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_executables=1))


@pytest.fixture(scope="module")
def described(one_bucket):
    """Its report on eight CPU devices, told to be v5e chips."""
    config, mesh = one_bucket, make_mesh(one_bucket.mesh)
    where = FastNetwork("eight", CHIPS["v5e"], CHIPS["v5e"].memory, mesh.devices.flat)
    plan = open_loaders(config, config.model, Tokenizer.load(config.data.tokenizer), mesh, None)[
        0
    ].plan
    setup = prepare(config, config.model, mesh, config.steps)
    return (
        setup,
        where,
        *plan.buckets,
        *plan.rows,
        *compile_report(setup, plan.buckets, plan.rows, where),
    )


class FastNetwork(Topology):
    def bandwidth(self, group):
        return 1e12


def test_figures_of_a_report(described):
    setup, _, bucket, rows, report = described
    assert (report.tiles, report.length, report.batch) == (
        bucket.tiles,
        bucket.length,
        rows,
    ) and rows >= 8
    flops = train_flops(
        setup.model,
        {path: leaf.shape for path, leaf in setup.state.trainable.items()},
        tiles=rows * bucket.tiles,
        lengths=[bucket.length] * rows,
    )
    assert report.flops["total"] == pytest.approx(flops.total / 8)
    assert sum(
        report.flops[part] for part in ("tower", "projector", "decoder", "head")
    ) == pytest.approx(flops.total / 8)
    assert {"all-gather", "all-reduce"} <= report.collectives.keys()
    assert report.peak_hbm_bytes >= report.argument_bytes > 0
    assert report.roofline_ms == max(report.compute_ms, report.memory_ms, report.network_ms)
    assert report.roofline_mfu == pytest.approx(
        report.flops["total"] / 197e12 / (report.roofline_ms / 1e3)
    )
    assert report.compute_ms / 1e3 > report.flops["total"] / 197e12, (
        "what remat computes again takes time, and is no use"
    )


def test_the_peak_counts_results_and_temporaries():
    matrix = jax.ShapeDtypeStruct((256, 256), jnp.float32)

    def step(state):
        product = jnp.tanh(state["matrix"] @ state["matrix"]) @ state["matrix"]
        return {"matrix": product, "count": state["count"] + 1}, product.sum()

    state = {"matrix": matrix, "count": jax.ShapeDtypeStruct((), jnp.int32)}
    for donated in ((), 0):
        compiled = jax.jit(step, donate_argnums=donated).lower(state).compile()
        # The matrix, its product and the result; a donated matrix is read until the last product.
        assert 3 <= peak_bytes(compiled) / (256 * 256 * 4) <= 5


def test_what_does_not_fit_says_what_to_change(described):
    _, where, *_, report = described
    small = dataclasses.replace(where, memory=report.peak_hbm_bytes - 1)
    with pytest.raises(
        ConfigError, match=r"1 of 1 buckets do not fit.*compute\.remat.*fewer rows.*mesh\.fsdp"
    ):
        check_fits([report], small)
    check_fits([report], dataclasses.replace(where, memory=report.peak_hbm_bytes))


def test_a_run_that_does_not_fit_does_not_start(one_bucket, monkeypatch):
    monkeypatch.setattr("internvlx_jax.training.executables.device_memory", lambda device: 1000)
    with pytest.raises(
        ConfigError, match=r"does not fit the memory of a device; change one of: compute\.remat"
    ):
        train(one_bucket)
    assert not Path(one_bucket.output_dir).exists(), "another try is free to change the settings"


def test_dry_run_writes_nothing(one_bucket):
    where, reports, mesh = dry_run(one_bucket)
    assert len(reports) == 1
    printed = table(reports, where, mesh)
    assert "peak GiB" in printed and "8 devices, data 2 x fsdp 2 x tensor 2" in printed
    assert not Path(one_bucket.output_dir).exists()


GATED = ("hd_finetune.py:size=2b", "hd_finetune.py:size=8b,lvtc=paper")


@pytest.mark.slow
@pytest.mark.parametrize("name", GATED)
def test_memory_and_collectives_do_not_grow(name, tmp_path):
    """Two presets are compiled for TPUs that are not attached.

    After an intended change, write what this prints into compile_gate.json. The figures are the
    compiler's, so its version is a part of the key.
    """
    assert (platform.system(), platform.machine()) == ("Linux", "x86_64"), (
        "libtpu, the compiler, is for Linux on x86-64"
    )
    out = tmp_path / "report.json"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "internvlx_jax.training.compile",
            "--config",
            f"configs/{name}",
            "--topology",
            "v5e:8x8",
            "--set",
            "data.samples_per_step=64",
            "--tiles",
            "7",
            "--out",
            str(out),
        ],
        check=True,
        cwd=ROOT,
    )
    (bucket,) = json.loads(out.read_text())["buckets"]
    now = {
        "peak_hbm_bytes": bucket["peak_hbm_bytes"],
        "collective_bytes": sum(each["bytes"] for each in bucket["collectives"].values()),
    }
    recorded = json.loads(GATE.read_text())
    version = ".".join(jax.__version__.split(".")[:2])
    allowed = recorded.get(version, recorded[max(recorded)])[name]
    print(json.dumps({version: {name: now}}))
    for figure, value in now.items():
        assert value <= GROWTH * allowed[figure], (
            f"{figure} {value:.4g}, recorded {allowed[figure]:.4g}"
        )
