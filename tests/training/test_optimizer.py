"""Schedules, AdamW, decay rules, groups and the average equal formulas (training.md 3, 11)."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.run_config import FreezeConfig, GroupConfig, OptimizerConfig
from internvlx_jax.models.params import abstract_model
from internvlx_jax.training.freeze import divide
from internvlx_jax.training.optimizer import (
    average,
    make_optimizer,
    make_schedule,
    relative_rates,
    weight_decays,
)


def after_warmup(schedule, k, warmup, steps, cooldown=0.1):
    done = (k - warmup) / (steps - warmup)
    return {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "constant": 1.0,
        "wsd": min(1.0, (steps - k) / math.ceil(cooldown * steps)),
    }[schedule]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(
    "ratio, warmup_steps, steps",
    [(0.03, None, 100), (0.1, None, 7), (0.0, None, 10), (0.5, 20, 90)],
)
def test_schedule(schedule, ratio, warmup_steps, steps):
    config = OptimizerConfig(
        learning_rate=2.0, schedule=schedule, warmup_ratio=ratio, warmup_steps=warmup_steps
    )
    warmup = math.ceil(ratio * steps) if warmup_steps is None else warmup_steps
    rate = make_schedule(config, steps)
    for k in {0, max(warmup - 1, 0), warmup, (warmup + steps) // 2, steps - 2, steps - 1}:
        expected = 2.0 * (k / warmup if k < warmup else after_warmup(schedule, k, warmup, steps))
        assert float(rate(k)) == pytest.approx(expected, abs=1e-6), k


def test_a_cooldown_that_does_not_fit():
    with pytest.raises(
        ConfigError, match="60 updates of warm-up and 50 of cool-down .* a run of 100"
    ):
        make_schedule(OptimizerConfig(schedule="wsd", warmup_ratio=0.6, cooldown_ratio=0.5), 100)


@pytest.fixture(scope="module")
def abstract(tiny):
    return abstract_model(tiny, dtype="float32")


def decayed(config, abstract, model):
    return {
        path
        for path, decay in weight_decays(config, abstract.shapes, abstract.axes, model).items()
        if decay
    }


def test_which_parameters_decay(tiny, abstract):
    matrices = decayed(OptimizerConfig(decay_rule="standard"), abstract, tiny)
    assert all(path.endswith("kernel") or path == "decoder.head" for path in matrices)
    assert {path for path in abstract.shapes if path.endswith("kernel")} <= matrices
    assert decayed(OptimizerConfig(decay_rule="all"), abstract, tiny) == abstract.shapes.keys()

    # The original trainer knows LayerNorm and Llama's RMSNorm, not those of InternLM2 and of the
    # projector.
    excluded = abstract.shapes.keys() - decayed(
        OptimizerConfig(decay_rule="trainer"), abstract, tiny
    )
    assert excluded == {path for path in abstract.shapes if path.endswith(".bias")} | {
        "vision.layers.norm1.weight",
        "vision.layers.norm2.weight",
    }
    llama = dataclasses.replace(tiny, decoder=dataclasses.replace(tiny.decoder, family="llama"))
    also = (
        abstract.shapes.keys()
        - decayed(OptimizerConfig(decay_rule="trainer"), abstract, llama)
        - excluded
    )
    assert also == {
        "decoder.norm.weight",
        "decoder.layers.attn_norm.weight",
        "decoder.layers.mlp_norm.weight",
    }


GROUPS = (
    GroupConfig(params="decoder.head", learning_rate=0.4, weight_decay=0.0),
    GroupConfig(params="decoder", multiplier=0.5),
    GroupConfig(params=".*norm", weight_decay=0.7),
)


@pytest.mark.parametrize("rule", ["all", "trainer", "standard"])
def test_updates_equal_numpy_adamw(rule, tiny, abstract):
    """Updates a norm, a matrix, a head and a divided stack; a group's first match counts."""
    paths = (
        "projector.local_query.norm.weight",
        "projector.local_query.linear.kernel",
        "decoder.head",
        "decoder.layers.mlp_norm.weight",
        "vision.layers.norm1.weight",
        "vision.layers.mlp.fc1.bias",
    )
    config = OptimizerConfig(
        learning_rate=0.1,
        warmup_ratio=0.0,
        weight_decay=0.3,
        decay_rule=rule,
        clip_norm=1.0,
        groups=GROUPS,
        vit_layer_decay=0.5,
        ema_decay=0.9,
    )
    shapes = {path: abstract.shapes[path] for path in paths}
    schedule = make_schedule(config, 5)
    optimizer = make_optimizer(config, schedule, shapes, abstract.axes, tiny)
    rng = np.random.default_rng(0)
    params = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    layers = np.array([[0.5], [1.0]])
    rates = dict(zip(paths, (1.0, 1.0, 4.0, 0.5, layers, layers)))
    decays = dict(zip(paths, (0.7, 0.3, 0.0, 0.3, 0.7, 0.3)))
    for path in {"all": (), "trainer": paths[4:], "standard": (paths[0], *paths[3:])}[rule]:
        decays[path] = 0.0

    state, ours = optimizer.init(params), dict(params)
    m, v, mean = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0), dict(params)
    for k in range(4):
        grads = {
            path: rng.normal(size=leaf.shape).astype(np.float32) * 3
            for path, leaf in shapes.items()
        }
        updates, state = optimizer.update(grads, state, ours)
        ours = {path: ours[path] + updates[path] for path in ours}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for path, g in grads.items():
            g = g * min(1.0, 1.0 / norm)
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.999 * v[path] + 0.001 * g**2
            step = (m[path] / (1 - 0.9 ** (k + 1))) / (
                np.sqrt(v[path] / (1 - 0.999 ** (k + 1))) + 1e-8
            )
            rate = float(schedule(k)) * rates[path]
            params[path] = params[path] - rate * (step + decays[path] * params[path])
            mean[path] = 0.9 * mean[path] + 0.1 * params[path]
    for path in paths:
        np.testing.assert_allclose(ours[path], params[path], atol=2e-5, err_msg=path)
        np.testing.assert_allclose(average(state)[path], mean[path], atol=2e-5, err_msg=path)


