"""Tables of predictions that other tools read: TSV and xlsx (design: evaluation.md 8)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openpyxl import Workbook
from openpyxl.cell import WriteOnlyCell
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from internvlx_jax.core.files import written_aside

CELL = 32_767  # most characters of a cell in xlsx


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows, whose keys are the columns, to `path`.xlsx; to `path`.tsv if a text does not fit into xlsx.

    Texts stay texts: "=1" is no formula and "007" no number. Returns the file written; the other one is removed.
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
    """Cells of xlsx hold no control characters and at most 32,767 characters."""
    texts = (value for row in rows for value in row.values() if isinstance(value, str))
    return not any(len(text) > CELL or ILLEGAL_CHARACTERS_RE.search(text) for text in texts)


def write_xlsx(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    for values in (columns(rows), *(row.values() for row in rows)):
        cells = [WriteOnlyCell(sheet, value=value) for value in values]
        for cell in cells:
            if isinstance(cell.value, str):
                cell.data_type = "s"
        sheet.append(cells)
    with written_aside(path) as aside:
        book.save(aside)


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Tab separated, quoted where needed, UTF-8."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns(rows))
        writer.writerows(row.values() for row in rows)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(rows[0]) if rows else []
