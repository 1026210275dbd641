"""The sources of a meta file, and the share of their size indexes that a process makes
(design: data.md 10).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.local_cache import LocalCache
from internvlx_jax.data.buckets import Capacity
from internvlx_jax.data.image_fetcher import open_cache
from internvlx_jax.data.index import make_index_parts
from internvlx_jax.data.meta import DatasetEntry, read_meta
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.sources import Source, open_source

FETCHED_TOGETHER = 8  # annotations


def sample_capacity(config: DataConfig) -> Capacity:
    """Returns the bounds under which samples are encoded."""
    return Capacity(config.max_length, config.pack.tiles if config.batch_mode == "pack" else None)


def open_sources(entries: Sequence[DatasetEntry], cache: LocalCache) -> list[Source]:
    """Opens the source of each entry; annotations behind URLs are fetched side by side."""
    with ThreadPoolExecutor(FETCHED_TOGETHER) as pool:
        return list(pool.map(lambda entry: _open(entry, cache), entries))


def make_share_of_indexes(
    meta: str,
    config: DataConfig,
    processor: Processor,
    *,
    process: int,
    processes: int,
    progress: bool = False,
) -> None:
    """Makes one process's parts of the large size indexes that are missing.

    All processes call it before one of them opens the `Loader` that joins the parts.

    Args:
        meta, config, processor, progress: see `Loader`.
        process: number of this process.
        processes: number of processes that share the work.
    """
    entries = read_meta(meta)
    for entry, source in zip(entries, open_sources(entries, open_cache(config.cache)), strict=True):
        make_index_parts(
            source,
            entry,
            processor.for_dataset(entry),
            config,
            sample_capacity(config),
            process=process,
            processes=processes,
            progress=progress,
        )


def _open(entry: DatasetEntry, cache: LocalCache) -> Source:
    source = open_source(entry, cache)
    if entry.length not in (None, len(source)):
        warnings.warn(
            f"{source.path} has {len(source)} samples, but the meta file gives dataset "
            f'"{entry.name}" the "length" {entry.length}. The real number is used; correct the '
            "field.",
            stacklevel=2,
        )
    return source
