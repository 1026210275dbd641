"""A model that is described must be the one that is filled."""

import jax
import pytest
from flax import nnx

from internvlx_jax.core.model_config import LoraConfig
from internvlx_jax.core.overrides import load_config_file
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.params import AbstractModel, abstract_model


@pytest.mark.parametrize("lora", [(), (LoraConfig(part="decoder", rank=2, alpha=4, dropout=0.0),)])
def test_a_description_is_that_of_a_model_with_values(lora):
    config = load_config_file("configs/ablation_pages.py:variant=x-inject,preset=tiny").model

    def make(rngs):
        return InternVLX(config, rngs=rngs, dtype="float32", lora=lora)

    drawn = AbstractModel.of(jax.eval_shape(lambda: make(nnx.Rngs(0))))
    described = abstract_model(config, dtype="float32", lora=lora)
    assert described == drawn
    assert any("lora_" in path for path in described.shapes) == bool(lora)
