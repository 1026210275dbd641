"""The size index of a large annotation, made by parts (design: data.md 10).

A part is a file of its own until the index is complete. So an interrupted index goes on where it
was, the cores of a host make several at once, and processes that share a folder share the parts.
"""

from __future__ import annotations

import logging
import multiprocessing
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.paths import RemotePath
from internvlx_jax.data.size_index import SizeIndex
from internvlx_jax.data.workers import available_cores, end_with_parent, without_main

logger = logging.getLogger(__name__)

PART = 16_384  # records of a part, a multiple of index.CHUNK
LARGE = 3 * PART  # records from which an index is made by parts


class Builder(Protocol):
    """What makes the rows of an index; it is picklable."""

    @property
    def name(self) -> str:
        """Returns what the index is called where its progress is shown."""
        ...

    def build(self, positions: range, progress: bool = False) -> SizeIndex:
        """Returns the rows of the index for a range of records."""
        ...


def is_large(count: int) -> bool:
    """Returns whether an index of so many records is made by parts."""
    return count >= LARGE


def parts_folder(index: Path) -> Path:
    """Returns the folder of the parts of an index."""
    return index.with_suffix(".parts")


def remove_parts(index: Path) -> None:
    """Removes the parts of an index that is complete."""
    folder = parts_folder(index)
    with suppress(OSError):
        for path in list(folder.iterdir()) if folder.is_dir() else []:
            path.unlink(missing_ok=True)
        folder.rmdir()


class IndexParts:
    """The parts of one index.

    Args:
        builder: makes the rows.
        count: records of the index.
        folder: where the parts are kept; None: they stay in memory.
    """

    def __init__(self, builder: Builder, count: int, folder: Path | None):
        self._builder, self._count, self._folder = builder, count, folder
        self._made: dict[int, SizeIndex] = {}

    @property
    def _numbers(self) -> range:
        return range(-(-self._count // PART))

    def _positions(self, number: int) -> range:
        return range(number * PART, min((number + 1) * PART, self._count))

    def make(
        self,
        process: int = 0,
        processes: int = 1,
        *,
        workers: int | None = None,
        progress: bool = False,
    ) -> None:
        """Makes the missing parts of one process's share.

        Args:
            process: number of the process, which makes every `processes`-th part.
            processes: number of processes that share the parts.
            workers: worker processes; None is one per core.
            progress: whether to show a progress bar.

        Raises:
            ConfigError: a worker was ended from outside.
        """
        numbers = self._missing(self._numbers[process::processes])
        total = sum(len(self._positions(number)) for number in numbers)
        label = self._builder.name
        with tqdm(total=total, desc=label, unit=" samples", disable=not progress) as bar:
            for number, part in self._built(numbers, workers or available_cores()):
                if part is not None:
                    self._made[number] = part
                bar.update(len(self._positions(number)))

    def join(self) -> SizeIndex:
        """Returns the index; parts that another process has not made in time are made here."""
        if self._folder is not None:
            self.make()
        return SizeIndex.join([self._part(number) for number in self._numbers])

    def _missing(self, numbers: Iterable[int]) -> list[int]:
        kept: set[str] = set()
        if self._folder is not None and self._folder.is_dir():
            kept = {path.name for path in self._folder.iterdir()}
        return [n for n in numbers if n not in self._made and _name(n) not in kept]

    def _built(self, numbers: list[int], workers: int) -> Iterator[tuple[int, SizeIndex | None]]:
        """Yields (number, part) of parts as they are made; None for one that has been kept."""
        workers = min(workers, len(numbers))
        if workers <= 1:
            for number in numbers:
                yield number, _make(self._builder, self._positions(number), self._path(number))
            return
        spawn = multiprocessing.get_context("spawn")  # never by fork: threads and devices are here
        try:
            with ProcessPoolExecutor(workers, spawn, _start, (self._builder,)) as pool:
                with without_main():
                    tasks = {
                        pool.submit(_make_here, self._positions(number), self._path(number)): number
                        for number in numbers
                    }
                try:
                    for task in as_completed(tasks):
                        yield tasks[task], task.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        except BrokenProcessPool as error:
            raise ConfigError(
                f"a process that makes the {self._builder.name} has ended, perhaps for want of "
                f"memory; set data.index_workers below {workers}, finished parts are kept"
            ) from error

    def _path(self, number: int) -> Path | None:
        return None if self._folder is None else self._folder / _name(number)

    def _part(self, number: int) -> SizeIndex:
        if number in self._made:
            return self._made[number]
        path = self._path(number)
        assert path is not None, "parts without a folder are in memory"
        positions = self._positions(number)
        try:
            part = SizeIndex.load(path)
            if len(part) == len(positions):
                return part
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            logger.warning(f"{path} is damaged ({type(error).__name__}), so it is made again")
        return self._builder.build(positions)


def _name(number: int) -> str:
    return f"{number:06d}.npz"


def _make(builder: Builder, positions: range, path: Path | None) -> SizeIndex | None:
    """Makes a part; returns None once it is kept."""
    part = builder.build(positions)
    if path is None:
        return part
    if not isinstance(path, RemotePath):
        path.parent.mkdir(parents=True, exist_ok=True)
    part.save(path)
    return None


_BUILDER: list[Builder] = []  # of this worker process


def _start(builder: Builder) -> None:
    end_with_parent()
    _BUILDER.append(builder)


def _make_here(positions: range, path: Path | None) -> SizeIndex | None:
    return _make(_BUILDER[0], positions, path)
