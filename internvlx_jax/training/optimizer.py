"""AdamW behind a clip of the global norm (design: training.md 3, 11).

Schedules, weight-decay rules, groups of parameters, and an average of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from internvlx_jax.checkpoints.run_format import Ema
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.run_config import GroupConfig, OptimizerConfig
from internvlx_jax.training.freeze import TOWER_LAYERS, first_names, match_paths

NEVER_MATRICES = ("embedding", "cls_scale")  # the last component of a path, or a part of it
TOWER_EMBEDDINGS = ("vision.patch_embed.", "vision.class_embedding", "vision.position_embedding")

Axes = Mapping[str, tuple[str | None, ...]]


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Makes the learning-rate schedule: linear warm-up over W updates, then `config.schedule`.

    Update k = 0, 1, ... below W has rate lr * k / W, so the first one of a warm-up has rate 0.

    Args:
        config: Warm-up, schedule and highest rate.
        steps: Updates of the whole run.

    Raises:
        ConfigError: Warm-up and cool-down do not fit into the run.
    """
    warmup = (
        config.warmup_steps
        if config.warmup_steps is not None
        else math.ceil(config.warmup_ratio * steps)
    )
    rest, cooldown = max(steps - warmup, 1), math.ceil(config.cooldown_ratio * steps)
    lr = config.learning_rate
    if config.schedule == "wsd" and warmup + cooldown > steps:
        raise ConfigError(
            f"optimizer: {warmup} updates of warm-up and {cooldown} of cool-down (cooldown_ratio) "
            f"do not fit into a run of {steps}"
        )
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest),
        "linear": lambda: optax.linear_schedule(lr, 0.0, rest),
        "constant": lambda: optax.constant_schedule(lr),
        "wsd": lambda: optax.linear_schedule(
            lr, 0.0, max(cooldown, 1), transition_begin=rest - cooldown
        ),
    }[config.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, lr, max(warmup, 1)), after], [warmup])


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    trained: Mapping[str, jax.ShapeDtypeStruct],
    axes: Axes,
    model: ModelConfig,
) -> optax.GradientTransformation:
    """Makes the optimizer of the trained parameters, with decoupled weight decay.

    Args:
        config: Its settings.
        schedule: Its learning rate.
        trained: The trained part of a `freeze.ParameterPartition`.
        axes: Logical axes of all parameters, by dotted path.
        model: The model.

    Raises:
        ConfigError: A group matches no trained parameter.
    """
    rates, decays = (
        relative_rates(config, trained, model),
        weight_decays(config, trained, axes, model),
    )

    def scale(updates, params):
        return {
            path: rates[path] * (update + decays[path] * params[path])
            for path, update in updates.items()
        }

    chain = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(
            b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.moments_dtype
        ),
        optax.stateless(scale),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.ema_decay is not None:
        chain.append(_averaged(config.ema_decay))
    return optax.chain(*chain)


def average(opt_state: optax.OptState) -> dict[str, jax.Array] | None:
    """Returns the averaged parameters in an optimizer state, if it keeps them."""
    return optax.tree.get(opt_state, "ema")


def _averaged(decay: float) -> optax.GradientTransformation:
    """Passes updates through, and averages the parameters that they lead to."""

    def init(params):
        return Ema(jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params))

    def update(updates, state, params=None):
        assert params is not None  # optax makes them optional, an average needs them
        new = optax.apply_updates(params, updates)
        return updates, Ema(
            jax.tree.map(lambda old, p: decay * old + (1 - decay) * p, state.ema, new)
        )

    return optax.GradientTransformation(init, update)


def relative_rates(
    config: OptimizerConfig, trained: Mapping[str, jax.ShapeDtypeStruct], model: ModelConfig
) -> dict[str, float | np.ndarray]:
    """Returns each parameter's learning rate as a share of the optimizer's.

    With `vit_layer_decay` the rate of a stack of the tower is float32[L, 1, ...].
    """
    groups = _groups(config, trained)
    rates: dict[str, float | np.ndarray] = {}
    for path, leaf in trained.items():
        group = groups.get(path, GroupConfig(params=path))
        rates[path] = group_rate(config, group) * _layer_decay(
            config.vit_layer_decay, path, leaf, model.vision.layers
        )
    return rates


def group_rate(config: OptimizerConfig, group: GroupConfig) -> float:
    """Returns a group's learning rate as a share of the optimizer's."""
    own = 1.0 if group.learning_rate is None else group.learning_rate / config.learning_rate
    return own * group.multiplier


def _layer_decay(
    decay: float, path: str, leaf: jax.ShapeDtypeStruct, depth: int
) -> float | np.ndarray:
    if decay == 1.0 or not path.startswith((TOWER_LAYERS, *TOWER_EMBEDDINGS)):
        return 1.0
    if path.startswith(TOWER_EMBEDDINGS):
        return decay**depth
    # Layers behind each one; a divided stack holds the last layers, so they count from its end.
    below = np.arange(leaf.shape[0])[::-1]
    return np.float32(decay**below).reshape(-1, *[1] * (len(leaf.shape) - 1))


def weight_decays(
    config: OptimizerConfig,
    trained: Mapping[str, jax.ShapeDtypeStruct],
    axes: Axes,
    model: ModelConfig,
) -> dict[str, float]:
    """Returns each parameter's weight decay, 0 where the decay rule excludes it."""
    groups = _groups(config, trained)
    decays = {}
    for path in trained:
        own = groups[path].weight_decay if path in groups else None
        decays[path] = (config.weight_decay if own is None else own) * _decays(
            config.decay_rule, path, axes, model
        )
    return decays


def _decays(rule: str, path: str, axes: Axes, model: ModelConfig) -> bool:
    module, _, name = path.rpartition(".")
    if rule == "all":
        return True
    if rule == "trainer":
        layer_norm = "norm" in module and f"{module}.bias" in axes
        # The trainers that know Qwen3 tell norms by their names; older ones by their classes.
        rms_norm = (
            path.startswith("decoder.")
            and "norm" in module
            and model.decoder.family in ("llama", "qwen3")
        )
        return not (name == "bias" or layer_norm or rms_norm)
    # Stacking layers does not make a vector a matrix.
    rank = len(axes[path]) - axes[path].count("layers")
    return rank >= 2 and name != "bias" and not any(word in name for word in NEVER_MATRICES)


def _groups(config: OptimizerConfig, trained: Mapping[str, Any]) -> dict[str, GroupConfig]:
    """Returns the first group that matches each path, for paths that any group matches."""
    groups: dict[str, GroupConfig] = {}
    for group in config.groups:
        found = match_paths("optimizer.groups", group.params, trained) - groups.keys()
        if not found:
            raise ConfigError(
                f"optimizer.groups: {group.params!r} matches no trained parameter that an earlier "
                f"group has not; trained paths begin with {first_names(trained)}"
            )
        groups |= dict.fromkeys(found, group)
    return groups
