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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.json_text import shown
from internvlx_jax.data.images import ImageSource, embedded_image, from_base64
from internvlx_jax.evaluation.cells import NAN, read_column
from internvlx_jax.evaluation.questions import Question

# An image cell of at most so many characters is the index of the row that holds the image.
REFERENCE = 64
ANSWERS = ("answer", "answers")
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


def read_tsv(
    path: Path, needs: Sequence[str] = (), *, pandas: bool = False, question: str | None = None
) -> Iterator[Question]:
    """Yields the rows that have an image as questions, in order.

    `answers` is empty where the column is missing; `fields` are all columns but the image, as they
    are written in the file.

    Args:
        path: the file.
        needs: columns that have to be in the file, besides index, question and image.
        pandas: make of answers, hints and options what pandas reads (`cells`): an option or a hint
            that is missing is left out, and an answer that is missing is "nan".
        question: text that takes the place of the column, which then need not be in the file.

    Raises:
        ConfigError: the file cannot be used; the message names file and line.
    """
    records = _records(path)
    header = _header(path, records, needs, ("index", "question")[: 1 if question else 2])
    cells: dict[str, list[str]] = {name: [] for name in header if name != "image"}
    images: dict[str, tuple[ImageSource, ...]] = {}
    references: dict[str, str] = {}
    rows = []
    for where, row, place in _rows(path, records, header):
        index, cell = row["index"], row.pop("image", "")
        for name, text in row.items():
            cells[name].append(text)
        if question:
            row["question"] = question
        if index in images:
            raise ConfigError(f"{where}: index {index} is used twice; give each row its own")
        found = _images(path, row, cell, place)
        if found is None:
            continue
        if not found:
            references[index] = cell
        images[index] = found
        rows.append((len(cells["index"]) - 1, where, row))
    for index, target in references.items():
        if not images.get(target):
            raise ConfigError(
                f"{path} row {index}: its image is that of row {target}, which has none"
            )
        images[index] = images[target]
    columns = _columns(path, cells, needs) if pandas else cells
    for number, where, row in rows:
        read = {name: columns[name][number] for name in columns}
        yield _question(where, row, read, images[row["index"]])


def _rows(
    path: Path, records: Iterator[tuple[int, list[str], int, int]], header: Sequence[str]
) -> Iterator[tuple[str, dict[str, str], tuple[int, int, int | None]]]:
    """Yields (place for messages, cells by column, place in the file) of each row.

    Raises:
        ConfigError: a row has more or fewer cells than the first line has columns.
    """
    column = header.index("image") if "image" in header else None
    for line, cells, start, stop in records:
        where = f"{path} line {line}"
        if len(cells) != len(header):
            raise ConfigError(
                f"{where}: {len(cells)} cells, but {len(header)} columns in the first line; check "
                "the quotation marks"
            )
        yield where, dict(zip(header, cells)), (start, stop, column)


def _images(
    path: Path, row: Mapping[str, str], cell: str, place: tuple[int, int, int | None]
) -> tuple[ImageSource, ...] | None:
    """Returns the images of a row.

    Args:
        path: the file.
        row: the other cells by column.
        cell: the image cell; empty without such a column.
        place: first byte of the row, byte behind its last, column of the image cell.

    Returns:
        Its images; none where they are those of another row, and None where it has no image.
    """
    start, stop, column = place
    if column is not None and cell:
        parts = range(len(_parts(cell)) if len(cell) > REFERENCE else 0)
        return tuple(TsvImage(path, row["index"], start, stop, column, part) for part in parts)
    if row.get("image_path"):
        return tuple(str(path.parent / name) for name in _parts(row["image_path"]))
    return None


def _columns(
    path: Path, cells: Mapping[str, list[str]], needs: Sequence[str]
) -> dict[str, Sequence[str | None]]:
    """Returns the columns as pandas reads them; index and question stay as they are.

    Raises:
        ConfigError: a column that is needed has no value.
    """
    columns: dict[str, Sequence[str | None]] = {}
    for name, column in cells.items():
        columns[name] = column if name in ("index", "question") else read_column(column)
        if name in ANSWERS and name in needs and not any(column):
            raise ConfigError(
                f"{path}: column {name} has no value in any row; this file cannot be scored"
            )
    if "answer" in columns:
        columns["answer"] = [NAN if text is None else text for text in columns["answer"]]
    return columns


def _check_unique(path: Path, line: int, header: Sequence[str]) -> None:
    """Raises ConfigError for a column of the name of another, which would hide it."""
    twice = [name for name, count in Counter(header).items() if count > 1 and name]
    if twice:
        raise ConfigError(
            f"{path} line {line}: the column {shown(twice[0])} stands twice; rename one"
        )


def _header(
    path: Path,
    records: Iterator[tuple[int, list[str], int, int]],
    needs: Sequence[str],
    always: Sequence[str],
) -> list[str]:
    """Returns the names of the columns, among which are those of `always` and `needs`."""
    line, names, _, _ = next(records, (1, [], 0, 0))
    header = [name.removeprefix("\ufeff") for name in names]
    _check_unique(path, line, header)
    needed = [name for name in always if name not in header]
    if needed or not {"image", "image_path"} & set(header):
        raise ConfigError(
            f"{path} line {line}: no column {' and '.join(needed) or 'image'}; an MMBench-style "
            "TSV has index, image (or image_path) and question in its first line"
        )
    if absent := [name for name in needs if name not in header]:
        raise ConfigError(
            f"{path} line {line}: no column {absent[0]}, which this benchmark needs; it needs "
            f"{', '.join(('image', *always, *needs))}. Download the published file "
            "again"
        )
    return header


def _question(
    where: str,
    row: Mapping[str, str],
    read: Mapping[str, str | None],
    images: tuple[ImageSource, ...],
) -> Question:
    """Returns a row as a question: `fields` are its cells, everything else what was read."""
    letters = ((letter, read.get(letter)) for letter in string.ascii_uppercase)
    answer = read.get("answer")
    return Question(
        where,
        row["index"],
        images,
        row["question"],
        (answer,) if answer else (),
        read.get("hint") or "",
        {letter: text for letter, text in letters if text},
        row,
    )


def read_cells(path: Path, needs: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("FILE line N", cells by column) of a TSV file without images, in order.

    Raises:
        ConfigError: a column of `needs` is missing, or a row has another number of cells.
    """
    records = _records(path)
    line, names, _, _ = next(records, (1, [], 0, 0))
    header = [name.removeprefix("\ufeff") for name in names]
    _check_unique(path, line, header)
    if absent := [name for name in needs if name not in header]:
        raise ConfigError(
            f"{path} line {line}: no column {absent[0]}, which this benchmark needs; it needs "
            f"{', '.join(needs)}. Download the published file again"
        )
    for where, row, _ in _rows(path, records, header):
        yield where, row


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
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ConfigError(
                f"{path} line {line}: {error}; check the quotation marks and line ends"
            ) from None
        if cells is None:
            return
        if cells:
            yield line, cells, start, offset
        start, line = offset, reader.line_num + 1
