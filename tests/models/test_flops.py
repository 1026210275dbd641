"""Analytic FLOPs against the check values of training.md 8 and a walk of the traced model."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from internvlx_jax.core.inputs import Inputs, ShortLayout
from internvlx_jax.core.model_config import (
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.presets import internvlx_2b, internvlx_8b, lvtc_preset
from internvlx_jax.core.run_config import FreezeConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.models.flops import Flops, forward_flops, train_flops
from internvlx_jax.models.layers import separate_layers
from internvlx_jax.models.lora import is_adapter
from internvlx_jax.models.params import abstract_model, unflatten
from internvlx_jax.training.freeze import as_trained, divide, join


@pytest.mark.parametrize(
    "model, pvtc, token, row",
    [
        (internvlx_2b(), 103.1, 3.399, 15.57),
        (internvlx_8b(), 395.2, 14.717, 64.68),
    ],
)
def test_check_values(model, pvtc, token, row):
    one_tile = forward_flops(model, tiles=1, lengths=[0])
    assert one_tile.tower / 1e9 == pytest.approx(723.6, abs=0.05)
    assert one_tile.projector / 1e9 == pytest.approx(pvtc, abs=0.05)
    tokens = forward_flops(
        model, tiles=0, lengths=[1] * 1000
    )  # attention of single tokens is negligible
    assert tokens.total / 1e12 == pytest.approx(token, rel=1e-3)
    assert forward_flops(model, tiles=0, lengths=[4096]).total / 1e12 == pytest.approx(
        row, rel=1e-3
    )


@functools.cache
def abstract(config):
    return abstract_model(config, dtype="float32")


def shapes_of(config, *beginnings):
    """Path -> shape of the parameters that begin so; all without one."""
    return {
        path: leaf.shape
        for path, leaf in abstract(config).shapes.items()
        if path.startswith(beginnings or ("",))
    }


def test_backward_by_what_is_trained():
    """By hand, for a row of 4,096 slots with one tile of the 2B model."""
    model, work = internvlx_2b(), dict(tiles=1, lengths=[4096])
    forward = forward_flops(model, **work)
    attention = 24 * 2 * 4096**2 * 2048  # of the decoder; queries are 2,048 wide
    regions = 2 * 4 * 256 * 4 * 2048  # of PVTC, two branches

    assert train_flops(model, shapes_of(model), **work).total == pytest.approx(3 * forward.total)
    second_finetune = train_flops(model, shapes_of(model, "projector", "decoder"), **work)
    assert second_finetune == Flops(
        forward.tower, 3 * forward.projector, 3 * forward.decoder, 3 * forward.head
    )
    warm_up = train_flops(model, shapes_of(model, "projector"), **work)
    assert warm_up == Flops(
        forward.tower, 3 * forward.projector, 2 * forward.decoder + attention, 2 * forward.head
    )
    tower = train_flops(model, shapes_of(model, "vision"), **work)
    assert tower.tower == 3 * forward.tower and tower.projector == pytest.approx(
        2 * forward.projector + regions
    )
    assert train_flops(model, shapes_of(model, "decoder.head"), **work) == Flops(
        forward.tower, forward.projector, forward.decoder, 3 * forward.head
    )
    embedding = train_flops(model, shapes_of(model, "decoder.embedding"), **work)
    assert (
        embedding.decoder == 2 * forward.decoder + attention
        and embedding.projector == forward.projector
    )

    # The last 4 of the tower's 24 layers, of 30.08 GFLOP each.
    last = {path: (4, *shape[1:]) for path, shape in shapes_of(model, "vision.layers").items()}
    partly = train_flops(model, last, **work)
    assert (partly.tower - forward.tower) / 1e9 == pytest.approx(2 * 4 * 30.08, rel=1e-3)
    assert partly.decoder == warm_up.decoder

    # Rank 16 on every linear map of the decoder: 983,040 weights a rank.
    lora = [LoraConfig(part="decoder", rank=16, alpha=32)]
    adapted = abstract_model(model, dtype="float32", lora=lora)
    adapters = {path: leaf.shape for path, leaf in adapted.shapes.items() if is_adapter(path)}
    lora = train_flops(model, adapters, **work)
    assert lora.decoder == pytest.approx(warm_up.decoder + 3 * 2 * 16 * 983_040 * 4096)
    assert (lora.tower, lora.projector, lora.head) == (
        forward.tower,
        forward.projector,
        warm_up.head,
    )


def test_shallow_layers_below_what_lvtc_adds_cost_nothing():
    model = internvlx_2b("paper")
    work = dict(tiles=2, lengths=[4096], short_lengths=[2560])
    forward = forward_flops(model, **work)
    shallow = forward_flops(model, tiles=0, lengths=[0], short_lengths=[2560]).decoder
    added = train_flops(model, shapes_of(model, "lvtc"), **work)
    deep_attention = 5 * 2 * 4096**2 * 2048
    assert added.decoder == pytest.approx(
        shallow + 2 * (forward.decoder - shallow) + deep_attention
    )
    assert train_flops(model, shapes_of(model, "projector"), **work).decoder > added.decoder


def dot_flops(jaxpr):
    """FLOPs of every matrix product in a jaxpr; a scanned body counts as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (
                2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
            )
        for inner in jaxprs_in_params(equation.params):
            total += dot_flops(inner) * equation.params.get("length", 1)
    return total