def test_layer_decay_of_the_tower(tiny, abstract):
    """Embeddings are layer 0, and the last layer keeps its rate.

    The last layers of a divided stack have the same rates.
    """
    config = OptimizerConfig(vit_layer_decay=0.5)
    rates = relative_rates(config, abstract.shapes, tiny)
    assert rates["vision.class_embedding"] == rates["vision.patch_embed.kernel"] == 0.25
    assert rates["vision.layers.attn.qkv.kernel"].shape == (2, 1, 1, 1, 1)
    assert rates["vision.layers.attn.qkv.kernel"].ravel().tolist() == [0.5, 1.0]
    assert rates["decoder.layers.attn.qkv.kernel"] == rates["projector.cls_scale"] == 1.0
    last = divide(abstract.shapes, FreezeConfig(vit=True, unfreeze_vit_last=1), "float32")
    assert relative_rates(config, last.trained, tiny)["vision.layers.ls1"].tolist() == [[1.0]]


@pytest.mark.parametrize(
    "groups, message",
    [
        (
            (GroupConfig(params="vit"),),
            "optimizer.groups: 'vit' matches no trained parameter "
            "that an earlier group has not; trained paths begin with decoder, projector",
        ),
        ((GroupConfig(params="vision"),), "'vision' matches no trained parameter"),
        (
            (GroupConfig(params="decoder"), GroupConfig(params="decoder.head")),
            "'decoder.head' matches no trained parameter",
        ),
        (
            (GroupConfig(params="(decoder"),),
            "optimizer.groups: '(decoder' is not a regular expression",
        ),
    ],
)
def test_a_group_that_matches_nothing_is_an_error(groups, message, tiny, abstract):
    partition = divide(abstract.shapes, FreezeConfig(vit=True), "float32")
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_optimizer(
            OptimizerConfig(groups=groups), lambda _: 0.1, partition.trained, abstract.axes, tiny
        )


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(learning_rate=0.0), "optimizer.learning_rate is 0.0, it must be above 0"),
        (dict(ema_decay=1.0), "optimizer.ema_decay is 1.0, it must be between 0 and 1"),
        (dict(warmup_ratio=3.0), "optimizer.warmup_ratio is 3.0, it must be from 0 to 1"),
        (dict(warmup_steps=-1), "optimizer.warmup_steps is -1"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**fields)


def test_a_group_that_learns_nothing_is_referred_to_freezing():
    with pytest.raises(
        ConfigError,
        match="learning_rate of 'vision' is 0.0, it must be above 0; freeze.paths is for",
    ):
        GroupConfig(params="vision", learning_rate=0.0)


def test_moments_in_bfloat16(tiny, abstract):
    shapes = {"decoder.head": abstract.shapes["decoder.head"]}
    config = OptimizerConfig(moments_dtype="bfloat16")
    state = jax.eval_shape(
        make_optimizer(config, lambda _: 0.1, shapes, abstract.axes, tiny).init, shapes
    )
    leaves = {
        jax.tree_util.keystr(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }
    assert (
        leaves["[1].mu['decoder.head']"] == jnp.bfloat16
        and leaves["[1].nu['decoder.head']"] == jnp.float32
    )
