"""Entries of the name table: one parameter, the tensors it is made of, and the way between them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Part:
    """A source tensor, or some of its rows, and how it becomes a parameter or a part of one.

    Attributes:
        source: name of the tensor; `{l}` stands for the layer.
        pattern: einops pattern from the tensor to the parameter.
        rows: first row and end, or None for all rows.
    """

    source: str
    pattern: str
    rows: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and the tensors it is made of.

    Attributes:
        target: dotted parameter path.
        parts: source tensors; several are concatenated on target axis `axis`.
        dims: sizes of pattern letters that do not follow from the arrays.
        axis: target axis of several parts, counted without the stack.
        sizes: length of each part on that axis.
        layers: length of the stack, or None for a single tensor.
    """

    target: str
    parts: tuple[Part, ...]
    dims: Mapping[str, int]
    axis: int = 0
    sizes: tuple[int, ...] = ()
    layers: int | None = None

    def sources(self, layer: int | None = None) -> list[str]:
        """Returns the name of each part's tensor in one layer, or in all of them one by one."""
        layers = range(self.layers or 1) if layer is None else (layer,)
        return [part.source.format(l=each) for each in layers for part in self.parts]

    def to_target(self, tensors: Sequence[np.ndarray], index: tuple[slice, ...] = ()) -> np.ndarray:
        """Turns the tensors of one layer into the parameter, or its slice of the stack.

        The result is a view wherever NumPy allows: of memory-mapped tensors, only the bytes under
        `index` are read.

        Args:
            tensors: one per part.
            index: which slice of the result to return.
        """
        arrays = [
            _apply(
                part.pattern, tensor if part.rows is None else tensor[slice(*part.rows)], self.dims
            )
            for part, tensor in zip(self.parts, tensors, strict=True)
        ]
        if len(arrays) == 1:
            return arrays[0][index]
        index = index + (slice(None),) * (arrays[0].ndim - len(index))
        first, last, _ = index[self.axis].indices(sum(self.sizes))
        pieces = []
        for array, start in zip(arrays, self._starts(), strict=True):
            inside = slice(max(first - start, 0), max(last - start, 0))
            pieces.append(array[index[: self.axis] + (inside,) + index[self.axis + 1 :]])
        return np.concatenate(pieces, axis=self.axis)

    def to_sources(self, array: np.ndarray) -> list[np.ndarray]:
        """Turns the parameter, or its slice of the stack, into each part's tensor or rows."""
        arrays = [array]
        if len(self.parts) > 1:
            arrays = [
                array[(slice(None),) * self.axis + (slice(start, start + size),)]
                for start, size in zip(self._starts(), self.sizes, strict=True)
            ]
        return [
            _apply(_inverse(part.pattern), piece, self.dims)
            for part, piece in zip(self.parts, arrays, strict=True)
        ]

    def _starts(self) -> list[int]:
        return [sum(self.sizes[:n]) for n in range(len(self.sizes))]


def tensor_shapes(
    table: Sequence[Entry], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every tensor of a checkpoint, in file order, without weights.

    Args:
        table: the name table.
        shapes: dotted path -> shape of the parameter.
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer, entry in file_order(table):
        shape = shapes[entry.target][0 if entry.layers is None else 1 :]
        pieces = entry.to_sources(np.broadcast_to(np.uint8(0), shape))
        for part, name, piece in zip(entry.parts, entry.sources(layer), pieces, strict=True):
            found[name] = piece.shape
            if part.rows is not None:  # the last of them ends the tensor
                found[name] = (part.rows[1], *piece.shape[1:])
    return found


def file_order(table: Sequence[Entry]) -> Iterator[tuple[int, Entry]]:
    """Yields (layer, entry) with all tensors of a layer together, as the release writes them."""
    for _, group in itertools.groupby(table, key=lambda entry: (_stack(entry), entry.layers)):
        entries = list(group)
        for layer in range(entries[0].layers or 1):
            yield from ((layer, entry) for entry in entries)


def _stack(entry: Entry) -> str:
    return entry.parts[0].source.partition("{l}")[0]


def _inverse(pattern: str) -> str:
    source, target = pattern.split(" -> ")
    return f"{target} -> {source}"


def _apply(pattern: str, array: np.ndarray, dims: Mapping[str, int]) -> np.ndarray:
    letters = set(re.findall(r"[a-z]", pattern))
    return rearrange(
        array, pattern, **{name: size for name, size in dims.items() if name in letters}
    )
