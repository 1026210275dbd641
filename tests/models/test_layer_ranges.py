"""A stack run in ranges: as the whole stack, without copies of its weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvlx_jax.core.model_config import DecoderConfig, LoraConfig
from internvlx_jax.models.decoder import Decoder, TokenLayout
from internvlx_jax.models.lora import is_adapter
from internvlx_jax.models.params import flatten, unflatten

CONFIG = DecoderConfig(
    vocab_size=40, width=128, layers=6, heads=4, kv_heads=2, head_dim=32, mlp_width=512
)
X = np.random.default_rng(0).normal(size=(2, 24, CONFIG.width)).astype(np.float32)
LAYOUT = TokenLayout(np.tile(np.arange(24, dtype=np.int32), (2, 1)), np.ones((2, 24), np.int32))
BOUNDS = {"whole": (6,), "ranges": (2, 6)}


@functools.cache
def split(lora=None):
    graphdef, state = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, lora=lora))
    return graphdef, flatten(nnx.to_pure_dict(state))


def run(graphdef, params, bounds, x=X, keep_kv=False, **options):
    decoder, layers = nnx.merge(graphdef, unflatten(params)), None
    for start, stop in zip((0, *bounds), bounds):
        x, _, layers = decoder.run_range(
            x, LAYOUT, start=start, stop=stop, layers=layers, keep_kv=keep_kv, **options
        )
    return x


def gradients(bounds, remat, lora=None):
    graphdef, params = split(lora)
    learned = {path: p for path, p in params.items() if lora is None or is_adapter(path)}
    learned = {path: p for path, p in learned.items() if path.startswith("layers.")}
    key = None if lora is None else jax.random.key(1)

    def loss(learned, x):
        y = run(graphdef, params | learned, bounds, x, remat=remat, dropout_key=key)
        return jnp.sum(jnp.square(y))

    return jax.jit(jax.grad(loss, argnums=(0, 1))), (learned, X)


@pytest.mark.parametrize(
    "remat, lora",
    [
        ("none", None),
        ("full", None),
        ("dots", None),
        ("full", LoraConfig(part="decoder", rank=2, alpha=4.0, dropout=0.5)),
    ],
)
def test_gradients_are_those_of_the_whole_stack(remat, lora):
    results = []
    for bounds in BOUNDS.values():
        program, arguments = gradients(bounds, remat, lora)
        results.append(program(*arguments))
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, rtol=0)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(results[1]))


def temporaries(program, *arguments):
    return program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_gradients_take_the_memory_of_the_whole_stack(remat):
    whole, ranges = (temporaries(*_flat(gradients(bounds, remat))) for bounds in BOUNDS.values())
    assert ranges <= 1.1 * whole


@pytest.mark.parametrize("keep_kv", [False, True])
def test_the_forward_pass_copies_no_weights(keep_kv):
    graphdef, params = split()
    whole, ranges = (
        temporaries(
            jax.jit(lambda params, x, b=bounds: run(graphdef, params, b, x, keep_kv)), params, X
        )
        for bounds in BOUNDS.values()
    )
    assert ranges <= 1.1 * whole


def _flat(program_and_arguments):
    program, arguments = program_and_arguments
    return program, *arguments
