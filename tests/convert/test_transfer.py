"""A checkpoint in a model with another LVTC: the report says what is taken (lvtc.md 2, 6.7)."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from internvlx_jax import load_pretrained
from internvlx_jax.checkpoints.hf_folder import HFFolder
from internvlx_jax.checkpoints.name_table import name_table
from internvlx_jax.checkpoints.run_writer import CheckpointWriter
from internvlx_jax.checkpoints.transfer import check_same_model
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.presets import lvtc_preset
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.models.params import abstract_model, flatten


def lvtc(name, *, expand_layer=0, **changes):
    preset = lvtc_preset(name, token_grid=2, expand_layer=expand_layer, inject_layers=(1,))
    return dataclasses.replace(preset, **changes)


def params(pretrained):
    return {
        path: np.asarray(x)
        for path, x in flatten(nnx.to_pure_dict(nnx.state(pretrained.model))).items()
    }


@pytest.fixture(scope="module")
def released(golden):
    """A checkpoint without LVTC, and its parameters."""
    return golden / "internlm2", params(load_pretrained(golden / "internlm2", dtype="float32"))


@pytest.fixture(scope="module")
def trained(released, tmp_path_factory):
    """A run folder of a model with `paper_inject`, gates at 0.5, and its parameters."""
    config = dataclasses.replace(HFFolder(released[0]).config, lvtc=lvtc("paper_inject", gate=0.5))
    generator = np.random.default_rng(0)
    values = {
        path: np.asarray(generator.standard_normal(leaf.shape), np.float32)
        for path, leaf in abstract_model(config, dtype="float32").shapes.items()
    }
    folder = tmp_path_factory.mktemp("transfer") / "run"
    with CheckpointWriter(folder, 1) as writer:
        writer.save(
            1,
            jax.tree.map(jnp.asarray, values),
            {"count": jnp.zeros(1)},
            {"model": to_dict(config)},
        )
    shutil.copytree(TOKENIZER_FOLDER, folder / "tokenizer")
    return folder, values


def check(source, lvtc, *, new, role):
    """Loads under `lvtc`: `new` parts are initialized and named, all others are the source's."""
    folder, values = source
    loaded = load_pretrained(folder, dtype="float32", lvtc=lvtc)
    ours = params(loaded)
    fresh = {path for path in ours if path.startswith(new)} if new else set()
    assert bool(fresh) == bool(new)
    for path in ours.keys() - fresh:
        np.testing.assert_array_equal(ours[path], values[path], err_msg=path)
    named = {line.split()[3] for line in loaded.report if line.startswith("new, seed 0: ")}
    assert named == fresh
    assert role in loaded.report[0]
    return ours, loaded.report


def test_a_released_checkpoint_under_each_preset(released):
    """The projector of 4 tokens per tile is the low one of `paper` and the high one of `fast`."""
    ours, report = check(
        released,
        lvtc("paper"),
        new=("lvtc.high.",),
        role="is the low projector: 4 tokens per tile for decoder layer 0",
    )
    assert ours["lvtc.high.gate"] == 0 and "new, seed 0: lvtc.high.gate [] ~ 0" in report
    kernel = next(line for line in report if "lvtc.high.projector.fc1.kernel" in line)
    bound = ours["lvtc.high.projector.fc1.kernel"].shape[0] ** -0.5
    assert kernel.endswith(f"~ U(-{bound:.4g}, {bound:.4g})")
    assert 0.9 * bound < np.abs(ours["lvtc.high.projector.fc1.kernel"]).max() <= bound
    check(
        released,
        lvtc("fast_inject", expand_layer=0, gate=0.25),
        new=("lvtc.",),
        role="is the high projector: 4 tokens per tile for the residual before decoder layer 0",
    )


@pytest.mark.parametrize(
    "changed, new, left",
    [
        (
            lvtc("paper", expand_layer=1, upsample="nearest", gate=0.0),
            (),
            ["lvtc.inject_1.gate", "lvtc.inject_1.projector"],
        ),
        (
            lvtc("fast"),
            ("lvtc.low.",),
            ["lvtc.high.projector", "lvtc.inject_1.gate", "lvtc.inject_1.projector"],
        ),
        (
            lvtc("fast_inject"),
            ("lvtc.low.", "lvtc.inject_1.projector."),
            ["lvtc.high.projector", "lvtc.inject_1.projector"],
        ),
        (lvtc("paper_inject", gate=None), (), ["lvtc.high.gate", "lvtc.inject_1.gate"]),
    ],
)
def test_a_trained_model_under_another_preset(trained, changed, new, left):
    """Trained gates stay although their projector, layer or start value is another."""
    _, report = check(trained, changed, new=new, role="projector: 4 tokens per tile")
    stated = [line for line in report if line.startswith("not taken over")]
    assert len(stated) == len(left) and all(
        f": {part} (" in line for part, line in zip(left, stated, strict=True)
    )


