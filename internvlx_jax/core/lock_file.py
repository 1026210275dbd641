"""A file that one process owns, on a disk or in an object store (design: training.md 10).

Who owns it is written in it, and who wants it compares before it writes. On a disk the kernel's
lock on the file serializes the two, where the file system has such locks; an object store compares
the version of the object itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from internvlx_jax.core.disk import named_on_error
from internvlx_jax.core.paths import RemotePath
from internvlx_jax.core.remote import read_version, remove_version, write_version


class TakenError(Exception):
    """The content is not what the writer has seen: somebody else was faster."""


class LocalLockFile:
    """Reads, and conditionally replaces or removes, a small file on a disk."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> tuple[str, str] | None:
        """Returns the content, and what `write` has to be told to replace it; None without one."""
        try:
            with (
                self._path.open(encoding="utf-8", errors="replace") as file,
                _alone(file.fileno()),
            ):
                text = file.read()
        except FileNotFoundError:
            return None
        return text, text

    def write(self, text: str, seen: str | None) -> str:
        """Replaces the content `seen`, or makes the file where None was seen.

        Returns:
            What the next `write` has to be told.

        Raises:
            TakenError: The content is another one.
        """
        with named_on_error(self._path), self._open(create=seen is None) as number:
            if _content(number) != (seen or ""):
                raise TakenError
            try:
                # Over what is there, so that a full disk leaves the old content, not none.
                os.pwrite(number, text.encode(), 0)
                os.ftruncate(number, len(text.encode()))
                os.fsync(number)
            except OSError:
                if seen is None:
                    self._path.unlink(missing_ok=True)
                raise
        return text

    def remove(self, seen: str) -> None:
        """Removes the file if its content is `seen`; does nothing otherwise."""
        with contextlib.suppress(TakenError), self._open(create=False) as number:
            if _content(number) == seen:
                self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _open(self, *, create: bool) -> Iterator[int]:
        flags = os.O_RDWR | (os.O_CREAT if create else 0)
        while True:
            try:
                number = os.open(self._path, flags, 0o644)
            except FileNotFoundError:
                raise TakenError from None
            try:
                with _alone(number):
                    if _is_still(number, self._path):  # not removed while this process waited
                        yield number
                        return
            finally:
                os.close(number)
            if not create:
                raise TakenError


class RemoteLockFile:
    """Does the same with an object; what has been seen is its version."""

    def __init__(self, path: RemotePath):
        self._path = path

    def read(self) -> tuple[str, str] | None:
        """Returns the content, and what `write` has to be told to replace it; None without one."""
        found = read_version(self._path)
        return None if found is None else (found[0].decode(errors="replace"), found[1])

    def write(self, text: str, seen: str | None) -> str:
        """Writes the object if it has the version `seen`; see `LocalLockFile.write`.

        Raises:
            TakenError: It has another one.
        """
        written = write_version(self._path, text.encode(), seen)
        if written is not None:
            return written
        # The answer to a write can get lost, and the same write, sent again, is refused.
        found = self.read()
        if found is None or found[0] != text:
            raise TakenError
        return found[1]

    def remove(self, seen: str) -> None:
        """Removes the object if it has the version `seen`; does nothing otherwise."""
        remove_version(self._path, seen)


@contextlib.contextmanager
def _alone(number: int) -> Iterator[None]:
    """Holds the kernel's lock on an open file; does nothing where the file system has none."""
    with contextlib.suppress(OSError):
        fcntl.flock(number, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_UN)


def _content(number: int) -> str:
    return os.pread(number, 2**16, 0).decode(errors="replace")


def _is_still(number: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(number), there)
