"""Rows of parquet files, as the Hugging Face hub stores datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.extras import require
from internvlx_jax.inference.images import ImageBytes


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("FILE row N", values by column) in order.

    Raises:
        ConfigError: the file is damaged, or pyarrow is not installed.
    """
    pyarrow = require("pyarrow", extra="eval", purpose="reading parquet files")
    parquet = require("pyarrow.parquet", extra="eval", purpose="reading parquet files")
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a parquet file ({error}); download it again") from None
    for number, row in enumerate(table.to_pylist()):
        yield f"{path} row {number}", row


def image(where: str, column: str, cell: dict[str, Any]) -> ImageBytes:
    """Returns the image of a cell, which holds its encoded bytes."""
    return ImageBytes(f"{where} {column}", cell["bytes"])
