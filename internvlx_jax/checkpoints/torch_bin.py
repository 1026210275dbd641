"""Reads `pytorch_model.bin` files (design: checkpoints.md 6).

They are pickles, so torch reads them, as weights only. No other module imports torch, and this one
does when such a file has to be read.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from internvlx_jax.checkpoints.safetensors_folder import read_index
from internvlx_jax.core.errors import CheckpointError


class BinFolder:
    """`STEM.bin`, or the shards that `STEM.bin.index.json` names; read as a SafetensorsFolder is.

    Opening raises CheckpointError without torch, and for files that are missing, unreadable or hold
    more than tensors.
    """

    def __init__(self, path: Path, stem: str = "pytorch_model"):
        self.path = Path(path)
        self.notes = ["weights are in pickle files (.bin), read by torch with weights_only=True"]
        index = self.path / f"{stem}.bin.index.json"
        weight_map = read_index(index)[0] if index.is_file() else {}
        self._files = sorted(set(weight_map.values())) or [f"{stem}.bin"]
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise CheckpointError(
                self.path,
                [
                    f"{', '.join(self._files)}: pickle files need torch to be read. Install it "
                    "(pip install 'internvlx-jax[torch]'), or convert the files to safetensors "
                    "once elsewhere"
                ],
            ) from None
        self._torch = torch
        self._tensors, problems, home = {}, [], {}
        for name in self._files:
            try:
                tensors = torch.load(
                    self.path / name,
                    map_location="cpu",
                    weights_only=True,
                    mmap=zipfile.is_zipfile(self.path / name),
                )  # files before torch 1.6 are no zip
            except FileNotFoundError:
                problems.append(
                    f"{name}: named by {index.name} but missing; copy the shard into the folder"
                )
                continue
            except Exception as error:  # pickle, zip and torch errors share no class
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                problems.append(f"{name}: torch cannot read it as plain weights ({reason})")
                continue
            for tensor, value in tensors.items():
                if tensor in home:
                    problems.append(f"tensor {tensor} is in both {home[tensor]} and {name}")
                home[tensor], self._tensors[tensor] = name, value
        problems += [
            f"tensor {tensor}: {index.name} places it in {name}, which does not hold it"
            for tensor, name in weight_map.items()
            if name in home.values() and home.get(tensor) != name
        ]
        if problems:
            raise CheckpointError(self.path, problems)

    @staticmethod
    def is_one(path: Path, stem: str = "pytorch_model") -> bool:
        return (path / f"{stem}.bin").is_file() or (path / f"{stem}.bin.index.json").is_file()

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        """Returns the dtype of one tensor in the words of safetensors."""
        kind = str(self._tensors[name].dtype).removeprefix("torch.")
        return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(kind, kind)

    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())

    def files(self) -> list[str]:
        return self._files

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if tensor.dtype == self._torch.bfloat16:  # NumPy has no bfloat16 of its own
            return tensor.view(self._torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def check_sums(self) -> int:
        return 0
