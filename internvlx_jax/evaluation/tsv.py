"""MMBench-style TSV files with images inside (design: evaluation.md 5).

Images stay on disk until they are needed.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.data.embedded import embedded_image, from_base64
from internvlx_jax.data.images import ImageSource
from internvlx_jax.evaluation.questions import Question

# An image cell of at most so many characters is the index of the row that holds the image.
REFERENCE = 64
_DATA_URL = re.compile(r"data:[^,]*", re.IGNORECASE)
csv.field_size_limit(2**31 - 1)


@dataclasses.dataclass(frozen=True)
class TsvImage:
    """One base64 image of one row.

    Attributes:
        path: the TSV file.
        row: index of the row.
        start, stop: bytes of the row in the file.
        column: column of the image cell.
        part: number of the image in its cell.
    """

    path: Path
    row: str
    start: int
    stop: int
    column: int
    part: int

    def open(self) -> BinaryIO:
        """Returns the encoded image.

        Raises:
            SampleError: the cell is not base64.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            text = file.read(self.stop - self.start).decode()
        (cells,) = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
        cell = _parts(cells[self.column])[self.part]
        try:
            data = embedded_image(cell)
            return io.BytesIO(from_base64(cell) if data is None else data)
        except ValueError as error:
            raise SampleError(
                "unreadable",
                f"the image is not base64 ({getattr(error, 'problem', error)}).",
                "Download the file again.",
                str(self),
            ) from None

    def __str__(self) -> str:
        return f"{self.path} row {self.row}" + (f" image {self.part + 1}" if self.part else "")


def read_tsv(path: Path) -> Iterator[Question]:
    """Yields the rows that have an image as questions, in order.

    `answers` is empty where the column is missing; `fields` are all columns but the image.

    Raises:
        ConfigError: the file cannot be used; the message names file and line.
    """
    images: dict[str, tuple[ImageSource, ...]] = {}
    references: list[tuple[str, str]] = []
    rows = []
    records = _records(path)
    header = _header(path, records)
    column = header.index("image") if "image" in header else None
    for line, cells, start, stop in records:
        where = f"{path} line {line}"
        if len(cells) != len(header):
            raise ConfigError(
                f"{where}: {len(cells)} cells, but {len(header)} columns in the first line; check "
                "the quotation marks"
            )
        row = dict(zip(header, cells))
        index = row["index"]
        if index in images:
            raise ConfigError(f"{where}: index {index} is used twice; give each row its own")
        cell = row.pop("image", "")
        if column is not None and len(cell) > REFERENCE:
            images[index] = tuple(
                TsvImage(path, index, start, stop, column, part)
                for part in range(len(_parts(cell)))
            )
        elif column is not None and cell:
            references.append((index, cell))
            images[index] = ()
        elif row.get("image_path"):
            images[index] = tuple(str(path.parent / name) for name in _parts(row["image_path"]))
        else:
            continue
        rows.append((where, row))
    for index, target in references:
        if not images.get(target):
            raise ConfigError(
                f"{path} row {index}: its image is that of row {target}, which has none"
            )
        images[index] = images[target]
    for where, row in rows:
        yield _question(where, row, images[row["index"]])


def _header(path: Path, records: Iterator[tuple[int, list[str], int, int]]) -> list[str]:
    line, names, _, _ = next(records, (1, [], 0, 0))
    header = [name.removeprefix("\ufeff") for name in names]
    needed = [name for name in ("index", "question") if name not in header]
    if needed or not {"image", "image_path"} & set(header):
        raise ConfigError(
            f"{path} line {line}: no column {' and '.join(needed) or 'image'}; an MMBench-style "
            "TSV has index, image (or image_path) and question in its first line"
        )
    return header


def _question(where: str, row: dict[str, str], images: tuple[ImageSource, ...]) -> Question:
    options = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}
    answer = row.get("answer", "")
    return Question(
        where,
        row["index"],
        images,
        row["question"],
        (answer,) if answer else (),
        row.get("hint", ""),
        options,
        row,
    )


def list_cell(cell: str, where: str) -> tuple[str, ...]:
    """Returns the items of a cell that holds a Python list; any other cell is one item.

    Raises:
        ConfigError: the list is damaged; the message begins with `where`.
    """
    if not cell.startswith("["):
        return (cell,)
    try:
        return tuple(map(str, ast.literal_eval(cell)))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"{where}: {cell[:60]!r} is not a Python list ({error}); correct the cell"
        ) from None


def _parts(cell: str) -> tuple[str, ...]:
    """Returns the images of a cell: itself, or the items of a list."""
    if not cell.startswith("["):
        return (cell,)
    parts = [part.strip().strip("'\"") for part in cell.strip("[] ").split(",")]
    joined: list[str] = []
    for part in parts:  # a data: URL has a comma of its own
        if joined and _DATA_URL.fullmatch(joined[-1]):
            joined[-1] += f",{part}"
        else:
            joined.append(part)
    return tuple(joined)


def _records(path: Path) -> Iterator[tuple[int, list[str], int, int]]:
    """Yields (line number, cells, first byte, byte behind the last) of each record.

    Cells may hold line ends inside quotes.
    """
    offset = 0

    def lines() -> Iterator[str]:
        nonlocal offset
        with path.open("rb") as file:
            for line in file:
                offset += len(line)
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    raise ConfigError(
                        f"{path}: byte {offset - len(line) + error.start} is not UTF-8; save the "
                        "file as UTF-8"
                    ) from None

    reader = csv.reader(lines(), delimiter="\t")
    start, line = 0, 1
    for cells in reader:
        if cells:
            yield line, cells, start, offset
        start, line = offset, reader.line_num + 1
