"""The train step of benchmarks/gpu.py in PyTorch: transformers' InternVL of equal shape.

Attention and loss are those of transformers. The decoder is Llama, which InternLM2 equals in
everything but names, and the projector is the two-layer one of InternVL2. Parameters and AdamW are
float32, products are bfloat16 under autocast, the tower is frozen, and every layer is
rematerialized, like the step that it is compared with.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from gpu_shared import Packed, Report, Size, packed
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
)

from internvlx_jax.core.chips import CHIPS, DEVICE_KINDS
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.models.flops import train_flops
from internvlx_jax.models.params import abstract_model

IMAGE_TOKEN = 1


def model_of(config: ModelConfig) -> InternVLForConditionalGeneration:
    """Makes the model with random weights on the current default device."""
    vision, decoder = config.vision, config.decoder
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=vision.width,
                num_hidden_layers=vision.layers,
                num_attention_heads=vision.heads,
                intermediate_size=vision.mlp_width,
                image_size=[vision.image_size] * 2,
                patch_size=[vision.patch_size] * 2,
                attention_bias=vision.qkv_bias,
                use_absolute_position_embeddings=True,
            ),
            text_config=LlamaConfig(
                vocab_size=decoder.vocab_size,
                hidden_size=decoder.width,
                num_hidden_layers=decoder.layers,
                num_attention_heads=decoder.heads,
                num_key_value_heads=decoder.kv_heads,
                head_dim=decoder.head_dim,
                intermediate_size=decoder.mlp_width,
                rms_norm_eps=decoder.eps,
                max_position_embeddings=32768,
                tie_word_embeddings=False,
            ),
            image_token_id=IMAGE_TOKEN,
            image_seq_length=config.tokens_per_tile,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )


def arrays_of(config: ModelConfig, rows: Packed, device: str) -> dict[str, torch.Tensor]:
    """Returns the arguments of the model for the same packed rows."""
    inputs, visual = rows.batch.inputs, rows.bucket.tiles * config.tokens_per_tile
    tokens = np.where(
        inputs.feature_index < visual, IMAGE_TOKEN, np.maximum(inputs.tokens, IMAGE_TOKEN + 1)
    )
    integers = dict(input_ids=tokens, labels=rows.batch.labels, position_ids=inputs.positions)
    tiles = torch.as_tensor(inputs.tiles.reshape(-1, *inputs.tiles.shape[2:]), device=device)
    tiles = ((tiles.permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.225).contiguous()
    return {
        **{
            name: torch.as_tensor(array.astype(np.int64), device=device)
            for name, array in integers.items()
        },
        "pixel_values": tiles,
    }


@dataclasses.dataclass(frozen=True)
class Step:
    """Runs and times train steps of one model on one batch.

    Attributes:
        size: Of the measurement.
        rows: The batch, with its shape and content.
        device: "cuda" or "cpu".
        arrays: Arguments of the model; `without_segments` replaces the positions.
        model, trained, optimizer: The model, its trained parameters and their AdamW.
    """

    size: Size
    rows: Packed
    device: str
    arrays: dict[str, torch.Tensor]
    model: InternVLForConditionalGeneration
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer

    def run(self) -> float:
        """Makes one update and returns the loss."""
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(**self.arrays, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for forward and backward

    def measure(self, flops: float, warm_up: int) -> dict[str, Any]:
        """Times `size.steps` updates after `warm_up` others.

        Args:
            flops: Of one update.
            warm_up: Number of updates before the clock starts.

        Returns:
            The values of a row.
        """
        cuda, size, slots = self.device == "cuda", self.size, self.rows.bucket.length
        begun = time.perf_counter()
        for _ in range(warm_up):
            self.run()
        warm, times, loss = time.perf_counter() - begun, [], 0.0
        for _ in range(size.steps):
            begun = time.perf_counter()
            loss = self.run()
            if cuda:
                torch.cuda.synchronize()  # waits for the optimizer
            times.append(time.perf_counter() - begun)
        seconds = float(np.median(times))
        chip = CHIPS.get(DEVICE_KINDS.get(torch.cuda.get_device_name() if cuda else "", ""))
        return {
            "ms": 1e3 * seconds,
            "rows": size.rows,
            "slots": slots,
            "rows_per_s": size.rows / seconds,
            "tokens_per_s": size.rows * slots / seconds,
            "tflop": flops / 1e12,
            "mfu": flops / seconds / chip.peak_flops if chip else None,
            "loss": loss,
            "warm_up_s": warm,
            "measured_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        }

    def compile_layers(self) -> None:
        """Has every layer of both stacks compiled when it is next called."""
        model = self.model.model
        for layers in (model.language_model.layers, model.vision_tower.encoder.layer):
            for layer in layers:
                layer.compile()

    def without_segments(self) -> Step:
        """Returns the same step on rows that are one causal sample each."""
        positions = torch.arange(self.rows.bucket.length, device=self.device)
        arrays = {**self.arrays, "position_ids": positions.expand(self.size.rows, -1)}
        return dataclasses.replace(self, arrays=arrays)


def make_step(config: ModelConfig, rows: Packed, size: Size) -> Step:
    """Makes the model with its tower frozen, and its optimizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = model_of(config)
    model.train()
    model.model.vision_tower.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-5, weight_decay=0.01, fused=device == "cuda")
    return Step(size, rows, device, arrays_of(config, rows, device), model, trained, optimizer)


def train_steps(report: Report, size: Size) -> None:
    """Times the step with plain and with compiled layers, then without segments.

    Rows without segments need no mask, so SDPA may use flash attention.

    Args:
        report: Where rows are added.
        size: Of the measurement.
    """
    report.facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    config = size.small("off")
    rows = packed(config, size.segments, size.rows)
    step, flops, needed = make_step(config, rows, size), _flops(config, rows), size.seconds["torch"]

    def compiled() -> dict[str, Any]:
        step.compile_layers()
        return step.measure(flops, warm_up=2)

    attempts: tuple[tuple[str, float, Callable[[], dict[str, Any]]], ...] = (
        ("2B, packed rows, SDPA", needed / 2, lambda: step.measure(flops, warm_up=1)),
        ("2B, packed rows, SDPA, layers compiled", needed, compiled),
        (
            "2B, one causal row without segments, SDPA, layers compiled",
            needed,
            lambda: step.without_segments().measure(flops, warm_up=2),
        ),
    )
    for name, seconds, measure in attempts:
        report.attempt("torch", name, seconds, measure)


def _flops(config: ModelConfig, rows: Packed) -> float:
    """Counts like the other steps: everything but the tower is trained."""
    shapes = abstract_model(config, dtype="bfloat16").shapes  # allocates nothing
    trained = {path: leaf.shape for path, leaf in shapes.items() if not path.startswith("vision.")}
    return train_flops(config, trained, **rows.content).total
