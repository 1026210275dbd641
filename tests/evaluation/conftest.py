"""A tiny random model and made-up data of every benchmark, shared by all evaluation tests."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import mini_data
import numpy as np
import pytest

from internvlx_jax.checkpoints.run_writer import CheckpointWriter, write_run_folder
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.model_config import (
    DecoderConfig,
    ModelConfig,
    PromptConfig,
    RopeConfig,
    VisionConfig,
)
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.evaluation import job
from internvlx_jax.evaluation.job_config import EvalConfig
from internvlx_jax.evaluation.records import Summary
from internvlx_jax.models.params import abstract_model
from internvlx_jax.models.sharding import make_mesh

MODEL = ModelConfig(
    vision=VisionConfig(width=16, layers=1, heads=2, mlp_width=16, image_size=56),
    # 655 ids in the tokenizer: about every tenth token of a random model has no text.
    decoder=DecoderConfig(
        vocab_size=720,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_width=32,
        rope=RopeConfig(max_positions=2048),
    ),
    # Few shapes to compile: a page is 3 tiles, two pages are 2 tiles, and both stand in 3 slots.
    prompt=PromptConfig(system_message="", tiles=TileConfig(tile_size=56, min_num=2, max_num=2)),
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Writes a run folder with random weights; every token and pixel counts for the answer.

    The stop token has a larger column in the head, so it comes first now and then.
    """
    tokenizer = Tokenizer.load(TOKENIZER_FOLDER)
    run = tmp_path_factory.mktemp("job") / "run"
    rng = np.random.default_rng(0)
    shapes = abstract_model(MODEL, dtype="float32").shapes
    params = {path: np.float32(rng.normal(0, 0.5, leaf.shape)) for path, leaf in shapes.items()}
    params["decoder.head"][:, tokenizer.token_id("<|im_end|>")] *= 3
    settings = {"train": {}, "model": to_dict(MODEL)}
    write_run_folder(run, settings, tokenizer)
    with CheckpointWriter(run, keep_last=1) as writer:
        writer.save(
            1, jax.tree.map(jax.numpy.asarray, params), {"count": jax.numpy.int32(1)}, settings
        )
    return run


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """A few questions of every benchmark in every layout; tests leave it as it is."""
    root = tmp_path_factory.mktemp("benchmarks") / "data"
    root.mkdir()
    mini_data.write(root)
    return root


@pytest.fixture(scope="session")
def configure(checkpoint):
    """Flat settings -> EvalConfig of the tiny model in float32."""
    asked = {field.name for field in dataclasses.fields(EvaluationConfig)}

    def configure(out_dir, **settings) -> EvalConfig:
        settings = (
            dict(checkpoint=str(checkpoint), dtype="float32", out_dir=str(out_dir)) | settings
        )
        selection = EvaluationConfig(
            **{name: value for name, value in settings.items() if name in asked}
        )
        return EvalConfig(
            selection=selection,
            **{name: value for name, value in settings.items() if name not in asked},
        )

    return configure


@pytest.fixture(scope="session")
def run_on():
    """Returns a function that runs a job on the first devices of this process."""

    def run(config: EvalConfig, devices: int = 1) -> list[Summary]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                job, "make_mesh", lambda mesh: make_mesh(mesh, devices=jax.devices()[:devices])
            )
            return job.run(config)

    return run


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Returns a function that runs eval.py here -> (exit status, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("eval_command", mini_data.ROOT / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*switches, **flags):
        flags = {"out_dir": tmp_path / "out"} | flags
        argv = ["eval.py", *switches, *(f"--{name}={value}" for name, value in flags.items())]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            status = module.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run
