"""A profiler trace of a few steps, for TensorBoard and Perfetto (design: training.md 7)."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.paths import is_remote
from internvlx_jax.core.uploads import copy_file


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
        # A trace is written to a disk, and sent to an object store when it is complete.
        self._scratch = (
            tempfile.TemporaryDirectory(prefix="internvlx-")
            if window and is_remote(folder)
            else None
        )

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._tracing:
            self._stop()

    def before(self, step: int) -> None:
        """Starts the trace if `step` is in the window."""
        if self._window and self._window.first <= step <= self._window.last and not self._tracing:
            jax.profiler.start_trace(self._scratch.name if self._scratch else self._folder)
            self._tracing = True

    def after(self, step: int, result: jax.Array) -> None:
        """Stops the trace behind the window's last step, once its `result` is computed."""
        if self._tracing and self._window and step == self._window.last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        if self._scratch:
            for path in Path(self._scratch.name).rglob("*"):
                if path.is_file():
                    copy_file(path, self._folder / path.relative_to(self._scratch.name).as_posix())
            self._scratch.cleanup()
