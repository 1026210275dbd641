"""Draws forms that need resolution: the images of the ablation (design: data.md 20).

A form is larger than the pages of synthetic_pages.py and is cut into cells, two along the side of a
tile. Some cells hold a field, each kind at most once: a stamp, a color, a word and a number in
large print, a note (a word) and a code (a number) in small print, and a small table whose cells are
asked for by row and column. Every kind has its own band color and tints its box with it, as on
those pages.

A form is a pure function of the random generator that is passed in.
"""

import dataclasses
import string
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw

from internvlx_jax.data.synthetic_pages import (
    KINDS,
    Box,
    Color,
    Field,
    Kind,
    draw_field,
    draw_small_print,
    fitting_font,
    place,
    scan,
)

CELL = 56  # px
TILE = 2 * CELL  # px, the tile side that forms are laid out for

# Grids (columns, rows) of CELL px cells with their shares. Two thirds of the forms fit into one
# tile, and a model learns to find fields on those first. InternVL's rule `off` looks for the
# nearest aspect ratio: it takes three tiles for 2:1 and seven for 3:2 and 4:3, where a form has
# pixels for one, two or three. With maximum 6 and a thumbnail, `edge` cuts 1.9 tiles on average and
# `off` 3.3.
GRIDS: dict[tuple[int, int], float] = {
    (2, 2): 0.34,
    (2, 1): 0.15,
    (1, 2): 0.15,
    (3, 2): 0.08,
    (2, 3): 0.08,
    (4, 2): 0.04,
    (2, 4): 0.04,
    (4, 3): 0.03,
    (3, 4): 0.03,
    (6, 2): 0.03,
    (2, 6): 0.03,
}
CELL_SIDES = (53, 56)  # px per cell, drawn once per form, so that the aspect ratio is exact
# Fields per form with their shares, as far as it has so many cells. A model that cannot look for a
# field yet still learns to read from forms that hold one.
FIELDS: dict[int, float] = {1: 0.35, 2: 0.2, 3: 0.15, 4: 0.3}
PAPER = (112, 144)  # gray levels of the paper, near the middle of a normalized tile
SMALL_PRINT = (13, 9)  # px, the area that a word or number of small print has to fit
TABLE = "table"
ROWS, COLUMNS = ("1", "2"), ("A", "B")

# Three letters each, all first letters different.
WORDS = ("ant", "bee", "cup", "dog", "egg", "fig", "hat", "ink", "jam", "key", "map", "net")
NUMBERS = tuple(str(number) for number in range(10, 100))


@dataclasses.dataclass(frozen=True)
class Form:
    """Holds a drawn form.

    Attributes:
        image: RGB.
        grid: (columns, rows) of cells that it was laid out for.
        fields: Fields of distinct kinds. The value of a table is its cells row by row.
    """

    image: Image.Image
    grid: tuple[int, int]
    fields: tuple[Field, ...]


def _print_text(
    canvas: ImageDraw.ImageDraw,
    area: Box,
    value: str,
    ink: Color,
    size: tuple[int, int],
    stroke: int = 0,
) -> None:
    """Prints a text in the middle of an area, as large as fits into `size` pixels.

    `stroke` pixels are added around its lines.
    """
    center = ((area[0] + area[2]) / 2, (area[1] + area[3]) / 2)
    font = fitting_font(value, *size)
    canvas.text(center, value, fill=ink, font=font, anchor="mm", stroke_width=stroke)


def _draw_large(
    canvas: ImageDraw.ImageDraw, area: Box, value: str, ink: Color, paper: Color
) -> None:
    size = (area[2] - area[0] - 8, area[3] - area[1] - 8)
    _print_text(canvas, area, value, ink, size, stroke=1)


def _draw_small(
    canvas: ImageDraw.ImageDraw, area: Box, value: str, ink: Color, paper: Color
) -> None:
    _print_text(canvas, area, value, ink, SMALL_PRINT)


