"""What a training run is (spec: training.md)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from internvlx_jax.data.config import DataConfig
from internvlx_jax.errors import ConfigError
from internvlx_jax.evaluation.selection import Selection
from internvlx_jax.models.config import ModelConfig
from internvlx_jax.training.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, linear warm-up, cosine to zero, global-norm clip.

    decay_rule: `all` decays every trainable tensor (the released scripts); `standard` only matrices that are not
    embeddings (training.md 3). warmup_ratio counts in steps of the whole run.
    """

    learning_rate: float = 4e-5
    warmup_ratio: float = 0.03
    weight_decay: float = 0.01
    decay_rule: Literal["all", "standard"] = "standard"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Arithmetic of a step: activation dtype, rematerialisation of both layer stacks, attention backend
    (models/attention.py), micro-batches."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "full", "dots"] = "full"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    accumulation: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """Bad steps: when a run stops, and what is reported.

    max_consecutive_nonfinite, max_total_nonfinite: steps whose loss or gradient norm is not finite. spike_factor: a loss
    over so many times the running median is reported.
    """

    max_consecutive_nonfinite: int = 5
    max_total_nonfinite: int = 50
    spike_factor: float = 3.0

    def __post_init__(self):
        for name in ("max_consecutive_nonfinite", "max_total_nonfinite"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stability.{name} is {getattr(self, name)}, it must be at least 1")
        if self.spike_factor <= 1:
            raise ConfigError(f"stability.spike_factor is {self.spike_factor}, it must be over 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Running it again in the same output_dir resumes it.

    Attributes:
        output_dir: run folder: checkpoints, resolved config, tokenizer, metrics.
        model: the model; None takes that of `init_from`. Together with `init_from` it must be the same but for LVTC,
            prompt and drop path.
        init_from: Hugging Face folder or run folder whose parameters to start from; None trains from scratch. LVTC
            parameters that it lacks are initialised and listed.
        steps: optimiser updates; None runs `epochs` passes over the data.
        freeze: regular expressions over parameter paths; frozen parameters get no gradient and no moments.
        evaluation: benchmarks or a question file to score every `eval_every` steps, besides data.val_meta.
        keep_last: checkpoints kept besides the one being written.
    """

    output_dir: str
    model: ModelConfig | None = None
    init_from: str | None = None
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    steps: int | None = None
    epochs: int = 1
    freeze: tuple[str, ...] = ()
    seed: int = 0
    stability: StabilityConfig = StabilityConfig()
    evaluation: Selection | None = None
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 200
    keep_last: int = 2

    def __post_init__(self):
        if self.model is None and self.init_from is None:
            raise ConfigError("set model (to train from scratch) or init_from (a checkpoint folder), or both")
        for name in ("log_every", "eval_every", "save_every", "keep_last", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be at least 1")
