"""A run small enough to train inside a test: generated pages, one-layer stacks, float32."""

import dataclasses

import jax
import numpy as np
import pytest

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.model_config import (
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.run_config import ComputeConfig, MeshConfig, OptimizerConfig, TrainConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.synthetic import FILES, TOKENIZER_FOLDER, SyntheticConfig, generate
from internvlx_jax.models.params import init_params


@pytest.fixture(scope="session")
def tiny():
    """Model of the tiny run: tiles of 56 px with four visual tokens, two layers a stack."""
    return ModelConfig(
        vision=VisionConfig(
            width=16, layers=2, heads=2, mlp_width=32, image_size=56, drop_path=0.1
        ),
        projector=ProjectorConfig(drop_path=0.1),
        decoder=DecoderConfig(
            vocab_size=656, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48
        ),
        prompt=PromptConfig(tiles=TileConfig(tile_size=56, max_num=2)),
    )


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "data"
    generate(folder, SyntheticConfig(train_samples=40, val_samples=6, text_share=0.2))
    return folder


@pytest.fixture(scope="session")
def run_in(pages, tiny):
    """run_in(folder, **fields): the TrainConfig of a tiny run there."""

    def make(folder, **changes):
        config = TrainConfig(
            output_dir=str(folder),
            model=tiny,
            data=DataConfig(
                meta=str(pages / FILES["meta_train"]),
                tokenizer=str(TOKENIZER_FOLDER),
                max_length=256,
                tokens_per_step=1024,
                max_executables=2,
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.2),
            compute=ComputeConfig(dtype="float32", remat="none"),
            mesh=MeshConfig(data=2, fsdp=2, tensor=2),
            steps=6,
            log_every=1,
            eval_every=100,
            save_every=100,
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture
def tiny_run(run_in, tmp_path):
    """The same in a folder of the test's own."""
    return lambda name="run", **changes: run_in(tmp_path / name, **changes)


@pytest.fixture(scope="session")
def tiny_params(tiny):
    """Random parameters of `tiny` by dotted path, on the host."""
    return jax.tree.map(np.asarray, init_params(tiny, 0))
