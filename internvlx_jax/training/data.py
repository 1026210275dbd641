"""The data of a run, as its processes share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.sharding import data_parallel_size, row_share


def open_tokenizer(config: TrainConfig, source, model_config: ModelConfig) -> Tokenizer:
    """That of the config, else that of the checkpoint `source`. Raises ConfigError when there is none, or when the
    model has fewer rows than it has ids."""
    tokenizer = (
        Tokenizer.load(config.data.tokenizer)
        if config.data.tokenizer
        else source and source.tokenizer()
    )
    if tokenizer is None:
        raise ConfigError(
            "data.tokenizer is not set and init_from brings no tokenizer files; set data.tokenizer to a "
            "folder with tokenizer.model"
        )
    if tokenizer.vocab_size > model_config.decoder.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.decoder.vocab_size is "
            f"{model_config.decoder.vocab_size}; give the model a row for each"
        )
    return tokenizer


def open_loaders(
    config: TrainConfig,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    position: Mapping[str, Any] | None,
) -> tuple[Loader, Loader | None]:
    """Training and validation data; process 0 makes the indexes, the others find them. Raises ConfigError, on all
    processes, when the processes see different data or when the rows of a saved position do not fit the devices."""
    data = config.data
    processor = Processor.for_model(
        model_config, tokenizer, special_text=data.special_text, images=data.images
    )
    shards = data_parallel_size(mesh) * config.compute.accumulation
    row_quantum = (position or {}).get("row_quantum") or data.row_quantum or shards
    if row_quantum % shards:
        raise ConfigError(
            f"the rows of a step come in multiples of {row_quantum} (data.row_quantum), which {shards} parts "
            "(data-parallel devices * compute.accumulation) do not divide; use fewer devices, or begin the "
            "run with a larger data.row_quantum"
        )
    index, count = row_share(mesh)

    def make() -> tuple[Loader, Loader | None]:
        common = dict(process_index=index, process_count=count, progress=jax.process_index() == 0)
        training = Loader(
            data.meta,
            data,
            processor,
            row_quantum=row_quantum,
            seed=config.seed,
            state=position,
            epochs=config.epochs if config.steps is None else None,
            **common,
        )
        if data.val_meta is None:
            return training, None
        return training, Loader(
            data.val_meta, data, processor, row_quantum=shards, seed=0, epochs=1, **common
        )

    try:
        made = make() if jax.process_index() == 0 else None
    finally:
        multihost_utils.sync_global_devices("index made")
    loaders = made or make()
    plans = np.array([int(loader.plan_hash[:7], 16) for loader in loaders if loader], np.int32)
    if (multihost_utils.process_allgather(plans) != plans).any():
        raise ConfigError(
            "the processes see different training data, so their steps would differ; give all of them the "
            f"same files, tokenizer and versions of NumPy (this one: {loaders[0].plan_hash})"
        )
    return loaders
