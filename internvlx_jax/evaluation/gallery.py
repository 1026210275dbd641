"""A picture of a few answered questions, from predictions.jsonl (design: evaluation.md 8).

Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.files import written_aside
from internvlx_jax.data.images import load_image
from internvlx_jax.evaluation.records import Record, read_objects

COLUMNS = 4
MAX_PAGES = 4  # of one question; the others are left out
CARD, PAGES = (300, 368), (276, 216)  # in px: a card, and the area of its pages
MARGIN, GAP, HEADER, INSET = 16, 12, 36, 12
LINE, LARGE = (14, 38), (17, 29)  # font size, and characters per line

PAPER, CARD_PAPER, EDGE, INK, GRAY = "#eef0f4", "#ffffff", "#cfd4dd", "#1d2430", "#667085"
RIGHT, WRONG = "#1a7f4b", "#b3261e"


def write_gallery(predictions: Path, out: Path, count: int = 8) -> None:
    """Draws answers that are evenly spread over the file, so they are not picked by their score.

    A page that cannot be read is a gray box.

    Args:
        predictions: the predictions.jsonl of an evaluation.
        out: the PNG to write, which appears complete or not at all.
        count: number of answers.

    Raises:
        FileNotFoundError: `predictions` does not exist.
        ConfigError: a line cannot be used; the message names it.
    """
    rows = _read(predictions)
    score = sum(row.score for row in rows) / len(rows)
    shown = [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else rows
    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    size = (
        2 * MARGIN + columns * CARD[0] + (columns - 1) * GAP,
        HEADER + MARGIN + lines * CARD[1] + (lines - 1) * GAP,
    )
    picture = Image.new("RGB", size, PAPER)
    header = f"{len(shown)} of {len(rows)} answers; mean score of all {score:.2f}"
    ImageDraw.Draw(picture).text((MARGIN, HEADER / 2), header, INK, _font(16), anchor="lm")
    for i, row in enumerate(shown):
        line, column = divmod(i, columns)
        picture.paste(
            _card(row), (MARGIN + column * (CARD[0] + GAP), HEADER + line * (CARD[1] + GAP))
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as aside:
        picture.save(aside, format="PNG")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ShownRow(Record):
    """The fields of a row of predictions.jsonl that a card shows."""

    prompt: str
    images: list[str]
    prediction: str
    answer: list[str]
    score: float
    error: str | None


def _read(path: Path) -> list[_ShownRow]:
    rows = [_ShownRow.from_json(stored, where) for where, stored in read_objects(path)]
    if not rows:
        raise ConfigError(f"{path}: no predictions in it; run eval.py again")
    return rows


def _card(row: _ShownRow) -> Image.Image:
    """Draws the pages of a question, and below them the question, the answer and a mark."""
    card = Image.new("RGB", CARD, CARD_PAPER)
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, CARD[0] - 1, CARD[1] - 1), outline=EDGE)
    pages = row.images[:MAX_PAGES]
    for i, path in enumerate(pages):
        width = PAGES[0] // len(pages)
        page = _page(path, (width - 8, PAGES[1]))
        left, top = i * width + (width - page.width) // 2, (PAGES[1] - page.height) // 2
        card.paste(page, (INSET + left, INSET + top))
    y = _write(draw, INSET, PAGES[1] + 2 * INSET, row.prompt, GRAY, LINE, 2) + 6
    right = row.score == 1
    _mark(draw, INSET, y, right)
    x = INSET + 28
    if row.error:
        _write(draw, x, y, f"error: {row.error}", WRONG, LINE, 4)
        return card
    y = _write(draw, x, y - 1, row.prediction or "(empty)", RIGHT if right else WRONG, LARGE, 1)
    if not right:
        y = _write(draw, x, y, "expected: " + " | ".join(row.answer), INK, LINE, 2)
    if 0 < row.score < 1:
        _write(draw, x, y, f"score {row.score:.2f}", GRAY, LINE, 1)
    return card


def _page(path: str, area: tuple[int, int]) -> Image.Image:
    try:
        page = load_image(path)
    except SampleError:
        return Image.new("RGB", area, EDGE)
    page = ImageOps.contain(page, area, Image.Resampling.LANCZOS)
    return ImageOps.expand(page, 1, EDGE)


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, right: bool) -> None:
    """Draws a tick or a cross of 18 px, because Pillow's own font has neither."""
    if right:
        draw.line([(x, y + 10), (x + 6, y + 16), (x + 18, y + 3)], RIGHT, 4, joint="curve")
    else:
        draw.line([(x + 2, y + 3), (x + 16, y + 17)], WRONG, 4)
        draw.line([(x + 16, y + 3), (x + 2, y + 17)], WRONG, 4)


def _write(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    color: str,
    style: tuple[int, int],
    lines: int,
) -> float:
    """Writes at most `lines` wrapped lines from y down; returns the top of the line below them."""
    size, characters = style
    for line in textwrap.wrap(
        text, characters - round(x / size), max_lines=lines, placeholder=" ..."
    ):
        draw.text((x, y), line, color, _font(size))
        y += size + 6
    return y


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
