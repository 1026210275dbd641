"""SIGTERM: the run saves at the next step that all processes reach (design: training.md 10)."""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


class Preempted(Exception):
    """The run was stopped before its last step; it has been saved."""


class Preemption:
    """Knows whether the run was told to stop; as a context manager it handles SIGTERM.

    With several processes jax has the handler: a SIGTERM to any of them makes all agree on a step
    that none has passed.
    """

    def __init__(self) -> None:
        self._told = False
        # Python lets only the main thread take signals.
        self._takes = (
            not jax.distributed.is_initialized()
            and threading.current_thread() is threading.main_thread()
        )

    def __enter__(self) -> Preemption:
        if self._takes:
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._takes:
            signal.signal(signal.SIGTERM, self._before)

    def _take(self, *_: Any) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """Returns whether to save this step and stop; all processes ask after every step."""
        return self._told or multihost_utils.reached_preemption_sync_point(step)
