"""Ends all processes of a job when one of them fails (design: training.md 10).

A process that fails alone leaves the others where they wait for it: in a collective, which has no
time limit, or in a barrier of a checkpoint, which waits for twenty minutes. Therefore it tells them
by the coordination service of jax, where each looks once a second. None of them waits for the
others at its end, as jax would.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from jax._src import distributed  # jax has no public access to its key-value store

FAILED, READ = "internvlx/failed", "internvlx/read"
LOOK_SECONDS = 1.0
OWN_SECONDS = 5.0  # in which a process may come to the same error by itself
PRINT_SECONDS = 1.0  # from an error until it has been printed
LEAVE_SECONDS = 10.0  # that process 0, which runs the service, waits for the others to have read


@contextlib.contextmanager
def ending_together(*agreed: type[BaseException]) -> Iterator[None]:
    """Ends every process of the job, each with one line, when the block fails in one of them.

    Does nothing in a job of one process.

    Args:
        agreed: Exceptions that all processes raise at the same point; they end as without an error.
    """
    client = distributed.global_state.client
    if client is None or (distributed.global_state.num_processes or 1) == 1:
        yield
        return
    peers = _Peers(client, distributed.global_state.process_id, distributed.global_state)
    peers.watch()
    try:
        yield
    except agreed:
        raise
    except BaseException as error:
        peers.fail(error)
        raise
    finally:
        peers.stop()


class _Peers:
    """The other processes of the job, as one sees them."""

    def __init__(self, client: Any, process: int, state: Any):
        self._client, self._process, self._count = client, process, state.num_processes
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._look, name="peers", daemon=True)

    def watch(self) -> None:
        """Looks from now on whether another process has failed."""
        self._watcher.start()

    def stop(self) -> None:
        """Looks no more."""
        self._done.set()
        self._watcher.join()

    def fail(self, error: BaseException) -> None:
        """Tells the others, and ends this process once its error has been printed."""
        self._done.set()
        said = f"process {self._process}: {_first_line(error)}"
        with contextlib.suppress(Exception):  # the others know already, or the service is gone
            self._client.key_value_set(f"{FAILED}/{self._process}", said)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        atexit.register(self._leave, status)
        # The interpreter waits for threads before that, and they may wait for other processes.
        threading.Thread(target=self._leave_soon, args=(status,), daemon=True).start()

    def _look(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            try:
                failed = self._client.key_value_dir_get(FAILED)
            except Exception:  # the service is gone; jax ends this process by itself
                continue
            if failed and not self._done.wait(OWN_SECONDS):
                print(f"error: stopped because of {failed[0][1]}", file=sys.stderr)
                self._leave(1)

    def _leave_soon(self, status: int) -> None:
        time.sleep(PRINT_SECONDS)
        self._leave(status)

    def _leave(self, status: int) -> None:
        """Ends this process, process 0 after the others."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{READ}/{self._process}", "", allow_overwrite=True)
            end = time.monotonic() + LEAVE_SECONDS
            while self._process == 0 and time.monotonic() < end:
                if len(self._client.key_value_dir_get(READ)) == self._count:
                    break
                time.sleep(0.1)
        os._exit(status)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
