"""AdamW with warm-up and cosine, global-norm clip and weight-decay rules (spec: training.md 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import optax

from internvlx_jax.training.config import OptimizerConfig

NEVER_DECAYED = ("embedding", "cls_scale")  # the last or a part of the last path component


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """lr * k/W for update k < W = ceil(ratio * steps), so update 0 has rate 0; then lr * (1 + cos) / 2 down to 0."""
    warmup = math.ceil(config.warmup_ratio * steps)
    cosine = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
    if warmup == 0:
        return cosine
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), cosine], [warmup])


def decay_mask(config: OptimizerConfig, shapes: Mapping[str, jax.ShapeDtypeStruct],
               axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, bool]:
    """Which parameters decay. The stacking dim of layers does not count towards a tensor's rank."""
    if config.decay_rule == "all":
        return {path: True for path in shapes}

    def is_matrix(path: str) -> bool:
        name = path.rpartition(".")[2]
        rank = len(shapes[path].shape) - axes[path].count("layers")
        return rank >= 2 and name != "bias" and not any(word in name for word in NEVER_DECAYED)

    return {path: is_matrix(path) for path in shapes}


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule, mask: dict[str, bool]) -> optax.GradientTransformation:
    """Clip, then AdamW with decoupled decay on the masked parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=mask),
    )
