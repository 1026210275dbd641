"""Settings of the input pipeline (spec: data.md 10, 11)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from internvlx_jax.data.plan import LENGTH_STEP
from internvlx_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they are batched.

    Attributes:
        meta, val_meta: InternVL meta JSON of training and validation data.
        tokenizer: folder or file of the tokenizer; None takes the one of the checkpoint in `init_from`.
        max_length: token slots of the longest bucket; bucket lengths are multiples of `length_step`.
        batch_mode: `tokens` keeps tokens per step near `tokens_per_step`; `samples` uses one number of rows.
        tiles_per_step: also bounds a step's tile slots in `tokens` mode; None: no bound.
        max_executables: at most this many (tiles, length) buckets remain; the rarest merge upward.
        special_text: what reserved text inside a turn does: reject the sample, escape it, or allow it.
        num_workers: loader processes; 0 decodes in threads of this process.
    """

    meta: str
    val_meta: str | None = None
    tokenizer: str | None = None
    max_length: int = 4096
    length_step: int = LENGTH_STEP
    batch_mode: Literal["tokens", "samples"] = "tokens"
    tokens_per_step: int = 65536
    tiles_per_step: int | None = None
    samples_per_step: int = 128
    max_executables: int = 16
    special_text: Literal["reject", "escape", "allow"] = "reject"
    num_workers: int = 0

    def __post_init__(self):
        for name in ("max_length", "length_step", "tokens_per_step", "samples_per_step", "max_executables"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} is {getattr(self, name)}, it must be at least 1")
        if self.tiles_per_step is not None and self.tiles_per_step < 1:
            raise ConfigError(f"data.tiles_per_step is {self.tiles_per_step}, it must be at least 1 or None")
        if self.max_length % self.length_step:
            raise ConfigError(f"data.max_length {self.max_length} is not a multiple of data.length_step "
                              f"{self.length_step}")