@pytest.mark.parametrize(
    "family, head_dim, lvtc",
    [
        ("internlm2", 8, "off"),
        ("internlm2", 8, "paper_inject"),
        ("internlm2", 8, "fast"),
        ("qwen3", 24, "off"),  # heads x head_dim is three times the width
        ("qwen3", 24, "paper_inject"),
        ("qwen3", 24, "fast"),
    ],
)
def test_every_matrix_product_is_counted(family, head_dim, lvtc):
    """Against a walk of the traced model.

    Only causal attention differs: XLA computes both halves.
    """
    decoder = DecoderConfig(
        family=family,
        vocab_size=99,
        width=32,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        mlp_width=48,
        qk_norm=family == "qwen3",
    )
    config = ModelConfig(
        vision=VisionConfig(width=16, layers=2, heads=2, mlp_width=32, image_size=56),
        decoder=decoder,
        lvtc=lvtc_preset(lvtc, token_grid=2, expand_layer=1, inject_layers=(2, 3)),
        prompt=PromptConfig(tiles=TileConfig(tile_size=56)),
    )
    rows, tiles, length = 2, 3, 80
    saved = tiles * config.lvtc.saved_per_tile if config.lvtc else 0
    shapes = jax.eval_shape(lambda: short_batch(config, rows, tiles, length, length - saved))
    abstract = abstract_model(config, dtype="float32", attention="xla")

    def logits(params, inputs):
        model = nnx.merge(abstract.graphdef, unflatten(params))
        return model.decoder.logits(model(inputs))

    counted = dot_flops(jax.make_jaxpr(logits)(abstract.shapes, shapes).jaxpr)
    shallow = config.lvtc.expand_layer if config.lvtc else 0
    queries = decoder.heads * head_dim
    causal_half = rows * 2 * queries * (shallow * (length - saved) ** 2 + (4 - shallow) * length**2)
    flops = forward_flops(
        config, tiles=rows * tiles, lengths=[length] * rows, short_lengths=[length - saved] * rows
    )
    assert counted == pytest.approx(flops.total + causal_half, rel=1e-6)


def short_batch(config, rows, tiles, length, short_length):
    """Inputs of the right shapes; nothing is computed with their values."""

    def ints(*shape):
        return jnp.zeros(shape, jnp.int32)

    short = None
    if config.lvtc:
        short = ShortLayout(
            ints(rows, short_length),
            ints(rows, length),
            ints(rows, tiles),
            ints(rows, short_length),
        )
    size = config.vision.image_size
    return Inputs(
        ints(rows, length),
        ints(rows, length),
        ints(rows, length),
        jnp.zeros((rows, tiles, size, size, 3), jnp.uint8),
        ints(rows, length),
        short,
    )


SMALL = ModelConfig(
    vision=VisionConfig(width=512, layers=4, heads=4, mlp_width=2048, image_size=224),
    decoder=DecoderConfig(
        vocab_size=2048, width=512, layers=3, heads=4, kv_heads=2, head_dim=128, mlp_width=1536
    ),
    prompt=PromptConfig(tiles=TileConfig(tile_size=224)),
)


def count_of_xla(function, *args):
    """Before anything is fused or removed.

    The body of a scan would count once, so there must be none.
    """
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


@pytest.mark.parametrize(
    "freeze",
    [
        None,
        FreezeConfig(),
        FreezeConfig(vit=True),
        FreezeConfig(vit=True, llm=True),
        FreezeConfig(vit=True, unfreeze_vit_last=1, projector=True, llm=True),
    ],
    ids=["forward", "all", "projector and decoder", "projector", "a layer of the tower"],
)
def test_the_count_of_xla(freeze):
    """Counts an unrolled model within 3 %. XLA counts element-wise work too, both halves of causal
    attention, and the logits that the backward pass computes again.
    """
    work = dict(tiles=4, lengths=[256, 256])
    inputs = jax.eval_shape(lambda: short_batch(SMALL, 2, 2, 256, 256))
    labels = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    build = functools.partial(abstract_model, dtype="float32", attention="xla")
    partition = divide(build(SMALL).shapes, freeze or FreezeConfig(), "float32")
    abstract = as_trained(build, SMALL, partition, "eval")

    def loss(trained, frozen, inputs, labels):
        model = nnx.merge(abstract.graphdef, unflatten(join(trained, frozen)))
        model.vision.layers = separate_layers(model.vision.layers, 4)
        model.decoder.layers = separate_layers(model.decoder.layers, 3)
        return jnp.sum(model.token_losses(inputs, labels)[0])

    forward, causal_half = forward_flops(SMALL, **work), 3 * 2 * 2 * 256**2 * 512
    args = (partition.trained, partition.frozen, inputs, labels)
    if freeze is None:
        counted, expected = count_of_xla(loss, *args), forward.total + causal_half
    else:
        shapes = {path: leaf.shape for path, leaf in partition.trained.items()}
        counted = count_of_xla(jax.grad(loss), *args)
        expected = train_flops(SMALL, shapes, **work).total + 3 * causal_half + forward.head
    print(f"counted / expected = {counted / expected:.4f}")
    assert counted == pytest.approx(expected, rel=0.03)
