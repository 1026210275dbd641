"""Which parameters a run trains (spec: training.md 2)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import jax

from internvlx_jax.errors import ConfigError


def frozen_paths(paths: Iterable[str], expressions: Iterable[str]) -> set[str]:
    """Paths that any expression matches from their beginning, e.g. `vision` or `decoder.layers.*norm`.

    Raises ConfigError for an expression that is malformed or matches nothing, and when nothing is left to train.
    """
    paths, frozen = list(paths), set()
    for expression in expressions:
        try:
            matched = {path for path in paths if re.match(expression, path)}
        except re.error as error:
            raise ConfigError(f"freeze: {expression!r} is not a regular expression ({error})") from error
        if not matched:
            raise ConfigError(f"freeze: {expression!r} matches no parameter; paths begin with "
                              f"{', '.join(sorted({path.split('.')[0] for path in paths}))}")
        frozen |= matched
    if len(frozen) == len(paths):
        raise ConfigError("freeze: the expressions match every parameter, nothing is left to train")
    return frozen


def describe(shapes: Mapping[str, jax.ShapeDtypeStruct], frozen: set[str]) -> str:
    """Trained and frozen parameter counts of each module."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path, leaf in shapes.items():
        counts[path.split(".")[0]][path in frozen] += leaf.size
    return "\n".join(f"{module:10} {trained:>13,} trained  {still:>13,} frozen"
                     for module, (trained, still) in counts.items())
