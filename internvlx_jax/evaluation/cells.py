"""Cells of tables as pandas reads them (design: evaluation.md 5).

VLMEvalKit reads its TSV files with `pandas.read_csv`, writes predictions as xlsx and reads them
back before it scores them. On that way some texts become missing values ("None", "N/A", ...), and a
column of numbers becomes numbers, so that "7" may turn into "7.0". These are the rules of pandas 2
and 3 for columns without a stated type, in files of up to 65,536 rows (larger files are read in
pieces, each with its own type). Integers that do not fit into 64 bits are not followed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# What pandas.read_csv and pandas.read_excel take for a missing value.
MISSING = frozenset(
    (
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    )
)
NAN = "nan"  # the text of a missing value, where a scorer calls str()

_SPACE = " \t\n\v\f\r"
_INTEGER = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(
    r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf|infinity)", re.IGNORECASE
)
_INT64 = range(-(2**63), 2**63)
_UINT64 = range(2**64)


def read_column(cells: Sequence[str]) -> list[str | None]:
    """Returns the text of each value of a column after pandas has read it; None where missing."""
    known = [cell for cell in cells if cell not in MISSING]
    if not known:
        return [None] * len(cells)
    texts = _numbers(known, gaps=len(known) < len(cells)) or _booleans(known) or known
    values = iter(texts)
    return [None if cell in MISSING else next(values) for cell in cells]


def read_texts(cells: Sequence[str]) -> list[str]:
    """Returns what `str()` gives for each value of a column after pandas has read it."""
    return [NAN if text is None else text for text in read_column(cells)]


def _numbers(cells: Sequence[str], *, gaps: bool) -> list[str] | None:
    """Returns the cells as integers or floats; None unless all of them are numbers.

    With `gaps` integers become floats, because pandas marks gaps with the float NaN.
    """
    texts = [cell.strip(_SPACE) for cell in cells]
    if all(map(_INTEGER.fullmatch, texts)):
        numbers = [int(text) for text in texts]
        if not all(number in _INT64 for number in numbers) and not all(
            number in _UINT64 for number in numbers
        ):
            return None  # too large for an integer: pandas keeps the texts
        return [str(float(number)) if gaps else str(number) for number in numbers]
    if all(map(_FLOAT.fullmatch, texts)):
        return [str(float(text)) for text in texts]
    return None


def _booleans(cells: Sequence[str]) -> list[str] | None:
    """Returns "True" or "False" for each cell; None unless all of them are such words."""
    lower = [cell.lower() for cell in cells]
    return [text.capitalize() for text in lower] if set(lower) <= {"true", "false"} else None
