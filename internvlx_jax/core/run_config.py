"""What a training run is (design: training.md)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.model_config import LoraConfig, ModelConfig
from internvlx_jax.core.ranges import (
    COUNT,
    NUMBER,
    POSITIVE,
    RATE,
    SEED,
    SHARE,
    Range,
    check_ranges,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Describes other settings for some of the trained parameters.

    Attributes:
        params: Regular expression over parameter paths, matched from their beginning. The first
            group that matches a parameter counts.
        learning_rate: In place of the optimizer's; the schedule scales it alike.
        multiplier: Factor on the learning rate.
        weight_decay: In place of the optimizer's; the decay rule still says which parameters decay.
    """

    params: str
    learning_rate: float | None = None
    multiplier: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self):
        for name in ("learning_rate", "multiplier"):
            value = getattr(self, name)
            if value is not None and not POSITIVE.holds(value):
                raise ConfigError(
                    f"optimizer.groups: {name} of {self.params!r} is {value}, it "
                    "must be above 0; freeze.paths is for parameters that stay as they are"
                )
        check_ranges(self, "optimizer.groups.", weight_decay=NUMBER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Describes AdamW behind a clip of the global gradient norm (training.md 3).

    Attributes:
        learning_rate: The highest of the schedule.
        schedule: What follows a linear warm-up: `cosine` and `linear` fall to zero at the end of
            the run; `wsd` stays, then falls linearly over the last `cooldown_ratio` of the run;
            `constant` stays.
        warmup_ratio: Share of the updates of the whole run.
        warmup_steps: Counts the updates of the warm-up in place of `warmup_ratio`.
        cooldown_ratio: See `schedule`.
        weight_decay: Of the parameters that decay.
        decay_rule: What decays. `all`: every trained parameter, as in the released scripts.
            `trainer`: all but biases and the weights of LayerNorm and Llama's RMSNorm. `standard`:
            matrices that are not embeddings.
        groups: Other learning rates and weight decays for some parameters.
        vit_layer_decay: d; layer n of the tower learns with d ** (layers - n) of its rate, the
            embeddings being layer 0.
        b1, b2, eps: Of AdamW.
        clip_norm: Largest global gradient norm.
        moments_dtype: Of the first moment; the second one is float32.
        ema_decay: Keeps an average of the trained parameters in float32,
            `decay * average + (1 - decay) * new`.
    """

    learning_rate: float = 4e-5
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    cooldown_ratio: float = 0.1
    weight_decay: float = 0.01
    decay_rule: Literal["all", "trainer", "standard"] = "standard"
    groups: tuple[GroupConfig, ...] = ()
    vit_layer_decay: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float | None = None

    def __post_init__(self):
        check_ranges(
            self,
            "optimizer.",
            learning_rate=POSITIVE,
            warmup_ratio=SHARE,
            warmup_steps=NUMBER,
            cooldown_ratio=SHARE,
            weight_decay=NUMBER,
            vit_layer_decay=POSITIVE,
            b1=RATE,
            b2=RATE,
            eps=POSITIVE,
            clip_norm=POSITIVE,
            ema_decay=Range(0, 1, low_open=True, high_open=True),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Says what is not trained (training.md 2).

    Frozen parameters have no gradient and no optimizer state and are stored in the compute dtype.

    Attributes:
        vit: Freezes the tower.
        projector: Freezes the projector and what LVTC adds to it.
        llm: Freezes the decoder with embeddings and head.
        unfreeze_vit_last: With `vit`, so many of the tower's last layers are trained all the same.
        unfreeze_head: With `llm`, the output head is trained all the same.
        train_lora_only: Freezes everything but adapters. None of the settings above freezes
            adapters.
        paths: Regular expressions over parameter paths, matched from their beginning; what they
            match is frozen in any case.
        vit_mode: Whether a tower that is frozen as a whole keeps its drop path (`train`, as the
            released scripts do).
    """

    vit: bool = False
    projector: bool = False
    llm: bool = False
    unfreeze_vit_last: int = 0
    unfreeze_head: bool = False
    train_lora_only: bool = False
    paths: tuple[str, ...] = ()
    vit_mode: Literal["train", "eval"] = "eval"

    def __post_init__(self):
        check_ranges(self, "freeze.", unfreeze_vit_last=NUMBER)
        if self.unfreeze_vit_last and not self.vit:
            raise ConfigError(
                "freeze.unfreeze_vit_last needs freeze.vit=true: nothing else freezes the tower "
                "as a whole"
            )
        if self.unfreeze_head and not self.llm:
            raise ConfigError(
                "freeze.unfreeze_head needs freeze.llm=true: nothing else freezes the decoder as "
                "a whole"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Describes the arithmetic of a step.

    Attributes:
        dtype: Of the activations.
        remat: What both layer stacks keep for the backward pass; see models/layers.py.
        attention: Backend; see models/attention.py.
        accumulation: Micro-batches per step.
        peak_tflops: Of a device, which MFU is a share of; None is that of its kind, where it is
            known (core/chips.py).
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "full", "attention", "dots", "offload"] = "full"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    accumulation: int = 1
    peak_tflops: float | None = None

    def __post_init__(self):
        check_ranges(self, "compute.", accumulation=COUNT, peak_tflops=POSITIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """Says when bad steps stop a run, and what is reported.

    Attributes:
        max_consecutive_nonfinite, max_total_nonfinite: Steps whose loss or gradient norm is not
            finite.
        spike_factor: A loss over so many times the running median is reported, unless the latest
            losses scatter that far.
    """

    max_consecutive_nonfinite: int = 5
    max_total_nonfinite: int = 50
    spike_factor: float = 3.0

    def __post_init__(self):
        check_ranges(
            self,
            "stability.",
            max_consecutive_nonfinite=COUNT,
            max_total_nonfinite=COUNT,
            spike_factor=Range(1, low_open=True),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Says how many devices lie along each axis of the mesh.

    A single -1 takes what the others leave. Among several, tensor is as small as the rows per step
    allow, fsdp at most FSDP_WIDTH (models/sharding.py), and data takes the rest.

    Attributes:
        data: Extends over the slices of a multi-slice TPU; the others stay inside one.
        fsdp: Divides rows and parameters.
        tensor: Divides heads and MLP widths.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name, value in vars(self).items():
            if value != -1 and not COUNT.holds(value):
                raise ConfigError(
                    f"mesh.{name} is {value}, it must be at least 1, or -1 for what the others "
                    "leave"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Describes one run. Running it again in the same output_dir resumes it.

    Attributes:
        output_dir: Run folder: checkpoints, resolved config, tokenizer, metrics.
        model: None takes that of `init_from`. Together with `init_from` it must be the same but
            for LVTC, prompt and drop path.
        init_from: Hugging Face folder or run folder whose parameters to start from; None trains
            from scratch. LVTC parameters that it lacks are initialized and listed.
        data, optimizer, compute, mesh, stability: See their classes.
        steps: Optimizer updates; None runs `epochs` passes over the data.
        epochs: See `steps`.
        freeze: What is not trained.
        lora: Adapters on the tower's and the decoder's layers; the layers under them have to be
            frozen.
        seed: Of fresh parameters, the order of the data, and drop path.
        evaluation: Benchmarks or a question file to score every `eval_every` steps, besides
            data.val_meta.
        log_every, eval_every, save_every: In steps.
        keep_last: Checkpoints kept besides the one being written.
        local_checkpoint_dir: Folder on the local disk into which checkpoints are written first; in
            the background they are copied to output_dir, which is behind gs:// or s3://. All
            processes have to see the same folder. None writes them to output_dir directly, which
            s3:// does not allow.
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
    freeze: FreezeConfig = FreezeConfig()
    lora: tuple[LoraConfig, ...] = ()
    seed: int = 0
    stability: StabilityConfig = StabilityConfig()
    evaluation: EvaluationConfig | None = None
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 200
    keep_last: int = 2
    local_checkpoint_dir: str | None = None

    @property
    def micro_batch(self) -> int | None:
        """Rows that are computed at a time, where that is one number for all steps."""
        return (
            self.data.samples_per_step // self.compute.accumulation
            if self.data.batch_mode == "samples"
            else None
        )

    def __post_init__(self):
        if self.model is None and self.init_from is None:
            raise ConfigError(
                "set model (to train from scratch) or init_from (a checkpoint folder), or both"
            )
        check_ranges(
            self,
            steps=COUNT,
            epochs=COUNT,
            seed=SEED,
            log_every=COUNT,
            eval_every=COUNT,
            save_every=COUNT,
            keep_last=COUNT,
        )
