"""Analytic FLOPs against the check values of training.md 8 and a walk of the traced model."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from internvlx_jax.data.tiles import TileConfig
from internvlx_jax.models.config import DecoderConfig, ModelConfig, PromptConfig, VisionConfig
from internvlx_jax.models.flops import forward_flops
from internvlx_jax.models.inputs import Inputs, ShortFrame
from internvlx_jax.models.params import abstract_model, unflatten
from internvlx_jax.models.presets import internvlx_2b, internvlx_8b, lvtc_preset


@pytest.mark.parametrize("model, pvtc, token, row", [
    (internvlx_2b(), 103.1, 3.399, 15.57),
    (internvlx_8b(), 395.2, 14.717, 64.68),
])  # fmt: skip
def test_check_values(model, pvtc, token, row):
    one_tile = forward_flops(model, tiles=1, lengths=[0])
    assert one_tile.tower / 1e9 == pytest.approx(723.6, abs=0.05)
    assert one_tile.projector / 1e9 == pytest.approx(pvtc, abs=0.05)
    tokens = forward_flops(model, tiles=0, lengths=[1] * 1000)  # attention of single tokens is negligible
    assert tokens.total / 1e12 == pytest.approx(token, rel=1e-3)
    assert forward_flops(model, tiles=0, lengths=[4096]).total / 1e12 == pytest.approx(row, rel=1e-3)


def dot_flops(jaxpr):
    """FLOPs of every matrix product in a jaxpr; a scanned body counts as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        for inner in jaxprs_in_params(equation.params):
            total += dot_flops(inner) * equation.params.get("length", 1)
    return total


@pytest.mark.parametrize("lvtc", ["off", "paper_inject", "fast"])
def test_every_matrix_product_is_counted(lvtc):
    """Against a walk of the traced model. Only causal attention differs: XLA computes both halves."""
    decoder = DecoderConfig(vocab_size=99, width=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp_width=48)
    config = ModelConfig(
        vision=VisionConfig(width=16, layers=2, heads=2, mlp_width=32, image_size=56), decoder=decoder,
        lvtc=lvtc_preset(lvtc, token_grid=2, expand_layer=1, inject_layers=(2, 3)),
        prompt=PromptConfig(tiles=TileConfig(tile_size=56)))
    rows, tiles, length = 2, 3, 80
    saved = tiles * config.lvtc.saved_per_tile if config.lvtc else 0
    shapes = jax.eval_shape(lambda: short_batch(config, rows, tiles, length, length - saved))
    abstract = abstract_model(config, dtype="float32")

    def logits(params, inputs):
        model = nnx.merge(abstract.graphdef, unflatten(params))
        return model.decoder.logits(model(inputs))

    counted = dot_flops(jax.make_jaxpr(logits)(abstract.shapes, shapes).jaxpr)
    shallow = config.lvtc.expand_layer if config.lvtc else 0
    causal_half = rows * 2 * 32 * (shallow * (length - saved) ** 2 + (4 - shallow) * length**2)
    flops = forward_flops(config, tiles=rows * tiles, lengths=[length] * rows, short_lengths=[length - saved] * rows)
    assert counted == pytest.approx(flops.total + causal_half, rel=1e-6)


def short_batch(config, rows, tiles, length, short_length):
    """Inputs of the right shapes; nothing is computed with their values."""
    def ints(*shape):
        return jnp.zeros(shape, jnp.int32)

    short = None
    if config.lvtc:
        short = ShortFrame(ints(rows, short_length), ints(rows, length), ints(rows, tiles), ints(rows, short_length))
    size = config.vision.image_size
    return Inputs(ints(rows, length), ints(rows, length), ints(rows, length),
                  jnp.zeros((rows, tiles, size, size, 3), jnp.uint8), ints(rows, length), short)
