"""Opens images again by the names that predictions.jsonl has for them.

(design: evaluation.md 12) Nothing here imports jax.
"""

from __future__ import annotations

import re
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.images import ImageSource
from internvlx_jax.evaluation import parquet
from internvlx_jax.evaluation.tsv import read_tsv

_TSV = re.compile(r"(?P<file>.+\.tsv) row (?P<row>.*?)(?: image (?P<part>\d+))?", re.DOTALL)
_PARQUET = re.compile(r"(?P<file>.+\.parquet) row (?P<row>\d+) (?P<column>.+)")


class StoredImages:
    """Finds images by name: a path, a row of a TSV file, or a cell of a parquet file.

    A table is read once, when an image of it is asked for.
    """

    def __init__(self):
        self._tsv: dict[str, dict[str, tuple[ImageSource, ...]]] = {}
        self._parquet: dict[str, list[tuple[str, dict]]] = {}

    def find(self, name: str) -> ImageSource:
        """Returns what `load_image` reads.

        Raises:
            ConfigError: the table has no such row any more, or cannot be used.
            FileNotFoundError: the table has gone.
        """
        if match := _TSV.fullmatch(name):
            rows = self._tsv.setdefault(match["file"], {}) or self._read_tsv(match["file"])
            images, part = rows.get(match["row"], ()), int(match["part"] or 1) - 1
            if part < len(images):
                return images[part]
        elif match := _PARQUET.fullmatch(name):
            if match["file"] not in self._parquet:
                self._parquet[match["file"]] = list(parquet.rows(Path(match["file"])))
            rows = self._parquet[match["file"]]
            if int(match["row"]) < len(rows):
                where, row = rows[int(match["row"])]
                cell = row.get(match["column"])
                cell = row.get("decoded_image") if cell is None else cell
                if isinstance(cell, dict):
                    return parquet.image(where, match["column"], cell)
        else:
            return name
        raise ConfigError(f"{name}: not in the file any more; it has changed since the evaluation")

    def _read_tsv(self, file: str) -> dict[str, tuple[ImageSource, ...]]:
        images = {str(question.id): question.images for question in read_tsv(Path(file))}
        self._tsv[file] = images
        return images
