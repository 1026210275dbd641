"""An InternVL checkpoint starts an InternVL-X run: tower and decoder taken, projector new."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.checkpoints.transfer import check_same_model, transfer
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import LvtcConfig, ProjectorConfig
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.models.params import abstract_model
from internvlx_jax.models.sharding import make_mesh


@pytest.mark.parametrize("lvtc", [None, LvtcConfig(expand_layer=2, low_grid=2, high_grid=4)])
def test_tower_and_decoder_are_taken(golden, lvtc):
    source = open_checkpoint(golden / "qwen3" / "internvl")
    config = dataclasses.replace(source.config, projector=ProjectorConfig(kind="pvtc"), lvtc=lvtc)
    check_same_model(config, source.config, Path("base"))
    abstract = abstract_model(config, dtype="float32")
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    found = transfer(source, config, abstract, mesh, seed=0)
    assert found.params.keys() == abstract.shapes.keys()
    for path, array in found.params.items():
        if path.startswith(("vision.", "decoder.")):
            np.testing.assert_array_equal(array, source.read(path), err_msg=path)
    report = "\n".join(found.report)
    assert "projector.* is a new pvtc" in report and "holds mlp1" in report
    new = [line for line in found.report if line.startswith("new, seed 0: ")]
    assert len(new) == sum(path.startswith(("projector.", "lvtc.")) for path in abstract.shapes)
    assert "not taken over" in report


def test_another_decoder_is_still_refused(golden):
    stored = open_checkpoint(golden / "qwen3" / "internvl").config
    wanted = dataclasses.replace(
        stored,
        projector=ProjectorConfig(kind="pvtc"),
        decoder=dataclasses.replace(stored.decoder, layers=4),
    )
    with pytest.raises(ConfigError, match="model.decoder.layers: 4, 3"):
        check_same_model(wanted, stored, Path("base"))