def test_the_own_lvtc_loads_without_remarks(trained):
    loaded = load_pretrained(trained[0], dtype="float32")
    assert loaded.report == () and loaded.config.lvtc == lvtc("paper_inject", gate=0.5)
    for path, value in params(loaded).items():
        np.testing.assert_array_equal(value, trained[1][path], err_msg=path)


def test_no_role_for_the_released_projector(released):
    """Two mlp projectors: projector.* is left, and said to be."""
    ours, report = check(
        released, lvtc("paper", low_projector="mlp"), new=("lvtc.",), role="projector.* has no role"
    )
    assert not any(path.startswith("projector.") for path in ours)
    assert report[-1].startswith("not taken over") and ": projector (" in report[-1]


@pytest.fixture
def folder(released, trained, tmp_path):
    """The trained model as a Hugging Face folder, by the name table read backwards."""
    shutil.copytree(released[0], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["lvtc"] = to_dict(lvtc("paper_inject", gate=0.5))
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    tensors = {}
    for entry in name_table(
        dataclasses.replace(HFFolder(released[0]).config, lvtc=lvtc("paper_inject"))
    ):
        value = trained[1][entry.target]
        for layer, array in enumerate(value if entry.layers else [value]):
            tensors |= zip(
                entry.sources(layer),
                (np.asarray(part, order="C") for part in entry.to_sources(array)),
                strict=True,
            )
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def test_hugging_face_folder_with_lvtc(folder, trained):
    """Names beside projector.* are ours (checkpoints.md 3); the config has the fields."""
    loaded = load_pretrained(folder, dtype="float32")
    assert loaded.config.lvtc == lvtc("paper_inject", gate=0.5)
    for path, value in params(loaded).items():
        np.testing.assert_array_equal(value, trained[1][path], err_msg=path)


def test_tensors_that_do_not_fit_their_config(folder):
    """Both sides are stated."""
    config = json.loads((folder / "config.json").read_text())

    def load(lvtc):
        (folder / "config.json").write_text(json.dumps(config | {"lvtc": lvtc}))
        load_pretrained(folder)

    with pytest.raises(CheckpointError) as caught:
        load(
            to_dict(lvtc("paper_inject", high_grid=2))
        )  # a region of 2 x 2 patches in place of one patch
    width = load_file(folder / "model.safetensors")["lvtc.high.fc1.weight"].shape[1]
    assert (
        f"tensor lvtc.high.norm.weight has shape [{width}], config.json implies [{4 * width}]"
        in str(caught.value)
    )
    with pytest.raises(
        ConfigError, match=r"lvtc.expand_layer 3 is outside 0\.\.2 of a decoder with 3 layers"
    ):
        load(to_dict(lvtc("paper")) | {"expand_layer": 3})
    with pytest.raises(ConfigError, match="lvtc.expnd_layer: .* did you mean expand_layer"):
        load({"expnd_layer": 1})
    with pytest.raises(ConfigError, match=r"no lvtc, but the checkpoint holds lvtc\.\* tensors"):
        load(None)


def test_a_run_states_in_what_its_model_differs_from_the_checkpoint(released):
    stored = HFFolder(released[0]).config
    rope = dataclasses.replace(stored.decoder.rope, theta=123.0)
    wanted = dataclasses.replace(
        stored, lvtc=lvtc("fast"), vision=dataclasses.replace(stored.vision, drop_path=0.3)
    )
    check_same_model(wanted, stored, released[0])
    wanted = dataclasses.replace(wanted, decoder=dataclasses.replace(stored.decoder, rope=rope))
    with pytest.raises(
        ConfigError,
        match=rf"(?s)internlm2.*model.decoder.rope.theta: 123.0, {stored.decoder.rope.theta}",
    ):
        check_same_model(wanted, stored, released[0])
