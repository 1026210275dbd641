"""The data of a run, as its processes share them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.batch import Batch
from internvlx_jax.data.buckets import SlotCosts
from internvlx_jax.data.opening_sources import make_share_of_indexes
from internvlx_jax.data.pipeline import LoadedStep, Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.flops import slot_flops
from internvlx_jax.models.sharding import batch_sharding, data_parallel_size, row_share

logger = logging.getLogger(__name__)


def open_tokenizer(config: TrainConfig, source: Any, model: ModelConfig) -> Tokenizer:
    """Opens the tokenizer of the config, or else that of the checkpoint `source`.

    Raises:
        ConfigError: There is no tokenizer, or it has more ids than the model has embeddings.
    """
    tokenizer = None
    if config.data.tokenizer:
        tokenizer = Tokenizer.load(config.data.tokenizer)
    elif source is not None:
        tokenizer = Tokenizer.find(source.tokenizer_folder)
    if tokenizer is None:
        raise ConfigError(
            "data.tokenizer is not set and init_from brings no tokenizer files; set data.tokenizer "
            "to a folder with tokenizer files"
        )
    tokenizer.check_rows(model.decoder.vocab_size)
    return tokenizer


def open_loaders(
    config: TrainConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    position: Mapping[str, Any] | None,
) -> tuple[Loader, Loader | None]:
    """Opens training and validation data on all processes of a run.

    All processes make parts of large size indexes, process 0 joins them and makes the others, and
    the rest find them.

    Args:
        config: The run.
        model: Its model, which says how samples become tokens.
        tokenizer: Its tokenizer.
        mesh: Its devices; each process loads the rows of its own.
        position: Position in the data that a checkpoint has saved, if any.

    Raises:
        ConfigError: The rows of the saved position do not fit the devices, or, on all processes,
            the processes see different data.
    """
    shards = data_parallel_size(mesh) * config.compute.accumulation
    row_quantum = (position or {}).get("row_quantum") or config.data.row_quantum or shards
    if row_quantum % shards:
        raise ConfigError(
            f"the rows of a step come in multiples of {row_quantum} (data.row_quantum), which "
            f"{shards} parts (data-parallel devices * compute.accumulation) do not divide; use "
            "fewer devices, or begin the run with a larger data.row_quantum"
        )

    def open_both(refresh: bool) -> tuple[Loader, Loader | None]:
        return _open_both(config, model, tokenizer, mesh, position, row_quantum, shards, refresh)

    _make_indexes_together(config, model, tokenizer)
    opened = None
    try:
        if jax.process_index() == 0:
            opened = open_both(refresh=position is None)
            # Another run, or `data check`, may have measured images that were replaced for a while.
            if position is not None and opened[0].plan_hash != position.get("plan_hash"):
                opened = open_both(refresh=True)
    finally:
        multihost_utils.sync_global_devices("index made")
    loaders = opened or open_both(refresh=False)
    # Each process plans for itself. Different plans would end in a hang or, worse, in other steps.
    plans = np.array([int(loader.plan_hash[:7], 16) for loader in loaders if loader], np.int32)
    if (multihost_utils.process_allgather(plans) != plans).any():
        raise ConfigError(
            "the processes see different training data, so their steps would differ; give all of "
            "them the same files, tokenizer and versions of NumPy (this one: "
            f"{loaders[0].plan_hash})"
        )
    return loaders


def _make_indexes_together(config: TrainConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Makes this process's share of the size indexes, and waits for the others.

    What goes wrong is left to the loader, which meets it again where all processes report it.
    """
    if jax.process_count() == 1:
        return
    data, first = config.data, jax.process_index() == 0
    try:
        processor = Processor.for_model(
            model, tokenizer, special_text=data.special_text, images=data.images
        )
        for meta in filter(None, (data.meta, data.val_meta)):
            make_share_of_indexes(
                meta,
                data,
                processor,
                process=jax.process_index(),
                processes=jax.process_count(),
                progress=first,
            )
    except Exception as error:
        logger.warning(f"this process made no share of the size index: {error}")
    multihost_utils.sync_global_devices("parts of the index made")


def _open_both(
    config: TrainConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    position: Mapping[str, Any] | None,
    row_quantum: int,
    shards: int,
    refresh: bool,
) -> tuple[Loader, Loader | None]:
    data = config.data
    processor = Processor.for_model(
        model, tokenizer, special_text=data.special_text, images=data.images
    )
    index, count = row_share(mesh)
    common: dict[str, Any] = dict(
        process_index=index,
        process_count=count,
        progress=jax.process_index() == 0,
        # The others find what process 0 has measured. A run that goes on keeps what it began with.
        refresh=refresh,
        costs=SlotCosts.of(*slot_flops(model)),
    )
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
    validation = Loader(
        data.val_meta, data, processor, row_quantum=shards, seed=0, epochs=1, **common
    )
    return training, validation


def to_devices(loaded: LoadedStep, mesh: Mesh) -> Batch:
    """Sends this process's rows of a step to its devices.

    Returns:
        The global batch, jax.Array[B, ...], with its rows spread over the mesh.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows), loaded.batch
    )
