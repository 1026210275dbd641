"""The protocol that checkpoints of every kind follow (design: checkpoints.md 8, training.md 10)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding

from internvlx_jax.checkpoints.adapters import Adapter
from internvlx_jax.checkpoints.tensors import HostArray
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.models.params import AbstractModel


class Checkpoint(Protocol):
    """An opened checkpoint: its config is known, its parameters are read when asked for.

    `RunFolder` reads run folders, `HFFolder` reads Hugging Face folders, and `Parts` puts a tower
    and a decoder together. `open_checkpoint` chooses between the first two.
    """

    @property
    def path(self) -> Path:
        """The folder, which messages name."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The model."""
        ...

    @property
    def fields(self) -> Mapping[str, Any] | None:
        """config.json of the PyTorch checkpoint that this one is or began with, if any."""
        ...

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer files; a checkpoint may have none (`Tokenizer.find`)."""
        ...

    def check(self, abstract: AbstractModel) -> list[str]:
        """Compares names, shapes and dtypes with a model before anything is read.

        Returns:
            Dotted paths of the parameters that start fresh.

        Raises:
            CheckpointError: lists everything that does not fit.
        """
        ...

    def load(
        self, abstract: AbstractModel, shardings: Mapping[str, Sharding]
    ) -> dict[str, jax.Array]:
        """Loads all parameters.

        Args:
            abstract: the model, whose dtypes the parameters are cast to.
            shardings: dotted path -> where that parameter is placed.

        Returns:
            Arrays by dotted path.

        Raises:
            CheckpointError: lists everything that does not fit.
        """
        ...

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of one parameter."""
        ...

    def dtype(self, path: str) -> np.dtype:
        """Returns the stored dtype of one parameter."""
        ...

    def read(self, path: str) -> np.ndarray:
        """Reads one parameter in its stored dtype."""
        ...

    def read_all(self, paths: Iterable[str]) -> Iterator[tuple[str, HostArray]]:
        """Reads parameters one at a time, in the given order, as (dotted path, array)."""
        ...

    def differences(self, path: str, found: HostArray) -> list[str]:
        """Describes where `found` is not, bit for bit, the parameter in the dtype of `found`."""
        ...

    def separate_adapters(self) -> list[tuple[LoraConfig, list[Adapter]]]:
        """Returns the LoRA adapters that `read_all` gives beside the weights, by part.

        Adapters that are merged as the weights are read are not among them.
        """
        ...

    def check_sums(self) -> list[str]:
        """Compares the files with their checksums where those are known.

        Returns:
            Notes for a report.

        Raises:
            CheckpointError: names the damaged files.
        """
        ...

    def write_side_files(self, folder: Path) -> list[str]:
        """Writes config.json, tokenizer, and other small files of PyTorch users into `folder`.

        Returns:
            Notes for a report.
        """
        ...
