"""Towers that learn as classifiers, for benchmarks/ablation.py.

Rows begin with a tower that reads, as models do in practice, and no projector or decoder has had a
part in it. A linear head tells what an image shows from every single patch, and is then thrown
away.

A head over many patches together reads as well, but leaves pieces of what it reads in different
patches, and no projector put them together again: rows of table A then told colors and shapes,
which every patch shows by itself, and no print.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internvlx_jax.core.files import written_aside
from internvlx_jax.core.model_config import VisionConfig
from internvlx_jax.models.internvlx import normalize_tiles
from internvlx_jax.models.params import flatten
from internvlx_jax.models.vit import VisionTower

UNKNOWN = -1  # label of what an image does not have


class PatchClassifier(nnx.Module):
    """Tells classes from each of the tower's patches."""

    def __init__(self, config: VisionConfig, classes: int, rngs: nnx.Rngs):
        self.vision = VisionTower(config, rngs=rngs, dtype=jnp.float32)
        # InternViT's own start, 1, hides what the patches of a tower of this width show.
        for embedding in (self.vision.position_embedding, self.vision.class_embedding):
            embedding[...] = 0.05 * embedding[...]
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, classes, rngs=rngs)

    def __call__(self, tiles: jax.Array) -> jax.Array:
        """Returns logits [N, patches, classes] of uint8[N, Y, X, 3]."""
        return self.head(self.norm(self.vision(normalize_tiles(tiles))[:, 1:]))


def known_loss(logits: jax.Array, known: jax.Array, starts: np.ndarray) -> jax.Array:
    """Returns the mean over patches of the cross entropy, summed over what is known.

    Args:
        logits: [..., patches, classes], the classes of all slots one after the other.
        known: int32[..., slots], the class within each slot or UNKNOWN.
        starts: First class of each slot, and the number of all classes.
    """
    known = jnp.broadcast_to(known[..., None, :], (*logits.shape[:-1], len(starts) - 1))
    total = jnp.float32(0)
    for slot in range(len(starts) - 1):
        target = known[..., slot]
        loss = optax.softmax_cross_entropy_with_integer_labels(
            logits[..., int(starts[slot]) : int(starts[slot + 1])], jnp.maximum(target, 0)
        )
        total += jnp.sum(jnp.where(target == UNKNOWN, 0, loss))
    return total / known[..., 0].size


def train_classifier(
    classifier: PatchClassifier,
    batches: Iterable[tuple[Hashable, np.ndarray, np.ndarray]],
    loss: Callable[[jax.Array, jax.Array, Any], jax.Array],
    out: Path,
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 100,
) -> None:
    """Trains a classifier on all devices and writes the parameters of its tower.

    Args:
        classifier: A fresh one.
        batches: What kind of images a step has, the images uint8[N, Y, X, 3] and their labels; a
            step is compiled for each kind.
        loss: Of the logits [N, patches, classes] and labels of a kind.
        out: The file, npz: dotted paths below `vision`, float32.
        steps: Updates, as many as there are batches.
        learning_rate: The highest; it rises over `warmup` steps and falls along a cosine.
        warmup: Steps.
    """
    graph, params = nnx.split(classifier)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, min(warmup, steps // 2), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    state = jax.device_put((params, optimizer.init(params)), everywhere)

    def step(state: Any, kind: Any, tiles: jax.Array, known: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(
            lambda params: loss(nnx.merge(graph, params)(tiles), known, kind)
        )(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    run = jax.jit(step, static_argnums=1, donate_argnums=0)
    losses: dict[Hashable, list[float]] = defaultdict(list)
    for number, (kind, tiles, known) in enumerate(batches, start=1):
        state, value = run(state, kind, *jax.device_put((tiles, known), split))
        losses[kind].append(float(value))
        if number % max(1, steps // 20) == 0:
            means = {kind: f"{np.mean(last[-50:]):.3f}" for kind, last in losses.items()}
            print(f"tower: step {number} of {steps}, loss {means}", flush=True)
    tower = flatten(nnx.to_pure_dict(state[0])["vision"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as aside, aside.open("wb") as file:
        np.savez(file, **{path: np.asarray(value) for path, value in tower.items()})
