"""One kind of path for local files and for objects behind gs:// and s3:// (design: platform.md 8).

`as_path` gives pathlib's Path for a local path, and for a URL a path with the same methods, so that
readers and writers need not know which. In an object store there are no folders: making one does
nothing, one exists while an object is in it, and an object appears as a whole when it is closed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from etils.epath import gpath

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.remote import explained, filesystem, is_url, kind_of, protocol_of

STORES = ("gs", "s3")


def as_path(path: str | os.PathLike) -> Path:
    """Returns the path of a local file, or that of an object for a URL.

    Raises:
        ConfigError: The URL is not of gs:// or s3://, or the package of its protocol is missing.
    """
    text = os.fspath(path)
    if not is_url(text):
        return Path(text)
    if protocol_of(text) not in STORES:
        raise ConfigError(
            f"{text}: {text.partition('://')[0]}:// cannot be used here; use gs://, s3:// or a "
            "local path"
        )
    filesystem(text)  # its error names the missing package
    head, _, rest = text.partition("://")
    return cast(Path, RemotePath(f"{protocol_of(head + '://')}://{rest}"))


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is one of an object store."""
    return isinstance(path, RemotePath) or (isinstance(path, str) and is_url(path))


class RemotePath(gpath.PosixGPath):
    """The path of an object, or of the objects whose names begin with it, with Path's methods."""

    @property
    def _client(self) -> Any:
        return filesystem(str(self))

    # --- asking -----------------------------------------------------------------------------------

    def exists(self, **_: Any) -> bool:
        """Returns whether there is an object of this name, or one below it."""
        return kind_of(self) != ""

    def is_file(self) -> bool:
        """Returns whether there is an object of this name."""
        return kind_of(self) == "file"

    def is_dir(self) -> bool:
        """Returns whether there are objects below this name."""
        return kind_of(self) == "directory"

    def stat(self, **_: Any) -> Any:
        """Returns `st_size` and `st_mtime_ns` of an object; its generation stands for the time."""
        with explained(self):
            info = self._client.info(str(self))
        version = info.get("generation") or info.get("ETag") or 0
        return SimpleNamespace(st_size=info["size"], st_mtime_ns=version, generation=version)

    def resolve(self, strict: bool = False) -> RemotePath:
        """Returns the path itself: a URL is absolute."""
        return self

    def absolute(self) -> RemotePath:
        """Returns the path itself: a URL is absolute."""
        return self

    def is_absolute(self) -> bool:
        """Returns True."""
        return True

    # --- listing ----------------------------------------------------------------------------------

    def iterdir(self) -> Iterator[RemotePath]:
        """Yields the objects and folders in a folder, sorted; listings are read by pages."""
        with explained(self):
            names: list[str] = self._client.ls(str(self), detail=False)
        for name in sorted({each.rstrip("/").rpartition("/")[2] for each in names} - {""}):
            if name != self.name or not self.is_file():
                yield self / name

    def glob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:
        """Yields what matches a pattern in this folder; `**/` before the last part goes deeper."""
        if pattern.startswith("**/"):
            yield from self.rglob(pattern.removeprefix("**/"))
            return
        head, _slash, last = pattern.rpartition("/")
        folder = self / head if head else self
        if folder.is_dir():
            for path in folder.iterdir():
                if fnmatch.fnmatchcase(path.name, last):
                    yield path

    def rglob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:
        """Yields the objects below this folder whose last parts match a pattern, sorted."""
        with explained(self):
            names = self._client.find(str(self))
        depth = pattern.count("/") + 1
        bucket_and_key = str(self).partition("://")[2].rstrip("/") + "/"
        for name in sorted(names):
            below = name.removeprefix(bucket_and_key)
            if fnmatch.fnmatchcase("/".join(below.split("/")[-depth:]), pattern):
                yield self / below

    # --- reading and writing ----------------------------------------------------------------------

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """Opens an object for reading, or for writing a new one; nothing can be appended to it."""
        if mode.strip("bt") not in ("r", "w"):
            raise ValueError(f"{self}: objects cannot be opened in mode {mode!r}")
        with explained(self, "read" if "r" in mode else "written"):
            file = self._client.open(str(self), mode.replace("t", "").replace("b", "") + "b")
        if "b" in mode:
            return file
        return io.TextIOWrapper(file, encoding=encoding or "utf-8", errors=errors, newline=newline)

    def read_bytes(self) -> bytes:
        """Reads the object."""
        with explained(self):
            return self._client.cat_file(str(self))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Reads the object as text."""
        data = io.BytesIO(self.read_bytes())
        return io.TextIOWrapper(data, encoding=encoding or "utf-8", errors=errors).read()

    def write_bytes(self, data: Any) -> int:
        """Writes the object in one request; readers see the old one until it is complete."""
        with explained(self, "written"):
            self._client.pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, *_: Any, **__: Any) -> int:
        """Writes text; see `write_bytes`."""
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def upload(self, local: Path) -> None:
        """Writes the object from a local file, in parts."""
        with explained(self, "written"):
            self._client.put_file(str(local), str(self))

    def download(self, local: Path) -> None:
        """Copies the object to a local file, in parts."""
        local.parent.mkdir(parents=True, exist_ok=True)
        with explained(self):
            self._client.get_file(str(self), str(local))

    # --- folders and removal ----------------------------------------------------------------------

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Does nothing: the names of objects need no folders."""

    def rmdir(self) -> None:
        """Does nothing: a folder without objects does not exist."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        try:
            with explained(self, "removed"):
                self._client.rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = True) -> None:
        """Removes all objects below this name."""
        with contextlib.suppress(FileNotFoundError), explained(self, "removed"):
            self._client.rm(str(self), recursive=True)
