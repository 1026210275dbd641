"""What process 0 finds out or does, and all processes of a run then know."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from internvlx_jax.core.errors import ConfigError

_ERRORS: tuple[type[Exception], ...] = (ConfigError, FileNotFoundError, OSError)


def on_first_process(act: Callable[[], Any]) -> Any:
    """Calls `act` in process 0 and returns its result in all processes.

    An error is raised in all of them alike, so that none waits for one that has ended.

    Args:
        act: Returns what JSON can hold.

    Raises:
        ConfigError, FileNotFoundError, OSError: What `act` raised. Other errors are raised in
            process 0, and as RuntimeError in the others.
    """
    if jax.process_count() == 1:
        return act()
    raised: Exception | None = None
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": act()}
        except Exception as error:  # raised below, in all processes
            raised = error
            kind = next((each.__name__ for each in _ERRORS if isinstance(error, each)), "")
            answer = {"error": str(error), "kind": kind}
    answer = _broadcast(answer)
    if raised is not None:
        raise raised
    if "error" in answer:
        kinds = {each.__name__: each for each in _ERRORS}
        raise kinds.get(answer["kind"], RuntimeError)(answer["error"])
    return answer["value"]


def _broadcast(answer: dict[str, Any]) -> dict[str, Any]:
    """Sends process 0's object to all: first how long its text is, then the text."""
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.zeros(length, np.uint8)
    if jax.process_index() == 0:
        sent[:] = text
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
