"""Freezing by regular expressions (spec: training.md 2)."""

import re

import jax
import numpy as np
import pytest

from internvlx_jax.errors import ConfigError
from internvlx_jax.training.freeze import describe, frozen_paths

SIZES = {"vision.layers.attn.kernel": (2, 8, 8), "vision.embedding": (8,), "projector.fc.kernel": (8, 16),
         "decoder.layers.attn_norm.scale": (3, 16), "decoder.layers.mlp.kernel": (3, 16, 16),
         "decoder.head": (16, 1000)}  # fmt: skip


@pytest.mark.parametrize("expressions, frozen", [
    ([], set()),
    (["vision"], {"vision.layers.attn.kernel", "vision.embedding"}),
    (["vision", "projector"], {"vision.layers.attn.kernel", "vision.embedding", "projector.fc.kernel"}),
    ([r"decoder\.layers\..*norm"], {"decoder.layers.attn_norm.scale"}),
    (["decoder.(?!head)"], {"decoder.layers.attn_norm.scale", "decoder.layers.mlp.kernel"}),
    ([r".*\.kernel$", "vision"], {"vision.layers.attn.kernel", "vision.embedding", "projector.fc.kernel",
                                  "decoder.layers.mlp.kernel"}),
])  # fmt: skip
def test_an_expression_matches_paths_from_their_beginning(expressions, frozen):
    assert frozen_paths(SIZES, expressions) == frozen


@pytest.mark.parametrize("expressions, message", [
    (["vision", "vit"], "freeze: 'vit' matches no parameter; paths begin with decoder, projector, vision"),
    (["layers"], "freeze: 'layers' matches no parameter"),
    (["head$"], "freeze: 'head$' matches no parameter"),
    (["decoder.(layers"], "freeze: 'decoder.(layers' is not a regular expression (missing )"),
    (["*norm"], "freeze: '*norm' is not a regular expression"),
    ([""], "freeze: the expressions match every parameter, nothing is left to train"),
    (["vision", "projector", "decoder"], "freeze: the expressions match every parameter"),
])  # fmt: skip
def test_an_expression_that_cannot_be_meant_is_an_error(expressions, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        frozen_paths(SIZES, expressions)


def test_the_counts_of_each_module_are_printed():
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SIZES.items()}
    lines = describe(shapes, {"vision.layers.attn.kernel", "vision.embedding", "decoder.head"}).splitlines()
    assert [line.split() for line in lines] == [
        ["vision", "0", "trained", "136", "frozen"],
        ["projector", "128", "trained", "0", "frozen"],
        ["decoder", "816", "trained", "16,000", "frozen"],
    ]
