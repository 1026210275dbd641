"""Draws pages in the spirit of receipts and forms: the images of synthetic.py.

A page is cut into cells of half a tile. One or two cells hold a field; the others are empty or hold
gray lines that stand for small print. A field is a box with a colored band, a printed label in the
band and one large value below it. Every kind of field has its own band color and tints its box with
it, so a patch that shows a piece of a value also shows which field the value belongs to. Sizes are
chosen for tiles of 112 px (4 x 4 patches of 28 px): a box is about two patches wide and high, and
apart from the tilt it lies inside one tile.

Only fonts that ship with Pillow are used. A page is a pure function of the random generator that is
passed in (same bytes for the same versions of NumPy and Pillow).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive

TILE = 112  # px, the tile side that pages are laid out for

# Grids (columns, rows) of TILE px tiles that a page covers, with their shares. Most pages are one
# tile, so that a page stays cheap on a CPU. Under rule `edge` with maximum 6 and a thumbnail a page
# has
#   tiles  1     3    4    5    7
#   share  82 %  9 %  4 %  3 %  2 %     1.5 tiles on average, 3.0 under rule `off`
GRIDS: dict[tuple[int, int], float] = {
    (1, 1): 0.82,
    (1, 2): 0.05,
    (2, 1): 0.04,
    (1, 3): 0.02,
    (3, 1): 0.02,
    (2, 2): 0.03,
    (2, 3): 0.01,
    (3, 2): 0.01,
}
# px per tile, drawn for each axis; pages with smaller tiles could get another grid from RVTC.
SIDES = (99, 112)
# The same for pages of one tile, which RVTC never cuts. Without RVTC the narrow ones, about a
# third, are cut into seven.
SMALL_SIDES = (72, 112)
# Fields per page, inclusive; pages with one field make the first steps of learning easy.
FIELDS = (1, 2)
BAND = 13  # px, height of the label band
LABEL_SIZE = 11  # px, font size of the printed labels where they fit
# Degrees times pixels: the largest rotation moves a page's edge by about 2.4 px at every size.
TILT = 280.0


@dataclasses.dataclass(frozen=True)
class Kind:
    """Describes a kind of field.

    Attributes:
        label: Text printed in the band.
        band: RGB of the band; the box is tinted with it.
        values: The equally likely values, each one the exact answer to a question about the field.
        questions: Paraphrases of the question about the field.
        draw: draw(canvas, area, value, ink, paper) prints a value into an area of the page.
    """

    label: str
    band: Color
    values: tuple[str, ...]
    questions: tuple[str, ...]
    draw: Callable[[ImageDraw.ImageDraw, Box, str, Color, Color], None]


@dataclasses.dataclass(frozen=True)
class Field:
    """Holds one field of a page.

    Attributes:
        kind: A key of KINDS.
        value: The printed value.
        box: Where the field stands before the page is tilted.
    """

    kind: str
    value: str
    box: Box


@dataclasses.dataclass(frozen=True)
class Page:
    """Holds a drawn page.

    Attributes:
        image: RGB.
        grid: (columns, rows) of tiles that the page was laid out for.
        fields: One or two fields of distinct kinds.
    """

    image: Image.Image
    grid: tuple[int, int]
    fields: tuple[Field, ...]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))


@functools.cache
def fitting_font(text: str, width: int, height: int) -> ImageFont.FreeTypeFont:
    """Returns the largest font in which the ink of `text` fits into width x height pixels."""
    size = 6
    while True:
        left, top, right, bottom = _font(size + 1).getbbox(text)
        if right - left > width or bottom - top > height:
            return _font(size)
        size += 1


def _center(area: Box) -> tuple[float, float]:
    return (area[0] + area[2]) / 2, (area[1] + area[3]) / 2


_COLORS: dict[str, Color] = {
    "red": (205, 25, 30),
    "orange": (240, 135, 15),
    "yellow": (250, 225, 40),
    "green": (30, 150, 50),
    "blue": (35, 70, 210),
    "purple": (125, 35, 160),
    "pink": (250, 150, 195),
    "black": (15, 15, 15),
    "white": (255, 255, 255),
}


def _draw_swatch(
    canvas: ImageDraw.ImageDraw, area: Box, value: str, ink: Color, paper: Color
) -> None:
    left, top, right, bottom = area
    canvas.rectangle((left + 5, top + 4, right - 6, bottom - 5), fill=_COLORS[value], outline=ink)


def _polygon(radii: tuple[float, ...], turn: float) -> np.ndarray:
    """Returns corners float[K, 2] in [-1, 1], K = len(radii), from `turn` radians onwards."""
    angles = turn + 2 * math.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(radii)[:, None]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 32, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 15


_UP = -math.pi / 2
_CROSS = [
    (-1, -3),
    (1, -3),
    (1, -1),
    (3, -1),
    (3, 1),
    (1, 1),
    (1, 3),
    (-1, 3),
    (-1, 1),
    (-3, 1),
    (-3, -1),
    (-1, -1),
]
_OUTLINES: dict[str, np.ndarray] = {
    "square": _polygon((1.2,) * 4, math.pi / 4),
    "diamond": _polygon((0.75, 1.15) * 2, 0),
    "triangle": _polygon((1.2,) * 3, _UP) + (0, 0.25),
    "star": _polygon((1.15, 0.45) * 5, _UP),
    "cross": np.array(_CROSS) / 3,
    "heart": _heart(),
}
_SHAPES = ("circle", "ring", "moon", *_OUTLINES)


def _draw_shape(
    canvas: ImageDraw.ImageDraw, area: Box, value: str, ink: Color, paper: Color
) -> None:
    # A shape is as wide and high as the area allows: a narrow page is stretched to a tile, which
    # makes its stamps round again.
    x, y = _center(area)
    rx, ry = (area[2] - area[0]) * 0.42, (area[3] - area[1]) * 0.42

    def disc(dx: float, radius: float, color: Color) -> None:
        left, top, right, bottom = dx - radius, -radius, dx + radius, radius
        canvas.ellipse((x + rx * left, y + ry * top, x + rx * right, y + ry * bottom), fill=color)

    if value in _OUTLINES:
        canvas.polygon([(x + rx * u, y + ry * v) for u, v in _OUTLINES[value].tolist()], fill=ink)
        return
    disc(0, 1, ink)
    if value == "ring":
        disc(0, 0.55, paper)
    elif value == "moon":
        disc(0.45, 0.72, paper)


KINDS: dict[str, Kind] = {
    "stamp": Kind(
        label="STAMP",
        band=(20, 130, 70),
        values=_SHAPES,
        draw=_draw_shape,
        questions=("What shape is the stamp?", "Which stamp is it?", "Name the stamp."),
    ),
    "colour": Kind(
        label="COLOUR",
        band=(90, 90, 90),
        values=tuple(_COLORS),
        draw=_draw_swatch,
        questions=("What is the colour?", "Which colour is it?", "Name the colour."),
    ),
}


def draw_field(canvas: ImageDraw.ImageDraw, field: Field, kind: Kind, ink: Color) -> None:
    """Draws a tinted box with its labeled band, and the value below the band."""
    left, top, right, bottom = field.box
    red, green, blue = (200 + c * 55 // 255 for c in kind.band)
    paper = (red, green, blue)
    canvas.rectangle((left, top, right - 1, bottom - 1), fill=paper, outline=kind.band)
    canvas.rectangle((left, top, right - 1, top + BAND - 1), fill=kind.band)
    font = fitting_font(kind.label, right - left - 4, LABEL_SIZE - 3)
    canvas.text(
        ((left + right) / 2, top + BAND / 2), kind.label, fill="white", font=font, anchor="mm"
    )
    kind.draw(canvas, (left, top + BAND, right, bottom), field.value, ink, paper)


def draw_small_print(canvas: ImageDraw.ImageDraw, cell: Box, rng: np.random.Generator) -> None:
    """Draws gray strokes of random lengths into an otherwise empty cell."""
    left, top, right, bottom = cell
    for y in range(top + 8, bottom - 8, 7):
        end = left + 6 + int(rng.integers(0, right - left - 12))
        canvas.line((left + 6, y, end, y), fill=(170, 170, 170), width=2)


def place(cell: Box, rng: np.random.Generator) -> Box:
    """Returns a box inside the cell.

    The margin is 3 to 5 px on each axis, split at random between the two sides.
    """
    margin_x, margin_y = rng.integers(3, 6, size=2).tolist()
    left = cell[0] + 1 + int(rng.integers(0, margin_x - 1))
    top = cell[1] + 1 + int(rng.integers(0, margin_y - 1))
    return left, top, left + cell[2] - cell[0] - margin_x, top + cell[3] - cell[1] - margin_y


def scan(image: Image.Image, paper: Color, rng: np.random.Generator) -> Image.Image:
    """Adds what a scanner adds: a small tilt, uneven light, grain and specks."""
    width, height = image.size
    tilt = rng.uniform(-TILT, TILT) / max(width, height)
    image = image.rotate(tilt, resample=Image.Resampling.BILINEAR, fillcolor=paper)
    slope_x, slope_y = rng.uniform(-10, 10, size=2)
    light = np.add.outer(
        np.linspace(-slope_y, slope_y, height), np.linspace(-slope_x, slope_x, width)
    )
    grain = rng.integers(-3, 4, size=(height, width), dtype=np.int16) + light.astype(np.int16)
    pixels = np.asarray(image).astype(np.int16) + grain[:, :, None]
    specks = rng.integers(0, width * height, size=width * height // 300)
    pixels.reshape(-1, 3)[specks] = rng.integers(60, 220, size=(len(specks), 1), dtype=np.int16)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_page(rng: np.random.Generator, grid: tuple[int, int] | None = None) -> Page:
    """Draws a page.

    Args:
        rng: The only source of randomness.
        grid: (columns, rows) of tiles that the page covers; None draws one of GRIDS by its share.

    Returns:
        A page with 1 or 2 fields of distinct kinds, whose values are independent and uniform. The
        image is RGB uint8 of columns * (99 to 112) by rows * (99 to 112) px; a page of one tile has
        72 to 112 by 72 to 112 px.
    """
    if grid is None:
        grid = list(GRIDS)[rng.choice(len(GRIDS), p=list(GRIDS.values()))]
    columns, rows = 2 * grid[0], 2 * grid[1]
    sides = SMALL_SIDES if grid == (1, 1) else SIDES
    side_x, side_y = rng.integers(sides[0], sides[1] + 1, size=2).tolist()
    width, height = grid[0] * side_x, grid[1] * side_y
    kinds = rng.permutation(list(KINDS))[: rng.integers(FIELDS[0], FIELDS[1] + 1)].tolist()
    cells = [
        (
            width * x // columns,
            height * y // rows,
            width * (x + 1) // columns,
            height * (y + 1) // rows,
        )
        for y in range(rows)
        for x in range(columns)
    ]
    order = rng.permutation(len(cells)).tolist()
    fields = tuple(
        Field(kind, str(rng.choice(KINDS[kind].values)), place(cells[cell], rng))
        for kind, cell in zip(kinds, order, strict=False)
    )
    paper = tuple(rng.integers(228, 252, size=3).tolist())
    ink = tuple(rng.integers(10, 60, size=3).tolist())
    image = Image.new("RGB", (width, height), paper)
    canvas = ImageDraw.Draw(image)
    for field in fields:
        draw_field(canvas, field, KINDS[field.kind], ink)
    for cell in order[len(kinds) :]:
        if rng.random() < 0.5:
            draw_small_print(canvas, cells[cell], rng)
    return Page(scan(image, paper, rng), grid, fields)
