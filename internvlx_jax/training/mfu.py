"""How much of the devices' peak a run uses, by the project's own count of FLOPs (design: training.md 8)."""

from __future__ import annotations

from functools import cache

import jax

from internvlx_jax.core.chips import CHIPS, DEVICE_KINDS
from internvlx_jax.data.pipeline import LoadedStep
from internvlx_jax.data.plan import Bucket
from internvlx_jax.models.flops import train_flops
from internvlx_jax.training.setup import Setup


def peak_flops(stated_tflops: float | None) -> float | None:
    """bfloat16 FLOP/s of one device: what the config states, else that of its kind; None for an unknown kind."""
    if stated_tflops is not None:
        return stated_tflops * 1e12
    kind = DEVICE_KINDS.get(jax.devices()[0].device_kind)
    return CHIPS[kind].peak_flops if kind else None


class Utilization:
    """Model FLOPs of the steps since the last line: of all slots as computed, and of real tokens and tiles alone.

    peak: FLOP/s of a device, None: unknown.
    """

    def __init__(self, setup: Setup, peak: float | None):
        self._model, self._devices = setup.model, setup.mesh.size
        self._trained = {path: leaf.shape for path, leaf in setup.division.trained.items()}
        self._saved_per_tile = setup.model.lvtc.saved_per_tile if setup.model.lvtc else 0
        self._peak = peak
        self._padded = self._useful = 0.0
        self._of_bucket = cache(self._of_bucket)

    def add(self, loaded: LoadedStep) -> None:
        if self._peak is None:
            return
        self._padded += self._of_bucket(loaded.bucket, loaded.counts.slots // loaded.bucket.length)
        lengths, tiles = loaded.shapes[:, 0], loaded.shapes[:, 1]
        short_lengths = lengths - tiles * self._saved_per_tile
        self._useful += train_flops(
            self._model,
            self._trained,
            tiles=int(tiles.sum()),
            lengths=lengths.tolist(),
            short_lengths=short_lengths.tolist(),
        ).total

    def _of_bucket(self, bucket: Bucket, rows: int) -> float:
        return train_flops(
            self._model,
            self._trained,
            tiles=rows * bucket.tiles,
            lengths=[bucket.length] * rows,
            short_lengths=[bucket.short_length] * rows,
        ).total

    def take(self, seconds: float) -> dict[str, float]:
        """Shares of the peak over so many seconds; empty where the peak is unknown."""
        if self._peak is None:
            return {}
        possible = self._peak * self._devices * seconds
        shares = {"mfu_padded": self._padded / possible, "mfu_useful": self._useful / possible}
        self._padded = self._useful = 0.0
        return shares
