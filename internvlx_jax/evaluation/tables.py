"""Tables of predictions that other tools read, as TSV and xlsx (design: evaluation.md 8)."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.extras import require
from internvlx_jax.core.files import written_aside

CELL = 32_767  # most characters of a cell in xlsx
# Characters that xlsx cannot hold; a carriage return would come back as a line feed.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows to PATH.xlsx, or to PATH.tsv if a text does not fit into xlsx.

    Texts stay texts: "=1" is no formula and "007" no number.

    Args:
        path: path without its ending.
        rows: values by column; all rows have the same columns.

    Returns:
        The file written; the other one is removed.
    """
    xlsx, tsv = (path.with_name(path.name + end) for end in (".xlsx", ".tsv"))
    if fits_xlsx(rows):
        write_xlsx(xlsx, rows)
        tsv.unlink(missing_ok=True)
        return xlsx
    write_tsv(tsv, rows)
    xlsx.unlink(missing_ok=True)
    return tsv


def fits_xlsx(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no text is longer than 32,767 characters or has characters that XML lacks."""
    texts = (value for row in rows for value in row.values() if isinstance(value, str))
    return not any(len(text) > CELL or CONTROL.search(text) for text in texts)


def write_xlsx(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes an Excel sheet.

    Raises:
        ConfigError: openpyxl is not installed.
    """
    openpyxl = require("openpyxl", extra="eval", purpose="writing xlsx files")
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    for values in (columns(rows), *(row.values() for row in rows)):
        cells = [openpyxl.cell.WriteOnlyCell(sheet, value=value) for value in values]
        for cell in cells:
            if isinstance(cell.value, str):
                cell.data_type = "s"
        sheet.append(cells)
    with written_aside(path) as aside:
        book.save(aside)


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes tab-separated UTF-8; every cell is quoted, so a bare carriage return stays inside."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(columns(rows))
        writer.writerows(row.values() for row in rows)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the columns."""
    return list(rows[0]) if rows else []