def _draw_table(
    canvas: ImageDraw.ImageDraw, area: Box, value: str, ink: Color, paper: Color
) -> None:
    """Draws lines, headers of rows and columns, and one letter of `value` per inner cell."""
    left, top, right, bottom = area[0] + 1, area[1], area[2] - 2, area[3] - 2
    columns, rows = len(COLUMNS) + 1, len(ROWS) + 1
    texts = [" ", *COLUMNS]
    for row, header in enumerate(ROWS):
        texts += [header, *value[row * len(COLUMNS) : (row + 1) * len(COLUMNS)]]
    xs = [left + (right - left) * x // columns for x in range(columns + 1)]
    ys = [top + (bottom - top) * y // rows for y in range(rows + 1)]
    for x in xs:
        canvas.line((x, top, x, bottom), fill=(120, 120, 120))
    for y in ys:
        canvas.line((left, y, right, y), fill=(120, 120, 120))
    for number, text in enumerate(texts):
        row, column = divmod(number, columns)
        cell = (xs[column], ys[row], xs[column + 1], ys[row + 1])
        header = row == 0 or column == 0
        _print_text(canvas, cell, text, (110, 110, 110) if header else ink, (8, 8))


def _asked(name: str) -> tuple[str, ...]:
    return (f"Which {name}?",)


# In the order of the columns of the table in docs/evidence.md.
FORM_KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "stamp": dataclasses.replace(KINDS["stamp"], questions=_asked("stamp")),
        "colour": dataclasses.replace(KINDS["colour"], questions=_asked("colour")),
        "word": Kind("WORD", (40, 80, 200), WORDS, _asked("word"), _draw_large),
        "number": Kind("NUMBER", (170, 40, 60), NUMBERS, _asked("number"), _draw_large),
        "note": Kind("NOTE", (190, 130, 20), WORDS, _asked("note"), _draw_small),
        "code": Kind("CODE", (130, 40, 170), NUMBERS, _asked("code"), _draw_small),
        TABLE: Kind("TABLE", (20, 150, 170), tuple(string.digits), (), _draw_table),
    }
)


# How often a kind is drawn, against 1 of the others: a fresh tower sees colors and shapes first,
# and what it learns from them helps it to read.
EASY: Mapping[str, float] = MappingProxyType({"colour": 2.0, "stamp": 2.0})


def _value(kind: str, rng: np.random.Generator) -> str:
    values = FORM_KINDS[kind].values
    count = len(ROWS) * len(COLUMNS) if kind == TABLE else 1
    return "".join(values[i] for i in rng.integers(0, len(values), size=count))


def table_question(row: int, column: int) -> str:
    """Returns the question about a cell of the table, both counted from 0."""
    return f"{COLUMNS[column]} {ROWS[row]}?"


def questions(form: Form, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Returns (kind, question, answer) for each field, in random order.

    A table is asked for two different cells.
    """
    found = []
    for field in form.fields:
        if field.kind != TABLE:
            found.append((field.kind, FORM_KINDS[field.kind].questions[0], field.value))
            continue
        for cell in rng.permutation(len(field.value))[:2].tolist():
            row, column = divmod(cell, len(COLUMNS))
            found.append((TABLE, table_question(row, column), field.value[cell]))
    return [found[i] for i in rng.permutation(len(found)).tolist()]


def described(form: Form) -> str:
    """Returns the fields of a form in words, one a line, from left to right and top to bottom."""
    lines = []
    side = form.image.width / form.grid[0]
    for field in sorted(form.fields, key=lambda field: (field.box[1] // side, field.box[0])):
        if field.kind != TABLE:
            lines.append(f"{field.kind} {field.value}")
            continue
        places = [(row, column) for row in range(len(ROWS)) for column in range(len(COLUMNS))]
        cells = [
            f"{COLUMNS[column]} {ROWS[row]} {value}"
            for (row, column), value in zip(places, field.value, strict=True)
        ]
        lines.append(" ".join([TABLE, *cells]))
    return "\n".join(lines)


def make_form(rng: np.random.Generator, grid: tuple[int, int] | None = None) -> Form:
    """Draws a form.

    Args:
        rng: The only source of randomness.
        grid: (columns, rows) of cells; None draws one of GRIDS by its share.

    Returns:
        A form with FIELDS fields of distinct kinds, or as many as it has cells, whose values are
        independent and uniform. The image is RGB uint8, 53 to 56 px per cell.
    """
    if grid is None:
        grid = list(GRIDS)[rng.choice(len(GRIDS), p=list(GRIDS.values()))]
    columns, rows = grid
    side = int(rng.integers(CELL_SIDES[0], CELL_SIDES[1] + 1))
    count = list(FIELDS)[rng.choice(len(FIELDS), p=list(FIELDS.values()))]
    weights = np.array([EASY.get(kind, 1.0) for kind in FORM_KINDS])
    kinds = rng.choice(list(FORM_KINDS), count, replace=False, p=weights / weights.sum()).tolist()
    cells = [
        (x * side, y * side, (x + 1) * side, (y + 1) * side)
        for y in range(rows)
        for x in range(columns)
    ]
    order = rng.permutation(len(cells)).tolist()
    fields = tuple(
        Field(kind, _value(kind, rng), place(cells[cell], rng))
        for kind, cell in zip(kinds, order, strict=False)
    )
    red, green, blue = rng.integers(*PAPER, size=3).tolist()
    dark_red, dark_green, dark_blue = rng.integers(10, 60, size=3).tolist()
    paper, ink = (red, green, blue), (dark_red, dark_green, dark_blue)
    image = Image.new("RGB", (columns * side, rows * side), paper)
    canvas = ImageDraw.Draw(image)
    for field in fields:
        draw_field(canvas, field, FORM_KINDS[field.kind], ink)
    for cell in order[len(kinds) :]:
        if rng.random() < 0.5:
            draw_small_print(canvas, cells[cell], rng)
    return Form(scan(image, paper, rng), grid, fields)
