"""LVTC in the training step: sharding, collectives, memory, executables (lvtc.md 6, points 5 and 8)."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from internvlx_jax.data.batch import Row, collate
from internvlx_jax.data.plan import Bucket, smallest_bucket
from internvlx_jax.models.config import LvtcConfig, ProjectorConfig
from internvlx_jax.models.params import abstract_model, init_params
from internvlx_jax.training.loop import train
from internvlx_jax.training.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings, placed
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
    bucket = Bucket(tiles, text + tiles * per_tile, 0 if lvtc is None else text + tiles * lvtc.low_grid**2)
    for row in range(rows):
        used = row % (tiles + 1)
        tokens = generator.integers(10, 600, text + used * per_tile).astype(np.int32)
        made.append(Row(tokens, tokens, np.arange(used, dtype=np.int32) * per_tile + 2,
                        generator.integers(0, 256, (used, 56, 56, 3), np.uint8)))
    return collate(made, bucket, tile_size=56, tokens_per_tile=per_tile, pad_id=2, lvtc=lvtc)


def program(config, mesh, batch, *, remat="none"):
    """Loss and gradients on a mesh: (jitted function, abstract parameters with their places)."""
    abstract = abstract_model(config, dtype="float32", remat=remat)
    shardings = param_shardings(abstract.shapes, abstract.axes, mesh)

    def gradients(params, batch):
        return loss_and_grads(abstract.graphdef, params, {}, batch, None)

    jitted = jax.jit(gradients, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(None, shardings))
    return jitted, placed(abstract.shapes, shardings)


def collectives(text):
    """(kind, source scope) of every collective in compiled HLO."""
    found = re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*?"
                       r'op_name="([^"]*)"', text)
    return {(kind, re.sub(r"\d+", "", scope)) for kind, scope in found}


@pytest.mark.parametrize("mesh_config", [MeshConfig(data=2, fsdp=2, tensor=2)])
def test_one_device_equals_eight(deeper, mesh_config):
    """And the frames bring no collective: those of `off` and of the added projectors are all there are."""
    config = dataclasses.replace(deeper, lvtc=LVTC)
    batch, params = make_batch(config), jax.tree.map(np.asarray, init_params(config, 0))
    results, texts = [], []
    for mesh in (make_mesh(MeshConfig(), devices=jax.devices()[:1]), make_mesh(mesh_config)):
        step, shapes = program(config, mesh, batch)
        compiled = step.lower(shapes, batch).compile()
        texts.append(compiled.as_text())
        results.append(jax.tree.map(np.asarray, step(params, batch)))
    (loss, grads), (sharded_loss, sharded_grads) = results
    np.testing.assert_allclose(sharded_loss, loss, atol=2e-6)
    for path, grad in grads.items():
        np.testing.assert_allclose(sharded_grads[path], grad, atol=3e-6, err_msg=path)
        if path.startswith("lvtc."):
            assert np.abs(grad).max() > 0, path
    assert not collectives(texts[0])
    ours = collectives(texts[1])
    step, shapes = program(deeper, make_mesh(mesh_config), None)
    off = collectives(step.lower(shapes, make_batch(deeper)).compile().as_text())
    print(sorted(ours - off))
    print(sorted(off))
