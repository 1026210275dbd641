"""Boxes in texts and how much they overlap (design: evaluation.md 6: RefCOCO)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]  # left, top, right, bottom

HIT = 0.5  # least intersection over union of a hit
THOUSAND = 1000  # models write coordinates as thousandths of width and height

_BRACKETS = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")
_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_SEPARATOR = r"(?:\s*,\s*|\s+)"
_NUMBERS = re.compile(rf"\[\s*{_SEPARATOR.join([f'({_NUMBER})'] * 4)}\s*\]")


def internvl_box(text: str) -> Box:
    """Reads the first four items in brackets; a box without area where they are no numbers."""
    found = _BRACKETS.findall(text)
    try:
        left, top, right, bottom = map(float, found[0])
    except (IndexError, ValueError):
        return 0.0, 0.0, 0.0, 0.0
    return left, top, right, bottom


def internvl_overlap(box: Box, target: Sequence[float], width: float, height: float) -> float:
    """Returns the intersection over union in single precision, as the InternVL script computes it.

    Coordinates whose sum is 4 or more are thousandths; NaN where both boxes have no area.

    Args:
        box: as the model wrote it.
        target: the reference in px.
        width, height: size of the image in px.
    """
    predicted = np.asarray(box, np.float32)
    if predicted.sum() >= 4:
        predicted = predicted / np.float32(THOUSAND)
    predicted = predicted * np.asarray((width, height, width, height), np.float32)
    return _overlap(predicted, np.asarray(target, np.float32))


def in_thousandths(box: Sequence[float], width: float, height: float) -> str:
    """Writes a box in px as models are trained to write it."""
    sides = (width, height, width, height)
    return f"[[{', '.join(f'{THOUSAND * x / side:.0f}' for x, side in zip(box, sides))}]]"


def vlmevalkit_box(text: str) -> Box | None:
    """Reads four numbers in brackets, else the first four numbers of the text."""
    match = _NUMBERS.search(text)
    numbers = match.groups() if match else re.findall(_NUMBER, text)[:4]
    if len(numbers) < 4:
        return None
    left, top, right, bottom = map(float, numbers)
    return left, top, right, bottom


def in_pixels(box: Box, width: float, height: float) -> Box | None:
    """Returns a box in px inside the image, with its corners in order.

    A largest coordinate of at most 1.5 means fractions, of at most 1000 thousandths, else px.
    """
    if width <= 0 or height <= 0 or any(map(math.isnan, box)):
        return None
    largest = max(map(abs, box))
    unit = 1.0 if largest <= 1.5 else float(THOUSAND) if largest <= THOUSAND else None
    sides = (width, height, width, height)
    if unit is not None:
        box = tuple(value / unit * side for value, side in zip(box, sides, strict=True))  # pyright: ignore[reportAssignmentType]
    x1, y1, x2, y2 = (min(max(value, 0.0), side) for value, side in zip(box, sides, strict=True))
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def vlmevalkit_overlap(a: Box, b: Box) -> float:
    """Returns the intersection over union; 0 where the boxes do not overlap."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the intersection over union of two boxes, float32[4] each."""
    corners = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    inside = np.maximum(corners[1] - corners[0], np.float32(0)).prod(dtype=np.float32)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    with np.errstate(all="ignore"):
        return float(inside / (areas[0] + areas[1] - inside))
