"""A tiny random model, as it is in memory and as a run folder, and a page to ask about."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from internvlx_jax.checkpoints.run_writer import CheckpointWriter, write_run_folder
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
from internvlx_jax.inference.loading import Pretrained
from internvlx_jax.inference.vlm import VLM
from internvlx_jax.models.params import abstract_model, unflatten

CONFIG = ModelConfig(
    vision=VisionConfig(width=16, layers=1, heads=2, mlp_width=16, image_size=56),
    decoder=DecoderConfig(
        vocab_size=655,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_width=32,
        rope=RopeConfig(max_positions=512),
    ),
    prompt=PromptConfig(system_message="", tiles=TileConfig(tile_size=56, dynamic=False)),
)


@pytest.fixture(scope="session")
def params() -> dict[str, np.ndarray]:
    """Random weights, large enough that every token and pixel counts for the answer."""
    shapes, rng = abstract_model(CONFIG, dtype="float32").shapes, np.random.default_rng(3)
    return {path: np.float32(rng.normal(0, 0.5, leaf.shape)) for path, leaf in shapes.items()}


@pytest.fixture(scope="session")
def pretrained(params) -> Pretrained:
    graphdef = abstract_model(CONFIG, dtype="float32").graphdef
    model = nnx.merge(graphdef, unflatten(jax.tree.map(jax.numpy.asarray, params)))
    return Pretrained(model, CONFIG, Tokenizer.load(TOKENIZER_FOLDER))


@pytest.fixture(scope="session")
def model(pretrained) -> VLM:
    return VLM(pretrained)


@pytest.fixture(scope="session")
def run_folder(params, tmp_path_factory) -> Path:
    """Returns the same model as train.py writes it."""
    run = tmp_path_factory.mktemp("inference") / "runs" / "demo" / "train"
    settings = {"train": {}, "model": to_dict(CONFIG)}
    write_run_folder(run, settings, Tokenizer.load(TOKENIZER_FOLDER))
    arrays = jax.tree.map(jax.numpy.asarray, params)
    with CheckpointWriter(run, keep_last=1) as writer:
        writer.save(1, arrays, {"count": jax.numpy.int32(1)}, settings)
    return run


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (60, 90, 3), np.uint8)


@pytest.fixture(scope="session")
def image(pixels, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("images") / "page.png"
    Image.fromarray(pixels).save(path)
    return str(path)
