"""An InternVL checkpoint starts an InternVL-X run: tower and decoder taken, projector new."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from bpe_session import STEPS, TOKENIZER, VOCABULARY, train_config, write_data
from PIL import Image

from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.checkpoints.transfer import check_same_model, transfer
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import LvtcConfig, ProjectorConfig
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.models.params import abstract_model
from internvlx_jax.models.sharding import make_mesh
from internvlx_jax.training.loop import train


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


@pytest.mark.slow
def test_lvtc_trains_on_qwen3(tmp_path, make_checkpoint, golden):
    """A released layout, a BPE tokenizer, new projectors: a few steps change all of them."""
    config = json.loads((golden / "qwen3" / "internvl" / "config.json").read_text())
    llm = config["llm_config"] | {"vocab_size": VOCABULARY}
    prompt = {"template": "internvl2_5", "system_message": "", "max_dynamic_patch": 2}
    source = tmp_path / "source"
    make_checkpoint(source, "qwen3", "mlp1", llm_config=llm, **prompt)
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, source / file.name)
    Image.new("RGB", (112, 56), "white").save(tmp_path / "page.png")
    stored = open_checkpoint(source)
    lvtc = LvtcConfig(expand_layer=1, low_grid=1, high_grid=2, gate=0.3, inject_layers=(2,))
    model = dataclasses.replace(stored.config, projector=ProjectorConfig(kind="pvtc"), lvtc=lvtc)
    run = tmp_path / "run"
    training = dataclasses.replace(train_config(source, write_data(tmp_path), run), model=model)
    train(training)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == STEPS and losses[-1] < losses[0] and np.isfinite(losses).all()
    trained = RunFolder(run)
    added = [path for path in trained.shapes if path.startswith("lvtc.")]
    assert any("inject" in path for path in added) and added
    for path, array in trained.read_all(trained.shapes):
        assert np.isfinite(array).all(), path
        if path.startswith("decoder."):  # norms of queries and keys among them
            assert (np.asarray(array) != stored.read(path)).any(), path
    assert any(path.startswith("decoder.layers.attn.q_norm") for path in trained.shapes)
