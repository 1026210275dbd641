"""Rows of parquet files, as the Hugging Face hub stores datasets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.inference.images import ImageBytes


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE row N", columns) in order. Raises ConfigError on a damaged file."""
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a parquet file ({error}); download it again") from None
    for number, row in enumerate(table.to_pylist()):
        yield f"{path} row {number}", row


def image(where: str, column: str, cell: dict[str, Any]) -> ImageBytes:
    """The image of a cell, which holds its encoded bytes."""
    return ImageBytes(f"{where} {column}", cell["bytes"])
