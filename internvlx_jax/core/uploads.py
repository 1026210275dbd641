"""Folders between the local disk and an object store (design: platform.md 8)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from internvlx_jax.core.paths import RemotePath, as_path, is_remote
from internvlx_jax.core.remote import explained, filesystem

MARKER = "commit_success.txt"  # orbax writes it last into a step behind gs://
LAST = (MARKER, "config.json")  # what makes a folder one: a reader looks for them
THREADS = 8


def upload_folder(local: Path, remote: RemotePath) -> None:
    """Copies the files of a folder, those that readers look for last.

    What was written is removed if it fails.
    """
    files = sorted(path for path in local.rglob("*") if path.is_file())
    written: list[RemotePath] = []

    def upload(path: Path) -> None:
        target = remote / path.relative_to(local).as_posix()
        written.append(target)
        target.upload(path)

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(upload, (path for path in files if path.name not in LAST)):
                pass
        for name in LAST:
            for path in files:
                if path.name == name:
                    upload(path)
    except BaseException:
        for target in written:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def sent_ahead(remote: Path) -> Iterator[Callable[[Path], None] | None]:
    """Gives a function that sends a file to a folder of an object store, and removes it here.

    Files are sent while the rest of the folder is made. They are removed there if the block fails.
    For a local folder there is nothing to send, and no function.
    """
    if not isinstance(remote, RemotePath):
        yield None
        return
    sent: list[RemotePath] = []

    def send(path: Path) -> None:
        target = remote / path.name
        sent.append(target)
        target.upload(path)
        path.unlink()

    try:
        yield send
    except BaseException:
        for target in sent:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
        raise


def copy_tree(source: Path, target: Path) -> None:
    """Copies the files of a folder, which may be one of an object store, into a local folder."""

    def copy(path: Path) -> None:
        copy_file(path, target / path.relative_to(source).as_posix())

    # What an object store lists are its objects; a disk also lists folders.
    paths = [path for path in source.rglob("*") if is_remote(path) or path.is_file()]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(copy, paths):
            pass


def copy_file(source: Path, target: Path) -> None:
    """Copies a file of any kind to a local path, or to one of an object store."""
    if isinstance(source, RemotePath) and not is_remote(target):
        source.download(target)
    elif isinstance(target, RemotePath) and not is_remote(source):
        target.upload(source)
    elif isinstance(target, RemotePath):
        target.write_bytes(source.read_bytes())
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def cache_folder() -> Path:
    """Returns the local folder for what can be made again, such as copies of remote files.

    INTERNVLX_CACHE names it; else it is one in XDG_CACHE_HOME, which is ~/.cache if unset.
    """
    stated, caches = os.environ.get("INTERNVLX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if stated:
        return Path(stated)
    return (Path(caches) if caches else Path.home() / ".cache") / "internvlx_jax"


def local_folder(
    path: str | os.PathLike, *, leave_out: Iterable[str] = (), leave_out_files: Iterable[str] = ()
) -> Path:
    """Returns a local folder as it is, or a local copy of a remote one.

    Copies are kept in the cache. Their key holds the generation of every file, so a folder that has
    changed is copied again.

    Args:
        path: Folder, or one file, which is returned with those beside it.
        leave_out: Names of folders below that are not needed.
        leave_out_files: Ends of the names of files that are not needed.

    Raises:
        FileNotFoundError: There is no object below this URL.
    """
    remote = as_path(path)
    if not isinstance(remote, RemotePath):
        return remote
    if remote.is_file():
        return local_folder(remote.parent, leave_out=leave_out) / remote.name
    with explained(remote):
        found = filesystem(str(remote)).find(str(remote), detail=True)
    root = str(remote).partition("://")[2].rstrip("/") + "/"
    infos = {name.removeprefix(root): info for name, info in sorted(found.items())}
    left_out = tuple(f"{name}/" for name in leave_out)
    infos = {name: info for name, info in infos.items() if not name.startswith(left_out or "\0")}
    ends = tuple(leave_out_files) or ("\0",)
    infos = {name: info for name, info in infos.items() if not name.endswith(ends)}
    if not infos:
        raise FileNotFoundError(f"{remote} does not exist")
    versions = [
        (name, info["size"], str(info.get("generation") or info.get("ETag")))
        for name, info in infos.items()
    ]
    kept = cache_folder() / "folders" / hashlib.sha256(str(remote).encode()).hexdigest()[:16]
    copy = kept / hashlib.sha256(repr(versions).encode()).hexdigest()[:16]
    if not copy.is_dir():
        aside = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda name: (remote / name).download(aside / name), infos):
                pass
        with contextlib.suppress(OSError):  # another process was faster
            aside.rename(copy)
        shutil.rmtree(aside, ignore_errors=True)
    return copy
