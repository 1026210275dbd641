"""The towers that the rows of table A begin with, for benchmarks/ablation.py.

A classifier (`ablation_classifier.py`): every patch tells the kind and the value of the field in
its cell of a form.

Tiles show cells at three sizes, so that none of the tile rules meets a tower that has not seen what
it makes of a form: as drawn (two cells along the side), enlarged (one) and in a thumbnail (four).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ablation_classifier import UNKNOWN, PatchClassifier, known_loss, train_classifier
from einops import rearrange
from flax import nnx
from PIL import Image

from internvlx_jax.core.model_config import VisionConfig
from internvlx_jax.data.synthetic_forms import FORM_KINDS, TABLE, TILE, Form, make_form

ZOOMS = {2: 0.6, 1: 0.25, 4: 0.15}  # cells along the side of a tile, and how often
EMPTY = len(FORM_KINDS)  # kind of a cell without a field


@dataclasses.dataclass(frozen=True)
class TowerRecipe:
    """Describes how the tower is trained.

    Attributes:
        steps: Updates.
        tiles: Tiles of each update.
        forms: Different tiles; each is a form.
        learning_rate: The highest; it rises over `warmup` steps and falls along a cosine.
        warmup: Steps.
        seed: Of forms and weights.
    """

    steps: int
    tiles: int
    forms: int
    learning_rate: float = 1e-3
    warmup: int = 100
    seed: int = 1


def _slots() -> list[tuple[str, int, int]]:
    """Returns (kind, place in the value, number of classes) of everything that the head tells."""
    slots = [("kind", 0, EMPTY + 1)]
    for name, kind in FORM_KINDS.items():
        if not kind.values[0].isdigit():
            slots.append((name, 0, len(kind.values)))
            continue
        digits = 4 if name == TABLE else len(kind.values[0])
        slots += [(name, place, 10) for place in range(digits)]
    return slots


SLOTS = _slots()
STARTS = np.cumsum([0, *(count for _, _, count in SLOTS)])


def labels(form: Form) -> np.ndarray:
    """Returns int32[cells, slots]: the class of each slot in each cell, or UNKNOWN."""
    columns, rows = form.grid
    found = np.full((columns * rows, len(SLOTS)), UNKNOWN, np.int32)
    found[:, 0] = EMPTY
    side = form.image.width / columns
    for field in form.fields:
        left, top, right, bottom = field.box
        cell = int((top + bottom) / 2 // side) * columns + int((left + right) / 2 // side)
        found[cell, 0] = list(FORM_KINDS).index(field.kind)
        values = FORM_KINDS[field.kind].values
        for slot, (kind, place, _) in enumerate(SLOTS):
            if kind == field.kind:
                digit = field.value[place] if field.value.isdigit() else ""
                found[cell, slot] = int(digit) if digit else values.index(field.value)
    return found


def _tiles(recipe: TowerRecipe, zoom: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws tiles uint8[N, Y, X, 3] and their labels int32[N, cells, slots]."""
    count = max(recipe.tiles, round(recipe.forms * ZOOMS[zoom]))
    tiles = np.empty((count, TILE, TILE, 3), np.uint8)
    known = []
    for number in range(count):
        rng = np.random.default_rng(np.random.SeedSequence((recipe.seed, zoom, number)))
        form = make_form(rng, (zoom, zoom))
        tiles[number] = form.image.resize((TILE, TILE), Image.Resampling.BICUBIC)
        known.append(labels(form))
    return tiles, np.stack(known)


def _batches(recipe: TowerRecipe) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields zoom, tiles and labels of each step; every tile of a zoom is met before any again."""
    data = {zoom: _tiles(recipe, zoom) for zoom in ZOOMS}
    left: dict[int, list[int]] = {zoom: [] for zoom in ZOOMS}
    rng = np.random.default_rng(recipe.seed)
    for _ in range(recipe.steps):
        zoom = list(ZOOMS)[rng.choice(len(ZOOMS), p=list(ZOOMS.values()))]
        tiles, known = data[zoom]
        if len(left[zoom]) < recipe.tiles:
            left[zoom] = rng.permutation(len(tiles)).tolist()
        chosen = [left[zoom].pop() for _ in range(recipe.tiles)]
        yield zoom, tiles[chosen], known[chosen]


def train_tower(config: VisionConfig, recipe: TowerRecipe, out: Path) -> None:
    """Trains the tower and writes its parameters, unless that is done.

    Args:
        config: Of the tower, with tiles of TILE px.
        recipe: How.
        out: The file; see `train_classifier`.
    """
    if out.exists():
        return
    side = config.image_size // config.patch_size

    def loss(logits: jax.Array, known: jax.Array, zoom: int) -> jax.Array:
        by_cell = rearrange(
            logits,
            "n (y a x b) c -> n (y x) (a b) c",
            y=zoom,
            x=zoom,
            a=side // zoom,
            b=side // zoom,
        )
        return known_loss(by_cell, known, STARTS)

    train_classifier(
        PatchClassifier(config, int(STARTS[-1]), nnx.Rngs(recipe.seed)),
        _batches(recipe),
        loss,
        out,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
    )
