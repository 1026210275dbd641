"""Reads the decoder and the tokenizer of a GGUF file (design: checkpoints.md 12).

The file's tensors get the names and the order of rows that transformers' Llama, Qwen2 and Qwen3
have; quantized ones are turned into float32, one at a time, as they are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.extras import require
from internvlx_jax.core.json_text import shorten, shown

# general.architecture -> class of transformers.
ARCHITECTURES_OF_GGUF: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Field of config.json -> name behind the architecture's.
_SIZES: Mapping[str, str] = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}


class GgufFile:
    """The tensors of a GGUF file under transformers' names, and its fields.

    Attributes:
        path: the file.
        config: config.json that transformers would have for this decoder.
        fields: name -> value of the fields that are not arrays, and of those of the tokenizer.
        notes: what a report should mention.
    """

    def __init__(self, path: Path):
        """Opens a file; no tensor is read.

        Args:
            path: the file.

        Raises:
            ConfigError: the file cannot be read, its architecture or a field is not supported, or
                the package `gguf` is missing.
            CheckpointError: lists the tensors that cannot be used.
        """
        self._gguf = require("gguf", extra="gguf", purpose="reading a GGUF file")
        self.path = path
        reader = self._open(path)
        self.fields = {
            name: self._content(name, field)
            for name, field in reader.fields.items()
            if name.startswith(("general.", "tokenizer.")) or not _is_array(field)
        }
        self._architecture = self._check_architecture()
        self._tensors: dict[str, Any] = {}
        problems = self._name_tensors(reader.tensors)
        if problems:
            raise CheckpointError(path, problems)
        self.config = self._config()
        kinds = sorted({tensor.tensor_type.name for tensor in self._tensors.values()})
        self.notes = [
            f"{path.name}: {len(self._tensors)} tensors ({', '.join(kinds)}), read as float32"
        ]

    def _open(self, path: Path) -> Any:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give a GGUF file")
        try:
            return self._gguf.GGUFReader(path)
        except Exception as error:  # the package raises whatever its arrays do
            raise ConfigError(
                f"{path}: not a readable GGUF file, or one with a quantization that the installed "
                f"gguf package does not know ({error}). Fetch the file again, or update gguf"
            ) from error

    def _content(self, name: str, field: Any) -> Any:
        """Returns the value of a field. Raises ConfigError for one that is damaged."""
        try:
            return field.contents()
        except (ValueError, IndexError, TypeError) as error:  # UnicodeDecodeError is a ValueError
            raise ConfigError(
                f"{self.path}: the field {shown(name)} cannot be read ({shorten(str(error))}); "
                "fetch the file again"
            ) from error

    def _check_architecture(self) -> str:
        name = str(self.fields.get("general.architecture"))
        if name not in ARCHITECTURES_OF_GGUF:
            raise ConfigError(
                f"{self.path}: general.architecture is {name!r}; read are "
                f"{', '.join(ARCHITECTURES_OF_GGUF)}. Use a GGUF file of one of these, or the "
                "model's Hugging Face folder"
            )
        if self.fields.get(f"{name}.expert_count"):
            raise ConfigError(
                f"{self.path}: {name}.expert_count is {self.fields[f'{name}.expert_count']}: "
                "routed experts are not implemented here; use a dense model"
            )
        scaling = self.fields.get(f"{name}.rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise ConfigError(
                f"{self.path}: {name}.rope.scaling.type is {scaling!r}; read are none and linear. "
                "Use the model's Hugging Face folder"
            )
        return name

    def _name_tensors(self, tensors: Any) -> list[str]:
        """Fills the tensors by their new names; returns what is wrong with any."""
        problems, end = [], self.path.stat().st_size
        unknown: dict[str, list[str]] = {}
        for tensor in tensors:
            name = _transformers_name(tensor.name)
            if name is None:
                problems.append(
                    f"tensor {tensor.name} has no place in a {self._architecture} decoder here; "
                    "use the model's Hugging Face folder"
                )
                continue
            if tensor.data_offset + tensor.n_bytes > end:
                problems.append(f"tensor {tensor.name} ends behind the file; fetch it again")
            if not self._can_dequantize(tensor.tensor_type):
                unknown.setdefault(tensor.tensor_type.name, []).append(tensor.name)
            self._tensors[name] = tensor
        for kind, names in unknown.items():
            problems.append(
                f"quantization {kind} of {names[0]}"
                + f" and {len(names) - 1} more" * (len(names) > 1)
                + " cannot be turned into numbers by the gguf package; use a file with another, "
                "e.g. Q8_0 or F16"
            )
        if "model.embed_tokens.weight" not in self._tensors and not problems:
            problems.append("tensor token_embd.weight is missing; fetch the file again")
        return problems

    def _can_dequantize(self, kind: Any) -> bool:
        _, size = self._gguf.GGML_QUANT_SIZES[kind]
        try:
            self._gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    def _config(self) -> dict[str, Any]:
        """Returns the decoder's config.json."""
        name = self._architecture
        config: dict[str, Any] = {
            field: self._size(f"{name}.{key}") for field, key in _SIZES.items()
        }
        heads = config["num_attention_heads"]
        head_dim = config["hidden_size"] // heads
        config |= {
            "model_type": name,
            "architectures": [ARCHITECTURES_OF_GGUF[name]],
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "num_key_value_heads": self._size(f"{name}.attention.head_count_kv", heads),
            "head_dim": self._size(f"{name}.attention.key_length", head_dim),
            "rms_norm_eps": self._number(f"{name}.attention.layer_norm_rms_epsilon", 1e-6),
            "rope_theta": self._number(f"{name}.rope.freq_base", 1e4),
            "rope_scaling": None,
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "torch_dtype": "float32",
        }
        for role in ("bos", "eos", "pad"):
            key = {"pad": "padding"}.get(role, role)
            config[f"{role}_token_id"] = self.fields.get(f"tokenizer.ggml.{key}_token_id")
        if name in ("llama", "qwen3"):
            config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self._tensors
        if self.fields.get(f"{name}.rope.scaling.type") == "linear":
            factor = self._number(f"{name}.rope.scaling.factor", None)
            config["rope_scaling"] = {"type": "linear", "factor": factor}
        return config

    def _size(self, field: str, default: int | None = None) -> int:
        value = self.fields.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(field, value, "a whole number above 0")
        return value

    def _number(self, field: str, default: float | None) -> float:
        value = self.fields.get(field, default)
        # Fields are float32: the shortest decimal of it is the number that the config had.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(field, value, "a number")
        return float(str(np.float32(value)))

    def _wrong(self, field: str, value: Any, expected: str) -> ConfigError:
        found = "missing" if value is None else repr(value)
        return ConfigError(
            f"{self.path}: {field} is {found}, expected {expected}. The file is damaged or of a "
            "kind that is not read here; fetch it again, or use the model's Hugging Face folder"
        )

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        # GGUF counts dims from the one that lies together in memory.
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> str:
        return "F32"

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as float32, in transformers' order of rows."""
        tensor = self._tensors[name]
        array = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        array = array.astype(np.float32, copy=False).reshape(self.shape(name))
        if self._architecture == "llama" and (found := re.search(r"\.([qk])_proj\.", name)):
            heads = "num_attention_heads" if found.group(1) == "q" else "num_key_value_heads"
            return in_halves(array, self.config[heads])
        return array

    def files(self) -> list[str]:
        return [self.path.name]

    def check_sums(self) -> int:
        """Returns 0: a GGUF file brings no checksum."""
        return 0


def in_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Puts rows that lie in pairs for rotation back into the order of two halves.

    Llama files hold rows 0, H/2, 1, H/2 + 1, ... of each head, so that neighbors rotate together.

    Args:
        array: [heads * H, ...].
        heads: number of heads.
    """
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _transformers_name(name: str) -> str | None:
    """Returns transformers' name of a GGUF tensor; None where there is none."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)", name)
    if found is None or found.group(2) not in _NAMES:
        return None
    layer, module, end = found.groups()
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{_NAMES[module]}.{end}"


def _is_array(field: Any) -> bool:
    return len(field.types) > 1
