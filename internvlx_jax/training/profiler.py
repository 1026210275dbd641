"""A profiler trace of a few steps, for TensorBoard and Perfetto (design: training.md 7)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from internvlx_jax.core.errors import ConfigError


class Window(NamedTuple):
    """Holds the first and the last step of a trace, from 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """Reads `START:STOP`; raises ConfigError for anything else."""
        if not (found := re.fullmatch(r"(\d+):(\d+)", text)) or not 1 <= int(found[1]) <= int(
            found[2]
        ):
            raise ConfigError(
                f"--profile {text}: expected START:STOP, the first and the last step to trace, "
                "e.g. 20:24"
            )
        return cls(int(found[1]), int(found[2]))


class Profiler:
    """Traces a window of steps to a folder; does nothing without a window. Use it with `with`."""

    def __init__(self, folder: Path, window: Window | None):
        self._folder, self._window, self._tracing = folder, window, False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._tracing:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Starts the trace if `step` is in the window."""
        if self._window and self._window.first <= step <= self._window.last and not self._tracing:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: int, result: jax.Array) -> None:
        """Stops the trace behind the window's last step, once its `result` is computed."""
        if self._tracing and self._window and step == self._window.last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._tracing = False
