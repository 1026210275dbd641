"""Named tensors, wherever they are stored, and how they are copied, cast and compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import jax
import ml_dtypes
import numpy as np

Dtype = Literal["keep", "float32", "bfloat16"]  # written by a conversion; keep is the source's
NUMPY_DTYPES: Mapping[Dtype, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Tensors(Protocol):
    """Named tensors that are read one at a time: a folder, or a view of several."""

    def names(self) -> list[str]:
        """Returns the names, in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of one tensor."""
        ...

    def dtype(self, name: str) -> str:
        """Returns the dtype of one tensor in the words of safetensors, e.g. `BF16`."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor; the array may be memory-mapped."""
        ...


class RenamedTensors:
    """Tensors of other collections under other names."""

    def __init__(self, where: Mapping[str, tuple[Tensors, str]]):
        """Takes name -> (collection, the tensor's name in it)."""
        self._where = dict(where)

    def starting_with(self, prefix: str) -> RenamedTensors:
        """Returns the tensors whose names begin with `prefix`, under the same names."""
        return RenamedTensors(
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


Change = tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]


class ChangedTensors:
    """Tensors some of which are computed from the stored ones."""

    def __init__(self, tensors: Tensors, changes: Mapping[str, Change]):
        """Takes name -> (new shape, function from the stored array to the new one, same dtype)."""
        self._tensors, self._changes = tensors, changes

    def names(self) -> list[str]:
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._changes[name][0] if name in self._changes else self._tensors.shape(name)

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(name)

    def read(self, name: str) -> np.ndarray:
        array = self._tensors.read(name)
        return self._changes[name][1](array) if name in self._changes else array


class SplitArray:
    """An array on the host in parts of its leading axis, which it gives row by row.

    Large parameters are read so: orbax holds every part twice for a moment, and joining the parts
    would double the whole. `np.asarray` joins (and copies) them.
    """

    def __init__(self, array: jax.Array):
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        self._parts = [np.asarray(shard.data) for shard in shards]
        self.shape, self.dtype = array.shape, array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        part, rest = divmod(row, len(self._parts[0]))
        return self._parts[part][rest]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)


HostArray = np.ndarray | SplitArray

# Elements along each side of what is transposed at once: it stays in cache and in few pages.
BLOCK = 256


def copy_strided(target: np.ndarray, source: np.ndarray) -> None:
    """Copies as `target[...] = source`, several times faster where the axes lie in another order.

    Args:
        target: array of the shape of `source`; its dtype is cast to.
        source: array whose axes may lie in any order in memory.
    """
    if source.ndim < 2 or source.flags.c_contiguous:
        np.copyto(target, source, casting="unsafe")
        return
    if source.dtype == target.dtype and source.dtype.itemsize == 2:
        # NumPy copies its own types faster than bfloat16.
        source, target = source.view(np.uint16), target.view(np.uint16)
    fast = min(
        (axis for axis in range(source.ndim) if source.shape[axis] > 1),
        key=lambda axis: source.strides[axis],
        default=source.ndim - 1,
    )
    steps, left = [0] * source.ndim, BLOCK
    for axis in reversed(range(source.ndim)):
        if axis == fast:
            steps[axis] = BLOCK
        else:
            steps[axis] = max(1, min(left, source.shape[axis]))
            left //= steps[axis]
    for starts in itertools.product(
        *(range(0, size, step) for size, step in zip(source.shape, steps, strict=True))
    ):
        block = tuple(slice(at, at + step) for at, step in zip(starts, steps, strict=True))
        np.copyto(target[block], source[block], casting="unsafe")


def count_not_finite(array: np.ndarray) -> int:
    """Counts the values that are NaN or infinite."""
    exponent = {"bfloat16": 0x7F80, "float16": 0x7C00}.get(str(array.dtype))
    if exponent is not None and array.size and (array.view(np.uint16) & exponent).max() < exponent:
        return 0  # the usual answer, in half the time
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def changed_by_cast(values: np.ndarray, cast: np.ndarray) -> int:
    """Counts the values that a cast has changed.

    Returns 0 at once where the new dtype holds every value of the old one.
    """
    if np.can_cast(values.dtype, cast.dtype):
        return 0
    return int(np.count_nonzero(cast.astype(values.dtype) != values))


def difference(name: str, expected: np.ndarray, found: np.ndarray) -> list[str]:
    """Describes what is not bit-equal: first index, largest difference, count; empty if all is.

    Args:
        name: what the description begins with.
        expected: array.
        found: array, of any shape and dtype.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return [
            f"{name}: {found.dtype}{list(found.shape)} instead of "
            f"{expected.dtype}{list(expected.shape)}"
        ]
    kind = f"u{expected.itemsize}"
    changed = np.ascontiguousarray(expected).view(kind) != np.ascontiguousarray(found).view(kind)
    if not changed.any():
        return []
    first = [int(n) for n in np.unravel_index(np.argmax(changed), changed.shape)]
    apart = np.abs(expected[changed].astype(np.float64) - found[changed].astype(np.float64))
    return [
        f"{name}: {int(changed.sum())} values differ, first at {first}, by at most "
        f"{apart.max():.3g}"
    ]
