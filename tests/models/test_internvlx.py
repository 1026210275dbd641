"""The whole model against the original: logits, loss, all gradients.

Also the merge and its static index (model.md 7, 10).
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvlx_jax.checkpoints.name_table import name_table
from internvlx_jax.convert.verify import inputs_from_flat
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.data.tiles import NORMALIZATIONS
from internvlx_jax.data.tiles import normalize as normalize_on_host
from internvlx_jax.models.internvlx import normalize_tiles
from internvlx_jax.models.loss import CHUNK, token_losses, weighted_loss
from internvlx_jax.models.params import flatten

IMAGE_TOKEN = 7
run = jax.jit(lambda model, inputs: model(inputs))


def batch(parity):
    flags = parity.inputs["image_flags"] == 1
    return inputs_from_flat(
        parity.model.config,
        IMAGE_TOKEN,
        parity.inputs["input_ids"],
        parity.inputs["pixel_values"][flags],
        parity.inputs["attention_mask"],
    )


def loss_of(model, inputs, labels):
    ce, _ = token_losses(model.decoder, model(inputs), labels)
    total, weight = weighted_loss(ce, (labels != -100).astype(jnp.float32))
    return total / weight


def test_logits(parity):
    mask = parity.inputs["attention_mask"] == 1
    ours = np.asarray(parity.model.decoder.logits(run(parity.model, batch(parity))))
    np.testing.assert_allclose(ours[mask], parity.outputs["logits"][mask], atol=1e-4, rtol=0)


def test_rows_alone_equal_rows_in_the_batch(parity):
    lengths = parity.inputs["attention_mask"].sum(axis=1)
    pixels = parity.inputs["pixel_values"]
    for row, name, tiles in ((1, "single_image", pixels[2:3]), (2, "single_text", pixels[:0])):
        ids = parity.inputs["input_ids"][row : row + 1, : lengths[row]]
        inputs = inputs_from_flat(parity.model.config, IMAGE_TOKEN, ids, tiles)
        ours = parity.model.decoder.logits(run(parity.model, inputs))
        np.testing.assert_allclose(ours, parity.outputs[f"{name}_logits"], atol=1e-4, rtol=0)
        labels = jnp.asarray(parity.inputs["labels"][row : row + 1, : lengths[row]], jnp.int32)
        np.testing.assert_allclose(
            jax.jit(loss_of)(parity.model, inputs, labels),
            parity.outputs[f"{name}_loss"],
            atol=1e-5,
        )


def test_loss_and_gradients(parity, golden):
    """All gradients of `internlm2`, the stored selection and every norm of the others, in
    checkpoint layout.
    """
    labels = jnp.asarray(parity.inputs["labels"], jnp.int32)
    loss, grads = jax.jit(jax.value_and_grad(loss_of))(parity.model, batch(parity), labels)
    np.testing.assert_allclose(loss, parity.outputs["loss"], atol=1e-5)
    flat = flatten(nnx.to_pure_dict(nnx.state(grads)))
    stored = {
        name.removeprefix("grad/"): value
        for name, value in parity.outputs.items()
        if name.startswith("grad/")
    }
    norms = json.loads((golden / parity.name / "grad_norms.json").read_text())
    compared = 0
    for entry in name_table(parity.model.config):
        layers = [flat[entry.target]] if entry.layers is None else flat[entry.target]
        for layer, gradient in enumerate(layers):
            for name, ours in zip(entry.sources(layer), entry.to_sources(np.asarray(gradient))):
                if name in stored:
                    np.testing.assert_allclose(ours, stored[name], atol=1e-5, rtol=0, err_msg=name)
                    compared += 1
                # A tensor without a stored norm is behind select_layer: no gradient reaches it.
                np.testing.assert_allclose(
                    np.linalg.norm(ours), norms.get(name, 0.0), atol=1e-4, err_msg=name
                )
    assert compared == len(stored)
    if parity.name == "internlm2":
        assert compared == 83


def test_nothing_supervised_is_a_loss_of_zero(load_golden):
    parity = load_golden("internlm2")
    labels = jnp.full(parity.inputs["labels"].shape, -100)
    ce, _ = token_losses(parity.model.decoder, run(parity.model, batch(parity)), labels)
    assert float(jnp.abs(ce).max()) == 0.0


def test_masked_tiles_change_nothing(load_golden):
    parity = load_golden("internlm2")
    inputs = batch(parity)
    extra = np.full((inputs.tiles.shape[0], 2, *inputs.tiles.shape[2:]), 1e3, np.float32)
    tiles = np.concatenate([inputs.tiles, extra], axis=1)
    text = inputs.tiles.shape[1] * parity.model.config.tokens_per_tile
    index = np.where(
        inputs.feature_index == text,
        tiles.shape[1] * parity.model.config.tokens_per_tile,
        inputs.feature_index,
    )
    padded = inputs._replace(tiles=tiles, feature_index=index)
    np.testing.assert_allclose(run(parity.model, padded), run(parity.model, inputs), atol=1e-5)
    grad = jax.jit(jax.grad(lambda tiles: jnp.sum(parity.model(padded._replace(tiles=tiles)))))(
        jnp.asarray(tiles)
    )
    assert float(jnp.abs(grad[:, -2:]).max()) == 0.0


def test_wrong_number_of_tiles_is_named(load_golden):
    parity = load_golden("internlm2")
    with pytest.raises(ValueError, match=r"placeholders \(id 7\); 1 tiles"):
        inputs_from_flat(
            parity.model.config,
            IMAGE_TOKEN,
            parity.inputs["input_ids"],
            parity.inputs["pixel_values"][:1],
        )


def test_uint8_tiles_are_normalised_on_the_device():
    tiles = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    assert set(NORMALIZATIONS) >= {"imagenet"}
    np.testing.assert_allclose(
        normalize_tiles(jnp.asarray(tiles)), normalize_on_host(tiles), atol=1e-6
    )


def test_chunked_loss_equals_the_whole(load_golden):
    """Longer than a chunk and no multiple of it: values and gradients equal plain cross entropy."""
    decoder = load_golden("internlm2").model.decoder
    length = CHUNK + 77
    hidden = jax.random.normal(jax.random.key(0), (2, length, decoder.config.width))
    labels = np.random.default_rng(0).integers(0, 200, (2, length)).astype(np.int32)
    labels[:, ::3] = -100

    def plain(hidden):
        logits, targets = decoder.logits(hidden)[:, :-1], labels[:, 1:]
        ce = -jnp.take_along_axis(
            jax.nn.log_softmax(logits), np.maximum(targets, 0)[..., None], -1
        )[..., 0]
        return jnp.sum(jnp.where(targets == -100, 0.0, ce))

    def chunked(hidden):
        return jnp.sum(token_losses(decoder, hidden, jnp.asarray(labels))[0])

    np.testing.assert_allclose(chunked(hidden), plain(hidden), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(chunked)(hidden), jax.grad(plain)(hidden), atol=1e-5)
    _, hit = token_losses(decoder, hidden, jnp.asarray(labels))
    expected = np.argmax(decoder.logits(hidden)[:, :-1], -1) == labels[:, 1:]
    np.testing.assert_array_equal(np.asarray(hit)[:, :-1], expected)


def test_text_only_bucket_has_no_tower_in_it(load_golden):
    model = load_golden("internlm2").model
    tokens = jnp.zeros((2, 8), jnp.int32)
    empty = Inputs(tokens, tokens, tokens + 1, jnp.zeros((2, 0, 56, 56, 3), jnp.uint8), tokens)
    assert "vit_block" not in jax.jit(lambda m, x: m(x)).lower(model, empty).as_text(
        debug_info=True
    )
