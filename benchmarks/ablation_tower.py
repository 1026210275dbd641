"""The tower that all rows of table A begin with, for benchmarks/ablation.py.

It is a classifier: a linear head tells the kind and the value of the field in each cell of a form
from every single patch of that cell, and is then thrown away. Rows begin with a tower that reads,
as models do in practice, and no projector or decoder has had a part in it.

A head over all patches of a cell together reads as well, but leaves pieces of a word in different
patches, and no projector put them together again: rows then told colors and shapes, which every
patch shows by itself, and no print.

Tiles show cells at three sizes, so that none of the tile rules meets a tower that has not seen what
it makes of a form: as drawn (two cells along the side), enlarged (one) and in a thumbnail (four).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from internvlx_jax.core.files import written_aside
from internvlx_jax.core.model_config import VisionConfig
from internvlx_jax.data.synthetic_forms import FORM_KINDS, TABLE, TILE, Form, make_form
from internvlx_jax.models.internvlx import normalize_tiles
from internvlx_jax.models.params import flatten
from internvlx_jax.models.vit import VisionTower

ZOOMS = {2: 0.6, 1: 0.25, 4: 0.15}  # cells along the side of a tile, and how often
EMPTY = len(FORM_KINDS)  # kind of a cell without a field
UNKNOWN = -1  # label of what a cell does not have


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


class Classifier(nnx.Module):
    """Tells kinds and values of fields from the tower's patches."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.vision = VisionTower(config, rngs=rngs, dtype=jnp.float32)
        # InternViT's own start, 1, hides what the patches of a tower of this width show.
        for embedding in (self.vision.position_embedding, self.vision.class_embedding):
            embedding[...] = 0.05 * embedding[...]
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, int(STARTS[-1]), rngs=rngs)

    def __call__(self, tiles: jax.Array, zoom: int) -> jax.Array:
        """Returns logits [N, cells, patches of each, classes of all slots] of uint8[N, Y, X, 3]."""
        x = self.norm(self.vision(normalize_tiles(tiles))[:, 1:])
        side = round(x.shape[1] ** 0.5)
        x = rearrange(
            x,
            "n (y a x b) v -> n (y x) (a b) v",
            y=zoom,
            x=zoom,
            a=side // zoom,
            b=side // zoom,
        )
        return self.head(x)


def _loss(logits: jax.Array, known: jax.Array) -> jax.Array:
    """Returns the mean over patches of the cross entropy, summed over what their cell has."""
    known = jnp.broadcast_to(known[:, :, None], (*logits.shape[:3], len(SLOTS)))
    total = jnp.float32(0)
    for slot, (start, stop) in enumerate(pairwise(STARTS.tolist())):
        target = known[..., slot]
        loss = optax.softmax_cross_entropy_with_integer_labels(
            logits[..., start:stop], jnp.maximum(target, 0)
        )
        total += jnp.sum(jnp.where(target == UNKNOWN, 0, loss))
    return total / known[..., 0].size


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
    """Trains the tower on all devices and writes its parameters, unless that is done.

    Args:
        config: Of the tower, with tiles of TILE px.
        recipe: How.
        out: The file, npz: dotted paths below `vision`, float32.
    """
    if out.exists():
        return
    graph, params = nnx.split(Classifier(config, nnx.Rngs(recipe.seed)))
    schedule = optax.warmup_cosine_decay_schedule(
        0, recipe.learning_rate, min(recipe.warmup, recipe.steps // 2), recipe.steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    state = jax.device_put((params, optimizer.init(params)), everywhere)

    def step(state: Any, zoom: int, tiles: jax.Array, known: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        loss, grads = jax.value_and_grad(
            lambda params: _loss(nnx.merge(graph, params)(tiles, zoom), known)
        )(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    run = jax.jit(step, static_argnums=1, donate_argnums=0)
    losses: dict[int, list[float]] = {zoom: [] for zoom in ZOOMS}
    for number, (zoom, tiles, known) in enumerate(_batches(recipe), start=1):
        state, loss = run(state, zoom, *jax.device_put((tiles, known), split))
        losses[zoom].append(float(loss))
        if number % max(1, recipe.steps // 20) == 0:
            means = {zoom: f"{np.mean(last[-50:]):.3f}" for zoom, last in losses.items() if last}
            print(f"tower: step {number} of {recipe.steps}, loss by zoom {means}", flush=True)
    tower = flatten(nnx.to_pure_dict(state[0])["vision"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as aside, aside.open("wb") as file:
        np.savez(file, **{path: np.asarray(value) for path, value in tower.items()})
