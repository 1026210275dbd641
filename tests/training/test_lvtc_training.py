"""LVTC in the training step: sharding, collectives, memory, executables (lvtc.md 6: 5 and 8)."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from internvlx_jax.core.model_config import LvtcConfig
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.data.batch import Row, collate
from internvlx_jax.data.buckets import Bucket, smallest_bucket
from internvlx_jax.models.params import abstract_model, init_params
from internvlx_jax.models.sharding import (
    activation_shardings,
    batch_sharding,
    make_mesh,
    param_shardings,
    placed,
)
from internvlx_jax.training.loop import train
from internvlx_jax.training.step import loss_and_grads

LVTC = LvtcConfig(expand_layer=1, low_grid=2, high_grid=4, gate=0.3, inject_layers=(2,))


@pytest.fixture(scope="module")
def deeper(tiny):
    """`tiny` with three decoder layers, so that there is a layer to inject before."""
    return dataclasses.replace(tiny, decoder=dataclasses.replace(tiny.decoder, layers=3))


def make_batch(config, rows=8, tiles=2, text=40):
    """Rows of 0, 1 and 2 tiles in one bucket."""
    per_tile, lvtc = config.tokens_per_tile, config.lvtc
    generator, made = np.random.default_rng(0), []
    bucket = Bucket(
        tiles, text + tiles * per_tile, 0 if lvtc is None else text + tiles * lvtc.low_grid**2
    )
    for row in range(rows):
        used = row % (tiles + 1)
        tokens = generator.integers(10, 600, text + used * per_tile).astype(np.int32)
        made.append(
            Row(
                tokens,
                tokens,
                np.arange(used, dtype=np.int32) * per_tile + 2,
                generator.integers(0, 256, (used, 56, 56, 3), np.uint8),
            )
        )
    return collate(made, bucket, tile_size=56, tokens_per_tile=per_tile, pad_id=2, lvtc=lvtc)


def program(config, mesh, remat="none"):
    """(loss and gradients on a mesh, jitted; abstract parameters with their places)."""
    abstract = abstract_model(
        config, dtype="float32", shardings=activation_shardings(mesh), remat=remat
    )
    shardings = param_shardings(abstract.shapes, abstract.axes, mesh)

    def gradients(params, batch):
        (loss, _), grads = loss_and_grads(abstract.graphdef, params, {}, batch, None)
        return loss, grads

    jitted = jax.jit(
        gradients, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(None, shardings)
    )
    return jitted, placed(abstract.shapes, shardings)


def collectives(text):
    """(kind, source scope) of every collective in compiled HLO."""
    return set(
        re.findall(
            r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*?"
            r'op_name="([^"]*)"',
            text,
        )
    )


def at_indices(found):
    """Those that move rows for a lookup, a merge or an expansion."""
    return {
        (kind, scope)
        for kind, scope in found
        if re.search("take|merge|lvtc_expand|gather|scatter|sharding", scope)
        and "dot_general" not in scope
    }


@pytest.mark.slow
def test_one_device_equals_eight(deeper):
    """The two layouts bring no collective: only the added kernels do, beside those of `off`."""
    config = dataclasses.replace(deeper, lvtc=LVTC)
    batch, params = make_batch(config), jax.tree.map(np.asarray, init_params(config, 0))
    eight = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    step, shapes = program(config, eight)
    compiled = step.lower(shapes, batch).compile()
    whole_step, _ = program(config, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    loss, grads = whole_step(params, batch)
    sharded_loss, sharded_grads = step(params, batch)
    np.testing.assert_allclose(sharded_loss, loss, atol=2e-6)
    for path, grad in grads.items():
        np.testing.assert_allclose(sharded_grads[path], grad, atol=3e-6, err_msg=path)
        if path.startswith("lvtc."):
            assert np.abs(grad).max() > 0, path

    step, shapes = program(deeper, eight)
    ours = collectives(compiled.as_text())
    off = collectives(step.lower(shapes, make_batch(deeper)).compile().as_text())
    assert at_indices(ours) == at_indices(off) and at_indices(off)
    assert {kind for kind, _ in ours} <= {kind for kind, _ in off}


def needed(config, batch, remat="none"):
    """Bytes of XLA's temporaries for a gradient step on one device."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    step, shapes = program(config, mesh, remat)
    return step.lower(shapes, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "full"])
def test_lvtc_needs_no_more_memory_than_all_tokens_everywhere(tiny, remat):
    """The whole model, with weights as large as activations: copies of them would show."""
    decoder = dataclasses.replace(tiny.decoder, layers=6, mlp_width=2048)
    all_tokens = dataclasses.replace(tiny.projector, downsample_ratio=1.0)
    off = dataclasses.replace(tiny, decoder=decoder, projector=all_tokens)
    lvtc = dataclasses.replace(LVTC, expand_layer=4, inject_layers=())
    both = [off, dataclasses.replace(tiny, decoder=decoder, lvtc=lvtc)]
    assert off.tokens_per_tile == both[1].tokens_per_tile == 16
    whole, ranges = (needed(config, make_batch(config, rows=2), remat) for config in both)
    assert ranges <= 1.1 * whole


def temporaries(config, layers, expand_layer):
    """Bytes of XLA's temporaries for a gradient step on one device, nothing recomputed."""
    lvtc = LvtcConfig(
        expand_layer=expand_layer,
        low_grid=1,
        high_grid=4,
        low_projector="mlp",
        high_projector="mlp",
    )
    decoder = dataclasses.replace(config.decoder, layers=layers, mlp_width=128)
    config = dataclasses.replace(config, lvtc=lvtc, decoder=decoder)
    return needed(config, make_batch(config, tiles=8, text=16))


@pytest.mark.slow
def test_shallow_layers_keep_short_activations_only(tiny):
    """Four more shallow layers cost what 24 slots cost, not 144: they hold no long layout."""
    deep = temporaries(tiny, 6, 0) - temporaries(tiny, 2, 0)
    shallow = temporaries(tiny, 6, 5) - temporaries(tiny, 2, 1)
    assert 0 < shallow < 1.2 * 24 / 144 * deep


@pytest.mark.slow
def test_one_executable_a_bucket(tiny, tiny_run):
    """Samples change and the compile counter does not.

    The short length is a function of the bucket.
    """
    run = tiny_run("lvtc", steps=8, mesh=MeshConfig(data=8))
    lvtc = LvtcConfig(expand_layer=1, low_grid=2, high_grid=4)
    data = dataclasses.replace(run.data, max_length=384, max_executables=1)
    train(dataclasses.replace(run, model=dataclasses.replace(tiny, lvtc=lvtc), data=data))
    rows = [
        json.loads(line)
        for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["executables"] for row in rows] == [1] * 8
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_short_length_follows_from_the_bucket():
    lvtc = LvtcConfig(expand_layer=1, low_grid=16, high_grid=32)
    seen = {}
    for tiles in range(25):
        for text in (10, 100, 500):
            length = tiles * 1024 + text
            bucket = smallest_bucket(tiles, length, saved_per_tile=lvtc.saved_per_tile)
            assert (
                bucket.short_length >= tiles * 256 + text and bucket.short_length <= bucket.length
            )
            assert (
                seen.setdefault((bucket.tiles, bucket.length), bucket.short_length)
                == bucket.short_length
            )
