"""The train step of benchmarks/gpu.py in PyTorch: transformers' InternVL of equal shape, with its own attention and loss.

Its decoder is Llama, which InternLM2 equals in everything but names, and its projector the two-layer one of InternVL2.
Parameters and AdamW are float32, products bfloat16 under autocast, tower frozen, every layer rematerialised, as there.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
)

from internvlx_jax.core.chips import CHIPS, DEVICE_KINDS
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.models.flops import train_flops


def model_of(config: ModelConfig, image_token: int) -> InternVLForConditionalGeneration:
    """Make the model with random weights on the current default device."""
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
            image_token_id=image_token,
            image_seq_length=config.tokens_per_tile,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )


def train_steps(report: Any, size: Any, packed: Callable[..., Any]) -> None:
    """Time the step with plain and with compiled layers, then without segments, where SDPA may use flash attention.

    Args:
        report: what to add rows to.
        size: of the measurement.
        packed: makes the batch, as for the other steps.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report.facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    config, image_token = size.small("off"), 1
    batch, bucket, filled = packed(config, size.segments, size.rows)
    inputs, visual = batch.inputs, bucket.tiles * config.tokens_per_tile
    tokens = np.where(
        inputs.feature_index < visual, image_token, np.maximum(inputs.tokens, image_token + 1)
    )
    on_device = functools.partial(torch.as_tensor, device=device)
    arrays = dict(
        input_ids=on_device(tokens.astype(np.int64)),
        labels=on_device(batch.labels.astype(np.int64)),
        position_ids=on_device(inputs.positions.astype(np.int64)),
    )
    tiles = on_device(inputs.tiles.reshape(-1, *inputs.tiles.shape[2:])).permute(0, 3, 1, 2)
    arrays["pixel_values"] = ((tiles.float() / 255 - 0.45) / 0.225).contiguous()

    with torch.device(device):
        model = model_of(config, image_token)
    model.train()
    model.model.vision_tower.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-5, weight_decay=0.01, fused=device == "cuda")
    flops = _flops(config, filled)
    chip = CHIPS.get(DEVICE_KINDS.get(torch.cuda.get_device_name() if device == "cuda" else "", ""))

    def step() -> float:
        with torch.autocast(device, torch.bfloat16):
            loss = model(**arrays, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    def measure(warm_up: int) -> dict[str, Any]:
        begun = time.perf_counter()
        for _ in range(warm_up):
            step()
        warm, times = time.perf_counter() - begun, []
        for _ in range(size.steps):
            begun = time.perf_counter()
            loss = step()
            if device == "cuda":
                torch.cuda.synchronize()  # the optimizer's part of the step
            times.append(time.perf_counter() - begun)
        seconds = float(np.median(times))
        measured = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
        return {
            "ms": 1e3 * seconds,
            "rows": size.rows,
            "slots": bucket.length,
            "rows_per_s": size.rows / seconds,
            "tokens_per_s": size.rows * bucket.length / seconds,
            "tflop": flops / 1e12,
            "mfu": flops / seconds / chip.peak_flops if chip else None,
            "loss": loss,
            "warm_up_s": warm,
            "measured_gib": measured,
        }

    def compiled() -> dict[str, Any]:
        for layers in (model.model.language_model.layers, model.model.vision_tower.encoder.layer):
            for layer in layers:
                layer.compile()
        return measure(warm_up=2)

    def without_segments() -> dict[str, Any]:
        arrays["position_ids"] = torch.arange(bucket.length, device=device).expand(size.rows, -1)
        return measure(warm_up=2)

    needed = size.seconds["torch"]
    report.attempt("torch", "2B, packed rows, SDPA", needed / 2, lambda: measure(warm_up=1))
    report.attempt("torch", "2B, packed rows, SDPA, layers compiled", needed, compiled)
    report.attempt(
        "torch",
        "2B, one causal row without segments, SDPA, layers compiled",
        needed,
        without_segments,
    )


def _flops(config: ModelConfig, filled: dict[str, Any]) -> float:
    """Count as for the other steps: everything but the tower is trained, each linear map by its kernel."""
    from internvlx_jax.models.params import abstract_model  # JAX, of which only shapes are needed

    shapes = abstract_model(config, dtype="bfloat16").shapes
    return train_flops(
        config,
        {path: leaf.shape for path, leaf in shapes.items() if not path.startswith("vision.")},
        **filled,
    ).total
