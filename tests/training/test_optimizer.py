"""Schedule and AdamW against their formulas; which parameters decay (training.md 3)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvlx_jax.models.params import abstract_model
from internvlx_jax.training.config import OptimizerConfig
from internvlx_jax.training.optimizer import decay_mask, make_optimizer, make_schedule


@pytest.mark.parametrize("ratio, steps", [(0.03, 100), (0.1, 7), (0.0, 10)])
def test_schedule(ratio, steps):
    config = OptimizerConfig(learning_rate=2.0, warmup_ratio=ratio)
    schedule, warmup = make_schedule(config, steps), math.ceil(ratio * steps)
    for k in {0, max(warmup - 1, 0), warmup, (warmup + steps) // 2, steps - 1}:
        expected = 2.0 * k / warmup if k < warmup else 1.0 + math.cos(math.pi * (k - warmup) / (steps - warmup))
        assert float(schedule(k)) == pytest.approx(expected, abs=1e-6)


def test_which_parameters_decay(tiny):
    abstract = abstract_model(tiny, dtype="float32")
    mask = decay_mask(OptimizerConfig(decay_rule="standard"), abstract.shapes, abstract.axes)
    decayed = {path for path, yes in mask.items() if yes}
    assert all(path.endswith("kernel") or path == "decoder.head" for path in decayed)
    assert {path for path in mask if path.endswith("kernel")} <= decayed
    assert "decoder.embedding" not in decayed and "projector.cls_scale" not in decayed
    assert "vision.layers.ls1" not in decayed and "vision.layers.attn.qkv.bias" not in decayed
    assert all(decay_mask(OptimizerConfig(decay_rule="all"), abstract.shapes, abstract.axes).values())


@pytest.mark.parametrize("rule", ["all", "standard"])
def test_updates_equal_numpy_adamw(rule):
    config = OptimizerConfig(learning_rate=0.1, warmup_ratio=0.0, weight_decay=0.3, decay_rule=rule, clip_norm=1.0)
    shapes = {"a.kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32), "a.norm.weight": jax.ShapeDtypeStruct((3,), jnp.float32)}
    axes = {"a.kernel": (None, None), "a.norm.weight": (None,)}
    mask, schedule = decay_mask(config, shapes, axes), make_schedule(config, 5)
    optimizer = make_optimizer(config, schedule, mask)
    rng = np.random.default_rng(0)
    params = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    state = optimizer.init(params)
    m = {path: 0.0 for path in params}
    v = dict(m)
    ours = dict(params)
    for k in range(4):
        grads = {path: rng.normal(size=leaf.shape).astype(np.float32) * 3 for path, leaf in shapes.items()}
        updates, state = optimizer.update(grads, state, ours)
        ours = {path: ours[path] + updates[path] for path in ours}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for path, g in grads.items():
            g = g * min(1.0, 1.0 / norm)
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.999 * v[path] + 0.001 * g**2
            step = (m[path] / (1 - 0.9 ** (k + 1))) / (np.sqrt(v[path] / (1 - 0.999 ** (k + 1))) + 1e-8)
            params[path] = params[path] - float(schedule(k)) * (step + 0.3 * mask[path] * params[path])
    for path in params:
        np.testing.assert_allclose(ours[path], params[path], atol=2e-5)
