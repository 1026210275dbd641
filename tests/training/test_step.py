"""One update: accumulation, freezing, weights, drop path, counts (training.md 2, 4, 5)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.run_config import OptimizerConfig
from internvlx_jax.data.batch import Batch
from internvlx_jax.models.params import abstract_model
from internvlx_jax.training.optimizer import make_optimizer, make_schedule
from internvlx_jax.training.step import (
    TrainState,
    count_answers,
    loss_and_grads,
    make_eval_step,
    make_train_step,
)

ROWS, LENGTH, DATASETS = 4, 24, 4


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 600, (ROWS, LENGTH)).astype(np.int32)
    labels = np.where(rng.random((ROWS, LENGTH)) < 0.4, tokens, -100).astype(np.int32)
    labels[:, 0] = -100
    index = (
        np.where(np.arange(LENGTH) < 4, np.arange(LENGTH), 4)[None].repeat(ROWS, 0).astype(np.int32)
    )
    inputs = Inputs(
        tokens,
        np.arange(LENGTH, dtype=np.int32)[None].repeat(ROWS, 0),
        np.ones_like(tokens),
        rng.integers(0, 256, (ROWS, 1, 56, 56, 3), np.uint8),
        index,
    )
    dataset = np.repeat(np.int32([[1], [0], [1], [3]]), LENGTH, axis=1)
    return Batch(inputs, labels, (labels != -100).astype(np.float32), dataset)


@pytest.fixture(scope="module")
def model(tiny, tiny_params):
    return abstract_model(tiny, attention="xla", dtype="float32"), tiny_params


def grads_of(abstract, params, batch, key=None, accumulation=1, frozen=None):
    (loss, _), grads = jax.jit(loss_and_grads, static_argnums=(0, 5))(
        abstract.graphdef, params, frozen or {}, batch, key, accumulation
    )
    return loss, grads


@pytest.mark.slow
def test_accumulation_equals_one_large_step(model, batch):
    abstract, params = model
    loss, grads = grads_of(abstract, params, batch)
    for accumulation in (2, 4):
        loss_a, grads_a = grads_of(abstract, params, batch, accumulation=accumulation)
        np.testing.assert_allclose(loss_a, loss, rtol=1e-6)
        for path in grads:
            np.testing.assert_allclose(grads_a[path], grads[path], atol=2e-6, err_msg=path)


def test_the_loss_of_a_data_set_is_that_of_its_rows(model, batch):
    abstract, params = model
    grouped = jax.jit(loss_and_grads, static_argnums=(0, 5, 6))
    (_, sums), _ = grouped(abstract.graphdef, params, {}, batch, None, 2, DATASETS)
    eval_step = jax.jit(make_eval_step(abstract.graphdef))
    for dataset, total in enumerate(sums):
        alone = batch._replace(loss_weight=batch.loss_weight * (batch.dataset == dataset))
        np.testing.assert_allclose(total, eval_step(params, alone).loss, rtol=1e-6)
    assert sums[2] == 0 and all(sums[np.array([0, 1, 3])] > 0)


def test_masked_rows_change_nothing(model, batch):
    abstract, params = model
    loss, grads = grads_of(abstract, params, batch)
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    labels = np.concatenate([batch.labels, np.full_like(batch.labels, -100)])
    loss_p, grads_p = grads_of(abstract, params, padded._replace(labels=labels))
    np.testing.assert_allclose(loss_p, loss, rtol=1e-6)
    for path in grads:
        np.testing.assert_allclose(grads_p[path], grads[path], atol=2e-6, err_msg=path)


def test_nothing_supervised_is_zero(model, batch):
    abstract, params = model
    loss, grads = grads_of(
        abstract,
        params,
        batch._replace(
            labels=np.full_like(batch.labels, -100), loss_weight=np.zeros_like(batch.loss_weight)
        ),
    )
    assert float(loss) == 0.0 and all(float(jnp.abs(g).max()) == 0.0 for g in grads.values())


@pytest.mark.slow
def test_remat_and_bfloat16(tiny, model, batch):
    abstract, params = model
    plain, plain_grads = grads_of(abstract, params, batch)
    remat, remat_grads = grads_of(
        abstract_model(tiny, attention="xla", dtype="float32", remat="full"), params, batch
    )
    np.testing.assert_allclose(remat, plain, rtol=1e-6)
    for path in params:
        np.testing.assert_allclose(remat_grads[path], plain_grads[path], atol=2e-6, err_msg=path)
    loss, grads = grads_of(abstract_model(tiny, attention="xla", dtype="bfloat16"), params, batch)
    np.testing.assert_allclose(loss, plain, rtol=2e-2)
    assert loss.dtype == jnp.float32 and all(g.dtype == jnp.float32 for g in grads.values())


@pytest.mark.slow
def test_update_and_frozen_parameters(tiny, model, batch):
    abstract, params = model
    frozen = {path: value for path, value in params.items() if path.startswith("vision.")}
    trainable = {path: value for path, value in params.items() if path not in frozen}
    before = {path: np.asarray(value) for path, value in params.items()}
    config = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0)
    schedule = make_schedule(config, 10)
    shapes = {path: abstract.shapes[path] for path in trainable}
    optimizer = make_optimizer(config, schedule, shapes, abstract.axes, tiny)
    step = jax.jit(
        make_train_step(
            abstract.graphdef, optimizer, schedule, seed=0, accumulation=1, datasets=DATASETS
        )
    )
    state = TrainState(trainable, frozen, optimizer.init(trainable), jnp.int32(0))
    moments = [path for path, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]]
    assert not any("vision" in jax.tree_util.keystr(path) for path in moments)
    new, metrics = step(state, batch)
    assert int(new.step) == 1 and float(metrics.learning_rate) == pytest.approx(1e-2)
    assert float(metrics.grad_norm) > 0
    np.testing.assert_allclose(
        sum(metrics.loss_sums), metrics.loss * sum(metrics.weight_sums), rtol=1e-6
    )
    supervised = (batch.labels != -100).sum(axis=1)
    assert metrics.weight_sums.tolist() == [
        supervised[1],
        supervised[0] + supervised[2],
        0,
        supervised[3],
    ]
    for path, value in new.frozen.items():
        np.testing.assert_array_equal(value, before[path])
    moved = {
        path for path, value in new.trainable.items() if np.any(np.asarray(value) != before[path])
    }
    assert moved == trainable.keys()
    losses = [float(metrics.loss)]
    for _ in range(8):
        new, metrics = step(new, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.5


def test_drop_path_depends_on_seed_and_step_only(model, batch):
    abstract, params = model
    losses = [
        float(grads_of(abstract, params, batch, key=jax.random.key(seed))[0]) for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert float(grads_of(abstract, params, batch)[0]) not in losses


def test_count_answers():
    supervised = jnp.array(
        [[0, 1, 1, 0, 1, 0, 1, 1, 1, 0], [0] * 10, [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]], bool
    )
    hit = jnp.array(
        [[0, 1, 1, 0, 0, 1, 1, 0, 1, 0], [1] * 10, [1, 1, 0, 0, 1, 1, 1, 1, 1, 1]], bool
    )
    assert [float(n) for n in count_answers(supervised, hit)] == [5.0, 3.0]
    rng = np.random.default_rng(0)
    supervised, hit = rng.random((50, 40)) < 0.6, rng.random((50, 40)) < 0.8
    runs = exact = 0
    for row, good in zip(supervised, hit):
        slot = 0
        while slot < 40:
            if not row[slot]:
                slot += 1
                continue
            end = slot
            while end < 40 and row[end]:
                end += 1
            runs, exact, slot = runs + 1, exact + bool(good[slot:end].all()), end
    assert [float(n) for n in count_answers(jnp.asarray(supervised), jnp.asarray(hit))] == [
        runs,
        exact,
    ]


def test_eval_step_agrees_with_the_training_loss(model, batch):
    abstract, params = model
    sums = jax.jit(make_eval_step(abstract.graphdef))(params, batch)
    np.testing.assert_allclose(
        sums.loss / sums.weight, grads_of(abstract, params, batch)[0], rtol=1e-6
    )
    assert 0 <= float(sums.exact) <= float(sums.answers)
    assert dataclasses.is_dataclass(abstract)
