"""The average of the parameters is an item of a checkpoint, stored once and restored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp

from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.checkpoints.run_format import Ema, find_average, join_average, split_average
from internvlx_jax.checkpoints.run_writer import CheckpointWriter
from internvlx_jax.core.overrides import to_dict

DATA = {"plan_hash": "a", "parts": {}}


def state(average):
    return (optax.EmptyState(), {"mu": jnp.arange(3.0)}, Ema(average))


def test_split_and_joined():
    average = {"decoder.head": jnp.ones(2)}
    rest, found = split_average(state(average))
    assert found is not None and found.keys() == average.keys()
    assert jax.tree.structure(rest) == jax.tree.structure(state({}))
    joined = join_average(rest, found)
    assert jax.tree.structure(joined) == jax.tree.structure(state(average))
    assert split_average((optax.EmptyState(),)) == ((optax.EmptyState(),), None)


def test_found_in_both_formats():
    assert find_average({"params": {"a": 1}, "ema": {"a": 1}}).names == {"a": "a"}
    earlier = find_average({"params": {"a.b": 1}, "opt_state": {"[3].ema['a.b']": 1, "[1].mu": 1}})
    assert (earlier.item, dict(earlier.names)) == ("opt_state", {"a.b": "[3].ema['a.b']"})
    assert find_average({"params": {}, "opt_state": {"[1].mu": 1}}) is None


def test_saved_once_and_restored(golden, tmp_path):
    model = to_dict(RunFolder(golden / "run_folder_0_1" / "run").config)
    params = {"decoder.head": jnp.arange(4.0)}
    before = state({"decoder.head": jnp.full(4, 0.5)})
    with CheckpointWriter(tmp_path, keep_last=1) as writer:
        writer.save(1, params, before, {"model": model, "data": DATA})
    stored = ocp.checkpointables_metadata(str(tmp_path / "checkpoints" / "1")).metadata
    assert stored.keys() == {"params", "opt_state", "ema"}
    assert stored["ema"].keys() == {"decoder.head"} and "ema" not in str(stored["opt_state"].keys())

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), (params, before)
    )
    with CheckpointWriter(tmp_path, keep_last=1) as writer:
        loaded = writer.load(1, *abstract, DATA)
    assert jax.tree.structure(loaded) == jax.tree.structure((params, before))
    for ours, theirs in zip(
        jax.tree.leaves(loaded), jax.tree.leaves((params, before)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(RunFolder(tmp_path, ema=True).read("decoder.head"), [0.5] * 4)
    np.testing.assert_array_equal(RunFolder(tmp_path).read("decoder.head"), [0, 1, 2, 3])
