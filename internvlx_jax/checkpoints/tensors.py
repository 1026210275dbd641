"""Tensors by name, whatever holds them, and what is done with each: copies, casts, comparison."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np

Dtype = Literal["keep", "float32", "bfloat16"]  # of what a conversion writes; keep is the source's


class Tensors(Protocol):
    """Named tensors that are read one at a time; a folder, or a view of several.

    `dtype` is in the words of safetensors, e.g. `BF16`; `read` may give a memory-mapped view.
    """

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def read(self, name: str) -> np.ndarray: ...


class ProtocolSpec:
    """Tensors of other collections under other names: {name: (collection, its name there)}."""

    def __init__(self, where: Mapping[str, tuple[Tensors, str]]):
        self._where = dict(where)

    def starting_with(self, prefix: str) -> ProtocolSpec:
        return ProtocolSpec(
            {name: place for name, place in self._where.items() if name.startswith(prefix)}
        )

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        tensors, stored = self._where[name]
        return tensors.shape(stored)

    def dtype(self, name: str) -> str:
        tensors, stored = self._where[name]
        return tensors.dtype(stored)

    def read(self, name: str) -> np.ndarray:
        tensors, stored = self._where[name]
        return tensors.read(stored)


class Changed:
    """`tensors`, some of which are computed: {name: (new shape, old array -> new array of the same dtype)}."""

    def __init__(self, tensors: Tensors, changes: Mapping[str, tuple[tuple[int, ...], Callable]]):
        self._tensors, self._changes = tensors, changes
        self.names, self.dtype = tensors.names, tensors.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._changes[name][0] if name in self._changes else self._tensors.shape(name)

    def read(self, name: str) -> np.ndarray:
        array = self._tensors.read(name)
        return self._changes[name][1](array) if name in self._changes else array


BLOCK = 256  # elements along each side of what is transposed at once; it stays in cache and in few pages


def copy_strided(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, several times faster where the axes of `source` lie in another order in memory."""
    if source.ndim < 2 or source.flags.c_contiguous:
        np.copyto(target, source, casting="unsafe")
        return
    if (
        source.dtype == target.dtype and source.dtype.itemsize == 2
    ):  # NumPy copies its own types faster
        source, target = source.view(np.uint16), target.view(np.uint16)
    fast = min(
        (axis for axis in range(source.ndim) if source.shape[axis] > 1),
        key=lambda axis: source.strides[axis],
        default=source.ndim - 1,
    )
    steps, room = [0] * source.ndim, BLOCK
    for axis in reversed(range(source.ndim)):
        if axis == fast:
            steps[axis] = BLOCK
        else:
            steps[axis] = max(1, min(room, source.shape[axis]))
            room //= steps[axis]
    for starts in itertools.product(
        *(range(0, size, step) for size, step in zip(source.shape, steps))
    ):
        block = tuple(slice(start, start + step) for start, step in zip(starts, steps))
        np.copyto(target[block], source[block], casting="unsafe")


def count_not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    exponent = {"bfloat16": 0x7F80, "float16": 0x7C00}.get(str(array.dtype))
    if exponent is not None and array.size and (array.view(np.uint16) & exponent).max() < exponent:
        return 0  # the usual answer, in half the time
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that jax takes as it is: on CPU it copies what does not begin at a multiple of 64 bytes."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def changed_by_cast(values: np.ndarray, cast: np.ndarray) -> int:
    """How many values a cast has changed; none where the new dtype holds every value of the old one."""
    if np.can_cast(values.dtype, cast.dtype):
        return 0
    return int(np.count_nonzero(cast.astype(values.dtype) != values))


def difference(name: str, expected: np.ndarray, found: np.ndarray) -> list[str]:
    """What is not bit-equal, in words: first index, largest difference, count; empty if all is."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return [
            f"{name}: {found.dtype}{list(found.shape)} instead of {expected.dtype}{list(expected.shape)}"
        ]
    kind = f"u{expected.itemsize}"
    changed = np.ascontiguousarray(expected).view(kind) != np.ascontiguousarray(found).view(kind)
    if not changed.any():
        return []
    first = tuple(int(n) for n in np.unravel_index(np.argmax(changed), changed.shape))
    apart = np.abs(expected[changed].astype(np.float64) - found[changed].astype(np.float64))
    return [
        f"{name}: {int(changed.sum())} values differ, first at {list(first)}, by at most {apart.max():.3g}"
    ]
