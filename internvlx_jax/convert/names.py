"""The one table between checkpoint tensors and our parameters (spec: checkpoints.md 2 to 4).

Read forwards it imports, read backwards it exports. Every transform is an einops pattern, `source -> target`, so its
inverse is the same pattern turned round and a round trip is bit-equal. `{l}` is a layer number: those tensors are
stacked on a leading axis of the target.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from einops import rearrange

from internvlx_jax.models.config import ModelConfig
from internvlx_jax.models.pvtc import NUM_HEADS

# Rotary tables of old files: derived, never needed.
IGNORED_SOURCES = re.compile(r".*rotary_emb\.inv_freq$")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and the tensors it is made of.

    Attributes:
        target: dotted parameter path.
        parts: (source tensor name, einops pattern); several are concatenated on target axis `axis`.
        dims: sizes of pattern letters that the arrays alone do not give.
        axis, sizes: where and how long the parts are in the target, for several parts.
        layers: length of the stack, or None for a single tensor.
    """

    target: str
    parts: tuple[tuple[str, str], ...]
    dims: Mapping[str, int]
    axis: int = 0
    sizes: tuple[int, ...] = ()
    layers: int | None = None

    def sources(self, layer: int) -> list[str]:
        return [source.format(l=layer) for source, _ in self.parts]

    def to_target(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Source tensors of one layer -> the parameter (or its slice of the stack)."""
        arrays = [_apply(pattern, tensor, self.dims) for (_, pattern), tensor in zip(self.parts, tensors)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=self.axis)

    def to_sources(self, array: np.ndarray) -> list[np.ndarray]:
        """The parameter (or its slice of the stack) -> source tensors, in the order of `parts`."""
        arrays, start = [], 0
        for size in self.sizes:
            arrays.append(array[(slice(None),) * self.axis + (slice(start, start + size),)])
            start += size
        return [_apply(_inverse(pattern), part, self.dims) for (_, pattern), part in zip(self.parts, arrays or [array])]


def name_table(config: ModelConfig) -> list[Entry]:
    """All tensors of a checkpoint in the `internvl-x` or `internvl` layout, in file order (checkpoints.md 6)."""
    if config.projector.kind == "mlp1":
        projector = _mlp1()
    else:
        projector = [] if config.released_role is None else _pvtc(config, "projector.", "projector.", config.token_grid)
    decoder = _internlm2(config) if config.decoder.family == "internlm2" else _llama(config)
    return [*_tower(config), *decoder, *projector, *_lvtc(config)]


def _tower(config: ModelConfig) -> list[Entry]:
    vision = config.vision
    qkv = dict(a=3, n=vision.heads, h=vision.head_dim)
    patch = dict(c=3, y=vision.patch_size, x=vision.patch_size)
    table = _Table("vision_model.embeddings.", "vision.", None)
    table.add("class_embedding", "class_embedding", "1 1 v -> v")
    table.add("position_embedding", "position_embedding", "1 p v -> p v")
    table.add("patch_embedding.weight", "patch_embed.kernel", "v c y x -> (c y x) v", **patch)
    table.add("patch_embedding.bias", "patch_embed.bias", "v -> v")

    layer = _Table("vision_model.encoder.layers.{l}.", "vision.layers.", vision.layers)
    layer.add("ls1", "ls1", "v -> v")
    layer.add("ls2", "ls2", "v -> v")
    layer.add("attn.qkv.weight", "attn.qkv.kernel", "(a n h) v -> v a n h", **qkv)
    if vision.qkv_bias:
        layer.add("attn.qkv.bias", "attn.qkv.bias", "(a n h) -> a n h", **qkv)
    if vision.qk_norm:
        layer.add("attn.q_norm.weight", "attn.q_norm.weight", "v -> v")
        layer.add("attn.k_norm.weight", "attn.k_norm.weight", "v -> v")
    layer.add("attn.proj.weight", "attn.proj.kernel", "v (n h) -> n h v", n=vision.heads, h=vision.head_dim)
    layer.add("attn.proj.bias", "attn.proj.bias", "v -> v")
    for linear in ("mlp.fc1", "mlp.fc2"):
        layer.linear(linear, linear)
        layer.add(f"{linear}.bias", f"{linear}.bias", "v -> v")
    for norm in ("norm1", "norm2"):
        layer.norm(norm, norm)
        if vision.norm == "layer_norm":
            layer.add(f"{norm}.bias", f"{norm}.bias", "v -> v")
    return table.entries + layer.entries


def _pvtc(config: ModelConfig, source: str, target: str, grid: int) -> list[Entry]:
    heads = dict(n=NUM_HEADS, h=config.decoder.width // NUM_HEADS)
    table = _Table(source, target, None)
    table.add("cls_scale", "cls_scale", "1 a b d -> (a b) d", a=grid, b=grid)
    for source, target in (("mlp1", "local_query"), ("mlp2", "global_query"), ("mlp3", "region_kv")):
        table.norm(f"{source}.0", f"{target}.norm")
        table.linear(f"{source}.1", f"{target}.linear")
    for block in ("attn_global", "attn_local"):
        for name in ("q", "k", "v"):
            table.add(f"{block}.attn.{name}.weight", f"{block}.attn.{name}.kernel", "(n h) d -> d n h", **heads)
        table.add(f"{block}.attn.proj.weight", f"{block}.attn.proj.kernel", "d (n h) -> n h d", **heads)
        table.norm(f"{block}.attn.norm1", f"{block}.attn.q_norm")
        table.norm(f"{block}.attn.norm2", f"{block}.attn.kv_norm")
        for source, target in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            table.linear(f"{block}.mlp.{source}", f"{block}.mlp.{target}")
        table.norm(f"{block}.mlp.norm", f"{block}.mlp.norm")
    return table.entries


def _mlp1() -> list[Entry]:
    table = _Table("mlp1.", "projector.", None)
    table.norm("0", "norm")
    table.add("0.bias", "norm.bias", "v -> v")
    for source, target in (("1", "fc1"), ("3", "fc2")):
        table.linear(source, target)
        table.add(f"{source}.bias", f"{target}.bias", "v -> v")
    return table.entries


def _lvtc(config: ModelConfig) -> list[Entry]:
    """What LVTC adds has no public layout: our paths, with PVTC as in `projector.*` (checkpoints.md 3)."""
    lvtc, entries = config.lvtc, []
    if lvtc is None:
        return entries

    def projector(kind: str, grid: int, path: str, target: str) -> None:
        if kind == "pvtc":
            entries.extend(_pvtc(config, path, target, grid))
            return
        table = _Table(path, target, None)
        table.norm("norm", "norm")
        table.linear("fc1", "fc1")
        table.linear("fc2", "fc2")
        entries.extend(table.entries)

    if config.released_role != "low":
        projector(lvtc.low_projector, lvtc.low_grid, "lvtc.low.", "lvtc.low.")
    if config.released_role != "high":
        projector(lvtc.high_projector, lvtc.high_grid, "lvtc.high.", "lvtc.high.projector.")
    for layer in lvtc.inject_layers:
        projector(lvtc.inject_projector, lvtc.high_grid, f"lvtc.inject_{layer}.", f"lvtc.inject_{layer}.projector.")
    if lvtc.gate is not None:
        gates = _Table("lvtc.", "lvtc.", None)
        for name in ("high", *(f"inject_{layer}" for layer in lvtc.inject_layers)):
            gates.add(f"{name}.gate", f"{name}.gate", " -> ")
        entries.extend(gates.entries)
    return entries


def _internlm2(config: ModelConfig) -> list[Entry]:
    decoder = config.decoder
    packed = dict(k=decoder.kv_heads, j=decoder.group + 2, h=decoder.head_dim)
    table = _Table("language_model.model.", "decoder.", None)
    table.add("tok_embeddings.weight", "embedding", "w d -> w d")
    layer = _Table("language_model.model.layers.{l}.", "decoder.layers.", decoder.layers)
    layer.add("attention.wqkv.weight", "attn.qkv.kernel", "(k j h) d -> d k j h", **packed)
    if decoder.qkv_bias:
        layer.add("attention.wqkv.bias", "attn.qkv.bias", "(k j h) -> k j h", **packed)
    layer.add("attention.wo.weight", "attn.out.kernel", "d (n h) -> n h d", n=decoder.heads, h=decoder.head_dim)
    if decoder.out_bias:
        layer.add("attention.wo.bias", "attn.out.bias", "d -> d")
    for source, target in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        layer.linear(f"feed_forward.{source}", f"mlp.{target}")
    layer.norm("attention_norm", "attn_norm")
    layer.norm("ffn_norm", "mlp_norm")
    tail = _Table("language_model.", "decoder.", None)
    tail.norm("model.norm", "norm")
    if not decoder.tie_embeddings:
        tail.add("output.weight", "head", "w d -> d w")
    return table.entries + layer.entries + tail.entries


def _llama(config: ModelConfig) -> list[Entry]:
    """Llama and Qwen2: separate q, k, v tensors make one packed kernel."""
    decoder = config.decoder
    groups = dict(k=decoder.kv_heads, j=decoder.group, h=decoder.head_dim)
    sizes = (decoder.group, 1, 1)
    table = _Table("language_model.model.", "decoder.", None)
    table.add("embed_tokens.weight", "embedding", "w d -> w d")
    layer = _Table("language_model.model.layers.{l}.", "decoder.layers.", decoder.layers)
    names = [f"self_attn.{name}_proj" for name in "qkv"]
    kernels = ("(k j h) d -> d k j h", "(k h) d -> d k 1 h", "(k h) d -> d k 1 h")
    layer.add_parts([(f"{n}.weight", p) for n, p in zip(names, kernels)], "attn.qkv.kernel", 2, sizes, **groups)
    if decoder.qkv_bias:
        biases = ("(k j h) -> k j h", "(k h) -> k 1 h", "(k h) -> k 1 h")
        layer.add_parts([(f"{n}.bias", p) for n, p in zip(names, biases)], "attn.qkv.bias", 1, sizes, **groups)
    layer.add("self_attn.o_proj.weight", "attn.out.kernel", "d (n h) -> n h d", n=decoder.heads, h=decoder.head_dim)
    if decoder.out_bias:
        layer.add("self_attn.o_proj.bias", "attn.out.bias", "d -> d")
    for name in ("gate", "up", "down"):
        layer.linear(f"mlp.{name}_proj", f"mlp.{name}")
    layer.norm("input_layernorm", "attn_norm")
    layer.norm("post_attention_layernorm", "mlp_norm")
    tail = _Table("language_model.", "decoder.", None)
    tail.norm("model.norm", "norm")
    if not decoder.tie_embeddings:
        tail.add("lm_head.weight", "head", "w d -> d w")
    return table.entries + layer.entries + tail.entries


class _Table:
    """Entries that share a source prefix, a target prefix and a stack length."""

    def __init__(self, source: str, target: str, layers: int | None):
        self.source, self.target, self.layers = source, target, layers
        self.entries: list[Entry] = []

    def add(self, source: str, target: str, pattern: str, **dims: int) -> None:
        self.add_parts([(source, pattern)], target, 0, (), **dims)

    def add_parts(self, parts: list[tuple[str, str]], target: str, axis: int, sizes: tuple[int, ...],
                  **dims: int) -> None:
        named = tuple((self.source + source, pattern) for source, pattern in parts)
        self.entries.append(Entry(self.target + target, named, dims, axis, sizes, self.layers))

    def linear(self, source: str, target: str) -> None:
        self.add(f"{source}.weight", f"{target}.kernel", "o i -> i o")

    def norm(self, source: str, target: str) -> None:
        self.add(f"{source}.weight", f"{target}.weight", "v -> v")


def _inverse(pattern: str) -> str:
    source, target = pattern.split(" -> ")
    return f"{target} -> {source}"


def _apply(pattern: str, array: np.ndarray, dims: Mapping[str, int]) -> np.ndarray:
    letters = set(re.findall(r"[a-z]", pattern))
    return rearrange(array, pattern, **{name: size for name, size in dims.items() if name in letters})
