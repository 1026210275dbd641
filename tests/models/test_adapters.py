"""Adapters: nothing at first, then the merged weights; dropout in training (training.md 11)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvlx_jax.checkpoints.adapters import merge_params, stored_adapters
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import (
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.models.lora import is_adapter
from internvlx_jax.models.params import (
    abstract_model,
    init_adapters,
    init_params,
    unflatten,
    without_adapters,
)

LORAS = (
    LoraConfig(part="vision", rank=3, alpha=6.0),
    LoraConfig(part="decoder", rank=4, alpha=2.0, use_rslora=True),
)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 90, (2, 20)).astype(np.int32)
    index = np.where(np.arange(20) < 4, np.arange(20), 4)[None].repeat(2, 0).astype(np.int32)
    return Inputs(
        tokens,
        np.arange(20, dtype=np.int32)[None].repeat(2, 0),
        np.ones_like(tokens),
        rng.integers(0, 256, (2, 1, 56, 56, 3), np.uint8),
        index,
    )


@pytest.fixture(scope="module", params=["internlm2", "qwen2", "qwen3"])
def model(request):
    """Config, structures without and with adapters, parameters of the base."""
    config = ModelConfig(
        vision=VisionConfig(width=16, layers=2, heads=2, mlp_width=32, image_size=56),
        decoder=DecoderConfig(
            family=request.param,
            vocab_size=99,
            width=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=8,
            mlp_width=48,
            initializer_range=0.2,
            qk_norm=request.param == "qwen3",
        ),
        prompt=PromptConfig(tiles=TileConfig(tile_size=56)),
    )
    options = dict(dtype="float32", attention="xla")
    base, adapted = abstract_model(config, **options), abstract_model(config, **options, lora=LORAS)
    return config, base, adapted, init_params(config, 0)


def fresh(adapted, seed=0):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return init_adapters(adapted, seed, dict.fromkeys(adapted.shapes, here))


@jax.jit(
    static_argnums=0, compiler_options={"xla_backend_optimization_level": 3}
)  # as a run is: bits are compared
def hidden(graphdef, params, inputs, key=None):
    model = nnx.merge(graphdef, unflatten(params))
    return model(inputs, dropout_key=key)


def test_names_and_shapes(model):
    """Every linear map of the layers.

    Checkpoints of Qwen2 keep q, k and v apart, those of InternLM2 do not.
    """
    config, base, adapted, _ = model
    adapters = {path: leaf.shape for path, leaf in adapted.shapes.items() if is_adapter(path)}
    maps = {
        path.removesuffix(".kernel")
        for path in base.shapes
        if ".layers." in path and path.endswith(".kernel")
    }
    assert {path.rpartition(".")[0] for path in adapters} == maps and len(maps) == 9
    assert without_adapters(adapted).shapes == base.shapes
    assert adapters["vision.layers.attn.qkv.lora_b"] == (2, 3, 3, 2, 8)
    assert adapters["decoder.layers.attn.out.lora_a"] == (2, 4, 8, 4)
    assert adapted.axes["decoder.layers.attn.out.lora_a"] == ("layers", "heads", None, None)
    packed = {path: shape for path, shape in adapters.items() if "decoder.layers.attn.qkv" in path}
    module = "decoder.layers.attn.qkv."
    if config.decoder.family == "internlm2":
        assert packed == {f"{module}lora_a": (2, 32, 4), f"{module}lora_b": (2, 4, 2, 4, 8)}
    else:
        assert {path: shape for path, shape in packed.items() if "lora_b" in path} == {
            f"{module}lora_b_q": (2, 4, 2, 2, 8),
            f"{module}lora_b_k": (2, 4, 2, 1, 8),
            f"{module}lora_b_v": (2, 4, 2, 1, 8),
        }
        assert {packed[f"{module}lora_a_{x}"] for x in "qkv"} == {(2, 32, 4)}


@pytest.mark.parametrize("family", ["internlm2", "llama", "qwen2", "phi3"])
def test_checkpoints_of_every_family_know_the_names(family):
    """Where gate and up are one tensor of a checkpoint (Phi-3), they have two adapters here."""
    config = ModelConfig(
        vision=VisionConfig(width=16, layers=2, heads=2, mlp_width=32, image_size=56),
        projector=ProjectorConfig(kind="mlp1"),
        decoder=DecoderConfig(
            family=family,
            vocab_size=99,
            width=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=8,
            mlp_width=48,
        ),
        prompt=PromptConfig(tiles=TileConfig(tile_size=56)),
    )
    adapted = abstract_model(config, dtype="float32", attention="xla", lora=LORAS)
    for lora in LORAS:
        found = stored_adapters(config, lora.part, adapted.shapes)
        assert (
            len({adapter.base.target for adapter in found})
            == {"vision": 4, "decoder": 5}[lora.part]
        )
        for adapter in found:
            for pair in adapter.pairs:
                a, b = (adapted.shapes[entry.target].shape for entry in pair)
                assert a[-1] == b[1] == lora.rank


@pytest.mark.slow
def test_the_first_step_is_that_of_the_base(model, inputs):
    _, base, adapted, params = model
    adapters = fresh(adapted)
    expected = hidden(base.graphdef, params, inputs)
    np.testing.assert_array_equal(
        hidden(adapted.graphdef, {**params, **adapters}, inputs), expected
    )
    np.testing.assert_array_equal(
        hidden(adapted.graphdef, {**params, **adapters}, inputs, jax.random.key(0)), expected
    )
    for path, value in adapters.items():
        if ".lora_b" in path:
            assert not np.any(value), path
        else:  # Kaiming with a = sqrt 5
            bound = np.prod(value.shape[1:-1]) ** -0.5
            assert 0.9 * bound < np.abs(value).max() <= bound, path
    path = "vision.layers.mlp.fc1.lora_a"
    assert np.any(fresh(adapted, seed=1)[path] != adapters[path])


@pytest.fixture(scope="module")
def trained(model):
    """Parameters with adapters that do something."""
    _, _, adapted, params = model
    rng = np.random.default_rng(1)
    return {
        **params,
        **{
            path: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)
            for path, leaf in adapted.shapes.items()
            if is_adapter(path)
        },
    }


def test_merged_weights_compute_the_same(model, inputs, trained):
    config, base, adapted, params = model
    unmerged = np.asarray(hidden(adapted.graphdef, trained, inputs))
    merged = merge_params(trained, config, LORAS)
    assert merged.keys() == params.keys()
    np.testing.assert_allclose(hidden(base.graphdef, merged, inputs), unmerged, atol=1e-4)
    assert np.abs(unmerged - hidden(base.graphdef, params, inputs)).max() > 0.05
    kept = merge_params(
        {path: value.astype(jnp.bfloat16) for path, value in trained.items()}, config, LORAS
    )
    assert {value.dtype for value in kept.values()} == {jnp.bfloat16.dtype}


@pytest.mark.slow
def test_dropout_acts_in_training_only(model, inputs, trained):
    graphdef = model[2].graphdef
    draws = [
        np.asarray(hidden(graphdef, trained, inputs, jax.random.key(seed))) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-3
    plain = np.asarray(hidden(graphdef, trained, inputs))
    assert np.abs(draws[0] - plain).max() > 1e-3


def test_a_part_has_one_kind_of_adapters(model):
    config = model[0]
    with pytest.raises(ConfigError, match="lora: decoder, decoder name a part twice"):
        abstract_model(config, dtype="float32", lora=[LORAS[1], LORAS[1]])
    with pytest.raises(ConfigError, match="lora.rank is 0, it must be at least 1"):
        dataclasses.replace(LORAS[0], rank=0)
