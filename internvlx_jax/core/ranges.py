"""Ranges of numeric settings, checked where a config is made.

Every int and float field of a config has one; tests/core/test_ranges.py goes through all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from internvlx_jax.core.errors import ConfigError

LARGEST = 2**31 - 1  # of any count: arrays are indexed by int32
MOST = 2**62  # where a number is no index


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; an open end is not part of it."""

    low: float
    high: float = LARGEST
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """Returns whether a number is inside; NaN never is."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high in (LARGEST, MOST):
            return f"{'above' if self.low_open else 'at least'} {self.low:g}"
        if self.low_open and self.high_open:
            return f"between {self.low:g} and {self.high:g}"
        if self.low_open:
            return f"above {self.low:g} and at most {self.high:g}"
        return f"from {self.low:g} to {'below ' * self.high_open}{self.high:.10g}"


COUNT = Range(1)  # at least 1
NUMBER = Range(0)  # at least 0
LAYERS = Range(1, 4096)  # each has parameters of its own, which are listed
POSITIVE = Range(0, low_open=True)
SHARE = Range(0, 1)
RATE = Range(0, 1, high_open=True)  # of drop path, and of Adam's averages
SEED = Range(0, 2**32 - 1)


def check_ranges(config: Any, path: str = "", **ranges: Range) -> None:
    """Checks fields of a config; None is left to the type of the field.

    Args:
        config: a dataclass.
        path: where it stands in the whole config, for messages, such as "optimizer.".
        **ranges: the range of each numeric field.

    Raises:
        ConfigError: names the field, the value and what it must be.
    """
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if value is None:
            continue
        values = value if isinstance(value, tuple) else (value,)
        for each in values:
            if not math.isfinite(each):
                raise ConfigError(f"{path}{name} is {each}, it must be a finite number")
            if not allowed.holds(each):
                raise ConfigError(f"{path}{name} is {each}, it must be {allowed}")


def whole_number(allowed: Range) -> Callable[[str], int]:
    """Returns the `type` of a command-line flag that takes a whole number of a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not allowed.holds(value):
            raise argparse.ArgumentTypeError(f"{value} must be {allowed}")
        return value

    return parse


def real_number(allowed: Range) -> Callable[[str], float]:
    """Returns the `type` of a command-line flag that takes a number of a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or not allowed.holds(value):
            raise argparse.ArgumentTypeError(f"{text} must be {allowed}")
        return value

    return parse
