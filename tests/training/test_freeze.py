"""What is trained, by shorthands and by regular expressions (design: training.md 2)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.run_config import FreezeConfig
from internvlx_jax.training.freeze import describe, divide, join

SIZES = {
    "vision.layers.attn.kernel": (4, 8, 8),
    "vision.embedding": (8,),
    "projector.fc.kernel": (8, 16),
    "lvtc.high.gate": (),
    "decoder.layers.attn_norm.scale": (3, 16),
    "decoder.layers.mlp.kernel": (3, 16, 16),
    "decoder.head": (16, 1000),
}
SHAPES = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SIZES.items()}
VIT = {"vision.layers.attn.kernel", "vision.embedding"}
LLM = {"decoder.layers.attn_norm.scale", "decoder.layers.mlp.kernel", "decoder.head"}


@pytest.mark.parametrize(
    "config, frozen",
    [
        (FreezeConfig(), set()),
        (FreezeConfig(vit=True), VIT),
        (FreezeConfig(projector=True), {"projector.fc.kernel", "lvtc.high.gate"}),
        (FreezeConfig(vit=True, llm=True), VIT | LLM),
        (FreezeConfig(vit=True, llm=True, unfreeze_head=True), VIT | LLM - {"decoder.head"}),
        (FreezeConfig(paths=("vision",)), VIT),
        (
            FreezeConfig(paths=(r"decoder\.layers\..*norm",), projector=True),
            {"decoder.layers.attn_norm.scale", "projector.fc.kernel", "lvtc.high.gate"},
        ),
        (FreezeConfig(paths=("decoder.(?!head)",)), LLM - {"decoder.head"}),
        (
            FreezeConfig(paths=(r".*\.kernel$", "vision")),
            VIT | {"projector.fc.kernel", "decoder.layers.mlp.kernel"},
        ),
        (FreezeConfig(vit=True, unfreeze_vit_last=4), VIT - {"vision.layers.attn.kernel"}),
        (
            FreezeConfig(vit=True, unfreeze_vit_last=2, paths=(".*attn",)),
            VIT | {"decoder.layers.attn_norm.scale"},
        ),
    ],
)
def test_what_is_frozen(config, frozen):
    partition = divide(SHAPES, config, "bfloat16")
    assert partition.frozen.keys() == frozen and partition.trained.keys() == SHAPES.keys() - frozen
    assert {leaf.dtype for leaf in partition.frozen.values()} <= {jnp.bfloat16.dtype}
    assert {leaf.dtype for leaf in partition.trained.values()} == {jnp.float32.dtype}
    assert list(partition.whole) == list(SHAPES) and partition.frozen_tower_layers == 0


def test_the_last_layers_of_the_tower():
    """Their stack is divided, and put together again."""
    partition = divide(SHAPES, FreezeConfig(vit=True, unfreeze_vit_last=1), "bfloat16")
    path = "vision.layers.attn.kernel"
    assert partition.frozen_tower_layers == 3
    assert partition.trained[path] == jax.ShapeDtypeStruct((1, 8, 8), jnp.float32)
    assert partition.frozen[path] == jax.ShapeDtypeStruct((3, 8, 8), jnp.bfloat16)
    assert (
        partition.whole[path] == SHAPES[path]
        and partition.whole["vision.embedding"].dtype == jnp.bfloat16
    )

    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SIZES.items()
    }
    trained, frozen = partition.split(params)
    assert {p: (a.shape, a.dtype) for p, a in trained.items()} == {
        p: (a.shape, a.dtype) for p, a in partition.trained.items()
    }
    assert {p: (a.shape, a.dtype) for p, a in frozen.items()} == {
        p: (a.shape, a.dtype) for p, a in partition.frozen.items()
    }
    whole = join(trained, frozen)
    np.testing.assert_array_equal(whole[path][3], params[path][3])
    np.testing.assert_array_equal(
        whole[path][:3], params[path][:3].astype(jnp.bfloat16).astype(jnp.float32)
    )
    again = join(*partition.split(whole))  # what is stored in the compute dtype stays as it is
    for path in SIZES:
        np.testing.assert_array_equal(again[path], whole[path], err_msg=path)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            dict(paths=("vision", "vit")),
            "freeze.paths: 'vit' matches no parameter; "
            "paths begin with decoder, lvtc, projector, vision",
        ),
        (dict(paths=("layers",)), "freeze.paths: 'layers' matches no parameter"),
        (dict(paths=("head$",)), "freeze.paths: 'head$' matches no parameter"),
        (
            dict(paths=("decoder.(layers",)),
            "freeze.paths: 'decoder.(layers' is not a regular expression (missing )",
        ),
        (dict(paths=("*norm",)), "freeze.paths: '*norm' is not a regular expression"),
        (dict(paths=("",)), "freeze: every parameter is frozen, nothing is left to train"),
        (dict(vit=True, projector=True, llm=True), "freeze: every parameter is frozen"),
        (
            dict(vit=True, unfreeze_vit_last=5),
            "freeze.unfreeze_vit_last is 5, the tower has 4 layers",
        ),
        (dict(unfreeze_vit_last=2), "freeze.unfreeze_vit_last needs freeze.vit=true"),
        (dict(unfreeze_head=True), "freeze.unfreeze_head needs freeze.llm=true"),
    ],
)
def test_what_cannot_be_meant_is_an_error(config, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        divide(SHAPES, FreezeConfig(**config), "bfloat16")


def test_a_decoder_without_head_says_so():
    shapes = {path: leaf for path, leaf in SHAPES.items() if path != "decoder.head"}
    with pytest.raises(ConfigError, match="its embeddings serve as one"):
        divide(shapes, FreezeConfig(llm=True, unfreeze_head=True), "bfloat16")


def test_the_counts_of_each_module_are_printed():
    partition = divide(
        SHAPES, FreezeConfig(vit=True, unfreeze_vit_last=1, paths=("decoder.head",)), "float32"
    )
    assert [line.split() for line in describe(partition).splitlines()] == [
        ["decoder", "816", "trained", "16,000", "frozen"],
        ["lvtc", "1", "trained", "0", "frozen"],
        ["projector", "128", "trained", "0", "frozen"],
        ["vision", "64", "trained", "200", "frozen"],
    ]
