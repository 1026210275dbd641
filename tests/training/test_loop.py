"""The loop end to end: exact resume, one executable per bucket, clear refusals (training.md 10)."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from kill_run import finish, start, write_config
from PIL import Image

from internvlx_jax import load_pretrained
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.run_config import FreezeConfig, MeshConfig, OptimizerConfig
from internvlx_jax.data.synthetic import FILES, SyntheticConfig, generate
from internvlx_jax.models.params import flatten
from internvlx_jax.training import loop
from internvlx_jax.training.loop import train

pytestmark = pytest.mark.slow


def metrics(config):
    rows = [
        json.loads(line)
        for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        (row["step"], row["loss"], row["grad_norm"], row["learning_rate"])
        for row in rows
        if "loss" in row
    ]


def params(folder):
    return {
        path: np.asarray(value)
        for path, value in flatten(
            nnx.to_pure_dict(nnx.state(load_pretrained(folder, dtype="float32").model))
        ).items()
    }


@pytest.fixture(scope="module")
def straight(run_in, tmp_path_factory):
    """A finished run; tests leave it as it is."""
    config = run_in(tmp_path_factory.mktemp("loop") / "straight")
    train(config)
    return config


def test_stop_and_resume_equal_a_straight_run(straight, tiny_run):
    """Losses, parameters and optimizer state bit for bit; on another mesh within rounding."""
    halves = tiny_run("halves")
    train(halves, stop_after=3)
    assert RunFolder(halves.output_dir).step == 3
    train(halves)
    assert metrics(halves) == metrics(straight) and len(metrics(straight)) == 6
    expected, resumed = params(straight.output_dir), params(halves.output_dir)
    for path in expected:
        np.testing.assert_array_equal(resumed[path], expected[path], err_msg=path)

    elsewhere = tiny_run("elsewhere")
    train(elsewhere, stop_after=3)
    train(dataclasses.replace(elsewhere, mesh=MeshConfig(data=1, fsdp=4, tensor=2)))
    for ours, theirs in zip(metrics(elsewhere), metrics(straight)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)

    # Running a finished run again changes nothing.
    train(straight)
    assert len(metrics(straight)) == 6


def test_two_processes_begin_what_one_finishes(straight, tiny_run, tmp_path):
    """Each process reads its own rows and saves its own shards; both refuse together."""
    config = tiny_run("begun")
    codes, outputs = finish(start(write_config(config, tmp_path), 4, "--stop_after", "3"))
    assert codes == [0, 0], "\n".join(outputs)
    assert "step 3/6" in outputs[0] and "step 3/6" not in outputs[1]
    codes, outputs = finish(start(write_config(dataclasses.replace(config, seed=1), tmp_path), 4))
    assert codes == [1, 1] and all("train.seed: 0 -> 1" in output for output in outputs)

    train(config)
    for ours, theirs in zip(metrics(config), metrics(straight), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    expected, finished = params(straight.output_dir), params(config.output_dir)
    for path in expected:
        np.testing.assert_allclose(finished[path], expected[path], atol=1e-5, err_msg=path)


def test_one_executable_a_bucket(straight):
    rows = [
        json.loads(line)
        for line in (Path(straight.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    executables = [row["executables"] for row in rows if "executables" in row]
    assert 2 <= executables[-1] <= straight.data.max_executables < len(rows)


def test_run_folder_stands_alone(straight, tmp_path):
    """Configs, tokenizer and parameters are read back from the folder, by run and by step."""
    run = Path(shutil.copytree(straight.output_dir, tmp_path / "copy"))
    loaded = load_pretrained(run, dtype="float32")
    assert loaded.config == straight.model and loaded.tokenizer.vocab_size == 655
    np.testing.assert_array_equal(
        params(run / "checkpoints" / "6")["decoder.head"], params(run)["decoder.head"]
    )
    assert json.loads((run / "config.json").read_text())["train"]["seed"] == 0
    assert list((run / "tensorboard").iterdir())
    assert not list(run.rglob("*.partial")) and not list(run.rglob("*.orbax-checkpoint-tmp*"))
    (run / "checkpoints" / "abc").mkdir()
    with pytest.raises(FileNotFoundError, match="the steps there are 6"):
        load_pretrained(run / "checkpoints" / "abc")


def test_other_settings_are_refused_with_their_difference(straight):
    changed = dataclasses.replace(straight, optimizer=OptimizerConfig(learning_rate=5e-3), seed=1)
    with pytest.raises(ConfigError, match="train.optimizer.learning_rate: 0.001 -> 0.005") as error:
        train(changed)
    assert "train.seed: 0 -> 1" in str(error.value)


def test_changed_data_is_refused(tiny_run, pages):
    config = tiny_run("data")
    train(config, stop_after=1)
    annotation = pages / "synthetic_pages" / "train.jsonl"
    lines = annotation.read_text()
    try:
        annotation.write_text("".join(lines.splitlines(keepends=True)[:-4]))
        with (
            pytest.raises(CheckpointError, match="the data .* changed since this checkpoint"),
            pytest.warns(UserWarning),
        ):
            train(config)
    finally:
        annotation.write_text(lines)


@pytest.mark.slow
def test_images_that_were_replaced_for_a_while_do_not_end_a_run(tiny_run, tmp_path, monkeypatch):
    """Another run measures the larger ones; once they are back, the first run goes on."""
    folder = tmp_path / "own"
    generate(folder, SyntheticConfig(train_samples=8, val_samples=2, text_share=0.0))
    annotation = folder / "synthetic_pages" / "train.jsonl"
    rows = [json.loads(line) for line in annotation.read_text().splitlines()]
    sizes = {"width", "height", "width_list", "height_list"}
    rows = [{name: row[name] for name in row.keys() - sizes} for row in rows]
    annotation.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(name):
        made = tiny_run(name)
        data = dataclasses.replace(made.data, meta=str(folder / FILES["meta_train"]))
        return dataclasses.replace(made, data=data)

    train(config("first"), stop_after=1)
    images = sorted((annotation.parent / "images" / "train").iterdir())
    before = {path: path.read_bytes() for path in images}
    for path in images:
        with Image.open(path) as image:
            image.resize((4 * image.width, image.height)).save(path)
    train(config("second"), stop_after=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_compile", lambda *_: pytest.fail("compiled before it was refused"))
        with pytest.raises(CheckpointError, match="changed since this checkpoint"):
            train(config("first"))
    for path, content in before.items():
        path.write_bytes(content)
    train(config("first"), stop_after=1)
    assert RunFolder(config("first").output_dir).step == 2


def test_foreign_folder_is_refused(tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        train(tiny_run())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_wrong_checkpoint_is_one_report(straight):
    """Another model config against the stored parameters: every mismatch is listed."""
    run = RunFolder(straight.output_dir)
    from internvlx_jax.models.params import abstract_model
    from internvlx_jax.models.sharding import make_mesh, param_shardings

    model = straight.model
    other = dataclasses.replace(
        model, decoder=dataclasses.replace(model.decoder, mlp_width=64, qkv_bias=True)
    )
    abstract = abstract_model(other, dtype="float32")
    shardings = param_shardings(
        abstract.shapes, abstract.axes, make_mesh(MeshConfig(), jax.devices()[:1])
    )
    with pytest.raises(CheckpointError) as error:
        run.load(abstract, shardings)
    assert len(error.value.problems) == 4
    assert (
        "decoder.layers.mlp.gate.kernel has shape [2, 32, 48] in the checkpoint, [2, 32, 64]"
        in str(error.value)
    )
    assert (
        "decoder.layers.attn.qkv.bias [2, 2, 4, 8] is in the model, not in the checkpoint"
        in str(error.value)
    )


def test_init_from_a_run_and_freeze(straight, tiny_run):
    config = tiny_run(
        "second",
        model=None,
        init_from=straight.output_dir,
        freeze=FreezeConfig(vit=True, projector=True),
        steps=2,
    )
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, tokenizer=None, max_executables=1)
    )
    train(config)
    before, after = params(straight.output_dir), params(config.output_dir)
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same == path.startswith(("vision.", "projector.")), path


def test_init_from_a_hugging_face_folder(golden, tiny_run):
    """Its tokenizer files are missing, which is said; so is a vocabulary that is too small."""
    config = tiny_run(model=None, init_from=str(golden / "internlm2"))
    with pytest.raises(ConfigError, match="655 ids, model.decoder.vocab_size is 200"):
        train(config)
    with pytest.raises(ConfigError, match="data.tokenizer is not set"):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=None)))


def test_validation_reaches_the_metrics_file(tiny_run, pages):
    config = tiny_run("validated", eval_every=3)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, val_meta=str(pages / "meta_val.json"), max_executables=1
        ),
    )
    final = train(config)
    rows = [
        json.loads(line)
        for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert (
        len(losses) == 3 and losses[2] < losses[0]
    )  # before training, after three steps and after six
    assert final["eval/loss"] == losses[-1] and 0 <= final["eval/exact"] <= 1
