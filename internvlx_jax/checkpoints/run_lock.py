"""The lock of a run folder: one run at a time writes to it (design: training.md 10).

RUN/lock.json names the host and the process that write to the folder, and has a counter that they
raise every BEAT seconds. A run that was killed leaves it behind. Whether its owner still lives is
looked up on the owner's machine; from elsewhere, the counter is watched for some time. Clocks of
different hosts are never compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from internvlx_jax.checkpoints.agreement import on_first_process
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.lock_file import LocalLockFile, RemoteLockFile, TakenError
from internvlx_jax.core.paths import RemotePath, is_remote
from internvlx_jax.core.remote import check_access

logger = logging.getLogger(__name__)

LOCK = "lock.json"  # in the run folder
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 35.0  # seconds without one after which an owner on another machine counts as dead


class RunLock:
    """Keeps other runs out of a run folder; a context manager that all processes of a run enter.

    Process 0 holds the lock, and raises its counter in a thread.

    Args:
        run: The run folder, which is made.

    Raises:
        ConfigError: In all processes, that another run uses the folder.
    """

    def __init__(self, run: Path, *, beat: float = BEAT, patience: float = PATIENCE):
        self._run, self._beat, self._patience = run, beat, patience
        self._file = lock_file(run)
        self._owner = _this_process()
        self._seen: str | None = None  # what the file holds; None in processes without the lock
        self._new = self._lost = False
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        try:
            on_first_process(self._acquire)
        except BaseException:
            self._leave_no_folder()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        if self._seen is not None and not self._lost:
            self._file.remove(self._seen)
        self._leave_no_folder()

    def _leave_no_folder(self) -> None:
        """Removes the folder of a run that could not start, unless something is in it."""
        if self._new:
            with contextlib.suppress(OSError):
                self._run.rmdir()

    def check(self) -> None:
        """Raises ConfigError if another run has taken the folder, which this one may not touch.

        It can happen to a process that stood still for longer than others wait for it.
        """
        if self._lost:
            raise ConfigError(
                f"output_dir {self._run} was taken over by another run while this one gave no sign "
                "of life; nothing more is written here"
            )

    def _acquire(self) -> None:
        if is_remote(self._run):
            check_access(self._run)
        self._new = not self._run.exists()
        self._run.mkdir(parents=True, exist_ok=True)
        refused = ConfigError(f"output_dir {self._run} is being taken by another run just now")
        for _ in range(3):
            seen = refuse_if_used(self._run, self._patience)
            try:
                self._seen = self._file.write(self._text(0), seen)
            except TakenError:
                continue  # another start was faster; look at who it is
            self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
            self._thread.start()
            return
        raise refused

    def _keep(self) -> None:
        """Raises the counter until the run ends."""
        count = 0
        while not self._ending.wait(self._beat):
            count += 1
            try:
                assert self._seen is not None
                self._seen = self._file.write(self._text(count), self._seen)
            except TakenError:
                self._lost = True
                logger.error(f"{self._run / LOCK} was taken over by another run")
                return
            except OSError as error:  # a disk that is full now may have room again
                logger.warning(f"{self._run / LOCK} cannot be written ({error}); trying again")

    def _text(self, count: int) -> str:
        return json.dumps({**self._owner, "beat": count}) + "\n"


def lock_file(run: Path) -> LocalLockFile | RemoteLockFile:
    """Returns the lock file of a run folder."""
    path = run / LOCK
    return RemoteLockFile(path) if isinstance(path, RemotePath) else LocalLockFile(path)


def refuse_if_used(run: Path, patience: float = PATIENCE) -> str | None:
    """Looks at the lock of a run folder.

    Args:
        run: The run folder, which may not exist.
        patience: Seconds to watch the counter of an owner on another machine.

    Returns:
        What a writer has to have seen: None without a lock, or that of an owner which is dead.

    Raises:
        ConfigError: The owner lives; names its host and its process.
    """
    file = lock_file(run)
    found = file.read()
    if found is None:
        return None
    text, seen = found
    owner = _parse(text)
    if owner is not None and owner["machine"] and owner["machine"] == _machine():
        if _process_started(owner["process"]) != owner["started"]:
            return seen
        raise _used(run, owner)
    end = time.monotonic() + patience
    logger.info(
        f"{run / LOCK} is of {_name(owner)}; waiting up to {patience:.0f} s for a sign of life"
    )
    while time.monotonic() < end:
        time.sleep(min(1.0, patience / 10))
        now = file.read()
        if now is None:
            return None
        if now[0] != text:
            raise _used(run, _parse(now[0]))
    return seen


def _used(run: Path, owner: dict[str, Any] | None) -> ConfigError:
    return ConfigError(
        f"output_dir {run} is in use by {_name(owner)}; wait for it, stop it, or choose another "
        "output_dir"
    )


def _name(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another run"
    return f"process {owner['process']} on host {owner['host']}, since {owner['since']}"


def _parse(text: str) -> dict[str, Any] | None:
    """Returns the fields of a lock file; None for one that is being written, or is damaged."""
    try:
        fields = json.loads(text)
        return {name: fields[name] for name in ("host", "process", "started", "machine", "since")}
    except (ValueError, TypeError, KeyError):
        return None


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": _process_started(os.getpid()),
        "machine": _machine(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "token": uuid.uuid4().hex,
    }


def _machine() -> str:
    """Returns what tells this boot of this machine, and this container, from others; or nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_started(process: int) -> str | None:
    """Returns when a process of this machine was started, in ticks; None if it does not live."""
    try:
        # The name of the program, in parentheses, may hold spaces.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
