"""Products of bfloat16 arrays on a CPU: right, and without float32 copies (design: model.md 13)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvlx_jax import load_pretrained
from internvlx_jax.convert.verify import inputs_from_flat
from internvlx_jax.core.model_config import DecoderConfig, ModelConfig, PromptConfig, VisionConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.models.generation import (
    Sampling,
    Vocabulary,
    advance,
    decode_step,
    for_decoding,
    prefill,
    row_keys,
    start,
)
from internvlx_jax.models.layers import Linear, product
from internvlx_jax.models.params import abstract_model, init_params, unflatten

BF16_NOISE = 0.2  # of logits of size 8, see tests/golden/README.md
SPECS = {
    "bsd,df->bsf": ((1, 3, 24), (24, 16)),
    "isv,vanh->aisnh": ((2, 3, 16), (16, 3, 2, 8)),
    "bsnh,nhd->bsd": ((1, 1, 2, 8), (2, 8, 24)),  # one row
    "nd,dw->nw": ((1, 24), (24, 40)),
}


@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradients(spec):
    """Those of float32 products of the same numbers, but for one rounding of the gradients."""
    rng, shapes = np.random.default_rng(0), SPECS[spec]
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    exact = functools.partial(jnp.einsum, spec)
    y, backward = jax.vjp(functools.partial(product, spec), x, kernel)
    wide = (x.astype(jnp.float32), kernel.astype(jnp.float32))
    expected, exact_backward = jax.vjp(exact, *wide)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.bfloat16).astype(jnp.float32)
    for gradient, of_exact in zip(backward(dy), exact_backward(dy), strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            gradient.astype(np.float32), of_exact, rtol=2**-8, atol=2**-8 * np.abs(of_exact).max()
        )


def test_golden_scores(golden):
    """A prompt with images, then single steps at batch 1, as chat has them by default."""
    folder = golden / "qwen2"
    inputs, outputs = (np.load(folder / f"{side}.npz") for side in ("inputs", "outputs"))
    model = for_decoding(load_pretrained(folder).model)
    assert model.dtype == jnp.bfloat16
    ids = inputs["gen1_input_ids"]
    prompts = inputs_from_flat(
        model.config,
        7,
        ids,
        inputs["pixel_values"][:2],
        np.ones_like(ids),
        np.arange(len(ids[0]))[None],
    )
    tokens = outputs["gen1_new_tokens"]
    reference = for_decoding(load_pretrained(folder, dtype="float32").model)
    begin, step = jax.jit(prefill, static_argnums=2), jax.jit(decode_step)
    states = [begin(each, prompts, tokens.shape[1]) for each in (model, reference)]
    for token in tokens.T:
        (_, scores), (_, exact) = states
        np.testing.assert_array_equal(jnp.argmax(exact, axis=-1), token)
        assert 0 < np.abs(scores - exact).max() < BF16_NOISE
        states = [
            step(each, cache, jnp.asarray(token))
            for each, (cache, _) in zip((model, reference), states, strict=True)
        ]


CONFIG = ModelConfig(
    prompt=PromptConfig(tiles=TileConfig(tile_size=56)),
    vision=VisionConfig(width=128, layers=2, heads=4, mlp_width=512, image_size=56),
    decoder=DecoderConfig(
        vocab_size=2048, width=256, layers=4, heads=4, kv_heads=2, head_dim=64, mlp_width=1024
    ),
)


def programs(dtype):
    """Compiles a prefill of 64 slots, and decoding at batch 1 behind it."""
    abstract = abstract_model(CONFIG, dtype=dtype, param_dtype=dtype)
    model = for_decoding(
        nnx.merge(abstract.graphdef, unflatten(init_params(CONFIG, 0, param_dtype=dtype)))
    )
    ids = np.arange(64)[None] % 2000 + 10
    edge = CONFIG.vision.image_size
    inputs = inputs_from_flat(
        CONFIG,
        7,
        ids,
        np.zeros((0, 3, edge, edge), np.float32),
        np.ones_like(ids),
        np.arange(64)[None],
    )
    vocabulary = Vocabulary(stop_ids=(), pad_id=2, bos_id=1)
    options = dict(sampling=Sampling(), vocabulary=vocabulary)

    def begin(model, inputs):
        return start(model, inputs, row_keys(0, jnp.arange(1)), 0, max_new_tokens=8, **options)

    def go(model, state):
        return advance(model, state, 8, 0, **options)

    state = jax.eval_shape(begin, model, inputs)
    return [
        jax.jit(function).lower(model, each).compile().memory_analysis()
        for function, each in ((begin, inputs), (go, state))
    ], sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.decoder)))


def test_memory_is_below_that_of_float32():
    """No program holds a converted copy of the weights: one of a single layer would show."""
    (small, weights), (large, _) = programs("bfloat16"), programs("float32")
    for half, whole in zip(small, large, strict=True):
        total = half.argument_size_in_bytes + half.temp_size_in_bytes
        assert total < 0.7 * (whole.argument_size_in_bytes + whole.temp_size_in_bytes)
    assert small[1].temp_size_in_bytes < weights / CONFIG.decoder.layers


def test_other_platforms_multiply_as_they_are():
    """A model made for devices that are not CPUs keeps XLA's own way."""
    model = abstract_model(CONFIG, dtype="bfloat16").graphdef
    assert "on_cpu" in str(model)
    linear = Linear("bd,df->bf", (8, 4), (None, None), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x = jnp.ones((1, 8), jnp.bfloat16)
    assert "float32" not in str(jax.make_jaxpr(lambda x: linear(x))(x))
    linear.on_cpu = True
    assert "preferred_element_type=float32" in str(jax.make_jaxpr(lambda x: linear(x))(x))
