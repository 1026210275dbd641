"""Reading a folder of safetensors files, one tensor at a time and memory-mapped (spec: checkpoints.md 6)."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from internvlx_jax.errors import CheckpointError

FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsFolder:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises CheckpointError for missing, unreadable or contradicting files.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._files = {}
        problems: list[str] = []
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _weight_map(index)
            names = sorted(set(weight_map.values()))
        elif (self.path / "model.safetensors").is_file():
            weight_map, names = None, ["model.safetensors"]
        else:
            raise CheckpointError(self.path, ["no model.safetensors and no model.safetensors.index.json; "
                                              "convert other formats to safetensors first"])
        self._tensors: dict[str, str] = {}
        for name in names:
            try:
                self._files[name] = safe_open(self.path / name, framework="np")
            except FileNotFoundError:
                problems.append(f"{name}: named by {index.name} but missing; copy the shard into the folder")
                continue
            except (SafetensorError, OSError) as error:
                problems.append(f"{name}: not a readable safetensors file ({error}); copy it again")
                continue
            for tensor in self._files[name].keys():
                if tensor in self._tensors:
                    problems.append(f"tensor {tensor} is in both {self._tensors[tensor]} and {name}")
                self._tensors[tensor] = name
        for tensor, name in (weight_map or {}).items():
            if name in self._files and self._tensors.get(tensor) != name:
                problems.append(f"tensor {tensor}: {index.name} places it in {name}, which does not hold it")
        if problems:
            raise CheckpointError(self.path, problems)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """File type, e.g. `BF16`."""
        return self._slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        return self._files[self._tensors[name]].get_tensor(name)

    def _slice(self, name: str):
        return self._files[self._tensors[name]].get_slice(name)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(index, [f"not a safetensors index ({error!r}); expected an object with weight_map"])
