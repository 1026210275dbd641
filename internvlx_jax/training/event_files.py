"""Writes TensorBoard event files; imported where the extra `tensorboard` is installed only."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from internvlx_jax.core.disk import named_on_error
from internvlx_jax.core.paths import is_remote
from internvlx_jax.core.uploads import copy_file

# Made at the import by protobuf, so that no checker knows them.
Event, SessionLog = (getattr(event_pb2, name) for name in ("Event", "SessionLog"))

# What tensorboardX replaces in a name as well, but with a line of log each time.
ILLEGAL = re.compile(r"[^-/\w.]")


class EventFiles:
    """Writes TensorBoard event files.

    Events are appended to files, so those of a folder in an object store are written on the disk,
    and each is sent when it is flushed, which begins a new one. They are written here and not in
    the thread of tensorboardX, whose errors would be lost: after one, its queue fills up and the
    run hangs.
    """

    def __init__(self, folder: Path, purge_step: int):
        self._folder = folder
        self._purge_step: int | None = purge_step
        self._scratch = (
            tempfile.TemporaryDirectory(prefix="internvlx-") if is_remote(folder) else None
        )
        self._writer: EventsWriter | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with named_on_error(self._folder):
            if self._writer is None:
                self._writer = self._begun()
            for name, value in values.items():
                self._add(self._writer, step, summary=scalar(ILLEGAL.sub("_", name), value))
            self._writer.flush()

    def _begun(self) -> EventsWriter:
        """Begins a file; viewers forget what earlier files hold from `purge_step` on."""
        here = Path(self._scratch.name) if self._scratch else self._folder
        here.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(str(here / "events"))
        if self._purge_step is not None:
            begun = SessionLog(status=SessionLog.START)
            self._add(writer, self._purge_step, file_version="brain.Event:2")
            self._add(writer, self._purge_step, session_log=begun)
            self._purge_step = None
        return writer

    def _add(self, writer: EventsWriter, step: int, **content: Any) -> None:
        writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        """Sends the file of an object store."""
        if self._scratch is None or self._writer is None:
            return
        self._writer.close()
        self._writer = None
        for path in Path(self._scratch.name).iterdir():
            copy_file(path, self._folder / path.name)
            path.unlink()

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            with named_on_error(self._folder):
                self._writer.close()
        if self._scratch is not None:
            self._scratch.cleanup()
