"""Writes LoRA folders of peft (design: checkpoints.md 9); peft_folder.py reads them.

Adapters by dotted path, wherever they come from, become a folder with `write_adapters`:

    write_adapters(folder, params, config, LoraConfig(part="decoder", rank=16, alpha=32))
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internvlx_jax.checkpoints.adapters import (
    Adapter,
    stored_adapters,
)
from internvlx_jax.checkpoints.name_entries import Entry
from internvlx_jax.checkpoints.safetensors_writer import SafetensorsWriter
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.core.model_config import LoraConfig, ModelConfig


def write_adapters(
    folder: Path, params: Mapping[str, Any], config: ModelConfig, lora: LoraConfig
) -> dict[str, np.ndarray]:
    """Writes the adapters of one part to a folder, as peft reads them.

    Args:
        folder: where to write.
        params: NumPy or jax arrays by dotted path, whose dtypes are kept; paths that are not those
            of `lora.part`'s adapters are left alone.
        config: the model.
        lora: rank, scale and part.

    Returns:
        The written tensors by name.

    Raises:
        ConfigError: there are no such adapters, or they do not fit the model or the rank.
        CheckpointError: one (fused) tensor of PyTorch would have to hold two.
    """
    adapters = stored_adapters(config, lora.part, params.keys())
    if not adapters:
        raise ConfigError(f"no LoRA parameters of the {lora.part} part")
    entries = [entry for adapter in adapters for pair in adapter.pairs for entry in pair]
    for entry in entries:
        rank = params[entry.target].shape[-1 if ".lora_a" in entry.target else 1]
        if rank != lora.rank:
            raise ConfigError(
                f"{entry.target} {list(params[entry.target].shape)} has rank {rank}, the config "
                f"says r = {lora.rank}"
            )
    tensors = _peft_tensors(folder, params, entries)
    folder.mkdir(parents=True, exist_ok=True)
    plan = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    writer = SafetensorsWriter(folder, plan, stem="adapter_model")
    for name, array in tensors.items():
        writer.write(name, array)
    writer.finish()
    write_json(folder / "adapter_config.json", adapter_config(lora, module_names(adapters)))
    return tensors


def _peft_tensors(
    folder: Path, params: Mapping[str, Any], entries: Sequence[Entry]
) -> dict[str, np.ndarray]:
    """Returns the tensors of peft. Raises CheckpointError where one would have to hold two."""
    tensors: dict[str, np.ndarray] = {}
    rows: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    problems = []
    for entry in entries:
        leaf = np.asarray(params[entry.target])
        for layer in range(entry.layers or 1):
            names, pieces = entry.sources(layer), entry.to_sources(leaf[layer])
            for part, source, values in zip(entry.parts, names, pieces, strict=True):
                name = "base_model.model." + source.split(".", 1)[1]
                if part.rows is not None:
                    rows[name][part.rows[0]] = values
                elif name in tensors and not np.array_equal(tensors[name], values):
                    problems.append(
                        f"{name}: the parameters that share it differ, so one tensor cannot hold "
                        "them; export merged weights instead"
                    )
                else:
                    tensors[name] = np.ascontiguousarray(values)
    if problems:
        raise CheckpointError(folder, problems)
    for name, by_row in rows.items():
        tensors[name] = np.concatenate([by_row[first] for first in sorted(by_row)])
    return tensors


def adapter_config(config: LoraConfig, modules: Sequence[str]) -> dict[str, Any]:
    """Returns the adapter_config.json that peft reads beside adapter_model.safetensors."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if config.part == "decoder" else None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }


def module_names(adapters: Sequence[Adapter]) -> list[str]:
    """Returns `target_modules` of the adapters, e.g. `attention.wqkv`."""
    sources = (pair[0].parts[0].source for adapter in adapters for pair in adapter.pairs)
    return sorted({re.sub(r"^.*\{l\}\.|\.lora_A\.weight$", "", source) for source in sources})
