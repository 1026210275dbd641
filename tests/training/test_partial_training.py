"""Runs that train a part: adapters, or the last layers of the tower (training.md 2, 11, 13)."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax import nnx

from internvlx_jax import load_pretrained
from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.convert.export_hf import export_checkpoint
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import LoraConfig
from internvlx_jax.core.run_config import ComputeConfig, FreezeConfig, OptimizerConfig
from internvlx_jax.models.lora import is_adapter
from internvlx_jax.models.params import flatten
from internvlx_jax.training.loop import train
from internvlx_jax.training.replay import replay

pytestmark = pytest.mark.slow

STEPS = 3
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0)


@pytest.fixture
def partial_run(tiny_run):
    """In bfloat16, in one bucket."""

    def make(name, **changes):
        config = tiny_run(
            name, steps=STEPS, compute=ComputeConfig(dtype="bfloat16", remat="full"), **changes
        )
        return dataclasses.replace(config, data=dataclasses.replace(config.data, max_executables=1))

    return make


def stored(config):
    """Everything in the last checkpoint: item -> path -> array."""
    items = ocp.load_checkpointables(Path(config.output_dir) / "checkpoints" / str(STEPS))
    return {
        item: {path: np.asarray(leaf) for path, leaf in items[item].items()}
        for item in ("params", "opt_state")
    }


def test_adapters_only(partial_run, tiny_params):
    """The base stays as it was, bit for bit and in bfloat16.

    Stopping and resuming gives the straight run.
    """
    changes = dict(
        lora=(
            LoraConfig(part="vision", rank=2, alpha=4.0),
            LoraConfig(part="decoder", rank=4, alpha=8.0),
        ),
        freeze=FreezeConfig(train_lora_only=True),
        optimizer=OPTIMIZER,
    )
    straight, halves = partial_run("straight", **changes), partial_run("halves", **changes)
    train(straight)
    train(halves, stop_after=2)
    train(halves)
    expected, resumed = stored(straight), stored(halves)
    for item, leaves in expected.items():
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(resumed[item][path], leaf, err_msg=path)

    params = expected["params"]
    for path, value in tiny_params.items():
        np.testing.assert_array_equal(params[path], value.astype(jnp.bfloat16), err_msg=path)
    adapters = {path for path in params if is_adapter(path)}
    assert params.keys() == tiny_params.keys() | adapters
    assert all(np.any(params[path]) and params[path].dtype == np.float32 for path in adapters)
    moments = [path for path in expected["opt_state"] if ".mu" in path]
    assert len(moments) == len(adapters) and all(is_adapter(path) for path in moments)

    again = replay(
        straight.output_dir, STEPS, []
    )  # from the last checkpoint, with the adapters beside the base
    assert again["parameters_of_step"] == STEPS and again["grad_norm"].keys() == {
        "all",
        "vision",
        "decoder",
    }
    assert all(np.isfinite(row["loss"]) for row in again["rows"])

    merged = weights(straight)  # what evaluation computes with
    assert merged.keys() == tiny_params.keys()
    kernel = "decoder.layers.mlp.up.kernel"
    delta = np.einsum(
        "lir,lro->lio",
        params["decoder.layers.mlp.up.lora_a"],
        params["decoder.layers.mlp.up.lora_b"],
    )
    base = np.asarray(params[kernel], np.float32)
    np.testing.assert_allclose(merged[kernel] - base, 2 * delta, atol=1e-6)
    folder = Path(straight.output_dir).with_name("adapters")
    export_checkpoint(open_checkpoint(straight.output_dir), folder, layout="peft")
    written = {each.name for each in folder.rglob("adapter_config.json")}
    assert (
        written == {"adapter_config.json"}
        and len(list(folder.rglob("adapter_model*.safetensors"))) == 2
    ), "one a part"


def weights(config, **options):
    return {
        path: np.asarray(value)
        for path, value in flatten(
            nnx.to_pure_dict(
                nnx.state(load_pretrained(config.output_dir, dtype="float32", **options).model)
            )
        ).items()
    }


def test_the_last_layers_of_the_tower_and_an_average(partial_run, tiny_params):
    config = partial_run(
        "last",
        freeze=FreezeConfig(vit=True, unfreeze_vit_last=1, projector=True),
        optimizer=dataclasses.replace(OPTIMIZER, ema_decay=0.5),
    )
    train(config, stop_after=1)
    train(config)
    after, mean = weights(config), weights(config, ema=True)
    for path, value in tiny_params.items():
        frozen = value.astype(jnp.bfloat16).astype(np.float32)
        if path.startswith("vision.layers."):
            np.testing.assert_array_equal(after[path][0], frozen[0], err_msg=path)
            np.testing.assert_array_equal(mean[path][0], frozen[0], err_msg=path)
            assert np.any(after[path][1] != value[1]) and np.any(mean[path][1] != after[path][1]), (
                path
            )
        elif path.startswith(("vision.", "projector.")):
            np.testing.assert_array_equal(after[path], frozen, err_msg=path)
            np.testing.assert_array_equal(mean[path], frozen, err_msg=path)
        else:
            assert np.any(after[path] != value) and np.any(mean[path] != after[path]), path
    folder = Path(config.output_dir).with_name("exported")
    export_checkpoint(
        open_checkpoint(config.output_dir, ema=True), folder, layout="internvl-x", dtype="keep"
    )
    exported = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in flatten(
            nnx.to_pure_dict(nnx.state(load_pretrained(folder, dtype="float32").model))
        ).items()
    }
    for path, value in mean.items():
        np.testing.assert_array_equal(exported[path], value, err_msg=path)
    moments = stored(config)["opt_state"]
    assert moments["[1].mu['vision.layers.ls1']"].shape == (1, 16)


def test_a_run_without_an_average_says_so(partial_run, golden):
    config = partial_run(
        "plain", freeze=FreezeConfig(vit=True, projector=True, llm=True, unfreeze_head=True)
    )
    train(config, stop_after=1)
    with pytest.raises(
        ConfigError, match=r"kept no average of its parameters \(optimizer.ema_decay\)"
    ):
        load_pretrained(config.output_dir, ema=True)
    with pytest.raises(ConfigError, match="is no run folder of train.py"):
        load_pretrained(golden / "internlm2", ema=True)


def test_a_trained_base_under_adapters_is_an_error(partial_run):
    with pytest.raises(
        ConfigError, match="decoder.layers.attn.out.kernel is trained, and so is its adapter"
    ):
        train(partial_run("both", lora=(LoraConfig(part="decoder", rank=2, alpha=4.0),)))
