"""Tiny checkpoints of every family and projector, with random weights."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from internvlx_jax.checkpoints.hf_config import model_config
from internvlx_jax.checkpoints.name_table import name_table
from internvlx_jax.checkpoints.torch_checkpoint import expected_tensors
from internvlx_jax.models.params import abstract_model

DECODERS = {
    "internlm2": {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": True,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 24,  # heads x head_dim is not the width
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "sliding_window": 40,
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8},
    },
}


def dtype_of(name):
    return np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(name, name))


@pytest.fixture(scope="session")
def make_checkpoint(golden):
    """make(folder, family, projector, dtype): a checkpoint folder; returns its tensors."""

    def make(folder, family="internlm2", projector="pvtc", dtype="float32", tied=False, **changes):
        config = json.loads((golden / "internlm2" / "config.json").read_text())
        config["llm_config"] |= DECODERS[family] | {"num_hidden_layers": 2}
        if tied:
            config["llm_config"]["tie_word_embeddings"] = True
        config |= {"torch_dtype": dtype, "a_field_of_others": [1, {"x": None}], **changes}
        marker = "mlp1.0.weight" if projector == "mlp1" else "projector.cls_scale"
        heads = [] if tied else ["language_model.lm_head.weight"]
        parsed = model_config(config, [marker, *heads])
        rng = np.random.default_rng(0)
        tensors = {
            name: np.asarray(rng.normal(0, 0.1, shape) + ("norm" in name), dtype_of(dtype))
            for name, shape in expected_tensors(
                name_table(parsed), abstract_model(parsed, dtype="float32")
            ).items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors

    return make


@pytest.fixture(scope="session")
def same_tensors():
    """Names and bytes of two checkpoint folders are equal."""

    def check(one, other):
        first, second = load_all(one), load_all(other)
        assert first.keys() == second.keys()
        for name, array in first.items():
            assert array.dtype == second[name].dtype and array.shape == second[name].shape, name
            assert array.tobytes() == second[name].tobytes(), name

    return check


def load_all(folder):
    return {
        name: array
        for file in folder.glob("*.safetensors")
        for name, array in load_file(file).items()
    }


@pytest.fixture(scope="session")
def rewrite_tensors():
    """rewrite(folder, change): change(tensors) edits the dict of model.safetensors."""

    def rewrite(folder, change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite
