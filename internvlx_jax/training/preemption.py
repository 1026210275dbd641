"""SIGTERM and Ctrl-C: the run saves at the next step that all processes reach.

(design: training.md 10)
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


class Preempted(Exception):
    """The run was stopped before its last step; it has been saved."""


class Preemption:
    """Knows whether the run was told to stop; as a context manager it handles the signals.

    With several processes jax has the handler of SIGTERM: a SIGTERM to any of them makes all agree
    on a step that none has passed, and Ctrl-C is passed on to it. A second Ctrl-C ends the run at
    once.

    Attributes:
        signal: what told the run to stop, in words.
    """

    def __init__(self) -> None:
        self._told, self.signal = False, "SIGTERM"
        self._asked = 0
        self._several = jax.distributed.is_initialized()
        # Python lets only the main thread take signals.
        main = threading.current_thread() is threading.main_thread()
        # A shell lets its background jobs ignore Ctrl-C; so they do here.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        self._takes = [signal.SIGINT] if main and not ignored else []
        if main and not self._several:
            self._takes.append(signal.SIGTERM)

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._take) for number in self._takes}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT:
            if self.signal == "Ctrl-C":
                raise KeyboardInterrupt
            self.signal = "Ctrl-C"
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)
                return
        self._told = True

    def reached(self) -> bool:
        """Returns whether to save this step and stop; all processes ask after every step."""
        # jax stops at the number behind the largest one that a process has asked with, and takes 0
        # where none has: counted from the start, so that a signal before the first step counts.
        self._asked += 1
        return self._told or multihost_utils.reached_preemption_sync_point(self._asked)
