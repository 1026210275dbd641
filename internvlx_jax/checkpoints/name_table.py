"""The one table between checkpoint tensors and our parameters (design: checkpoints.md 2 to 5).

Read forwards it imports, read backwards it exports. Every transform is an einops pattern, `source -> target`, so its
inverse is the same pattern turned round and a round trip is bit-equal. `{l}` is a layer number: those tensors are
stacked on a leading axis of the target.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from einops import rearrange

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import DecoderConfig, ModelConfig
from internvlx_jax.core.projector_sites import RELEASED, projector_sites, released_site
from internvlx_jax.models.projectors import NUM_HEADS

# Rotary tables of old files: derived, never needed.
IGNORED_SOURCES = re.compile(r".*rotary_emb\.inv_freq$")

LAYOUTS = ("internvl-x", "internvl", "hf")


@dataclasses.dataclass(frozen=True)
class Part:
    """A source tensor, or some of its rows, and the einops pattern that turns it into (a part of) a parameter."""

    source: str
    pattern: str
    rows: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and the tensors it is made of.

    Attributes:
        target: dotted parameter path.
        parts: several are concatenated on target axis `axis`.
        dims: sizes of pattern letters that the arrays alone do not give.
        axis, sizes: where and how long the parts are in the target, for several parts.
        layers: length of the stack, or None for a single tensor.
    """

    target: str
    parts: tuple[Part, ...]
    dims: Mapping[str, int]
    axis: int = 0
    sizes: tuple[int, ...] = ()
    layers: int | None = None

    def sources(self, layer: int) -> list[str]:
        """Name of each part's tensor in one layer."""
        return [part.source.format(l=layer) for part in self.parts]

    def to_target(self, tensors: Sequence[np.ndarray], index: tuple[slice, ...] = ()) -> np.ndarray:
        """Source tensors of one layer, one a part -> the parameter (or its slice of the stack), or `index` of it.

        A view wherever NumPy allows: of memory-mapped tensors, only the bytes under `index` are read.
        """
        arrays = [
            _apply(
                part.pattern, tensor if part.rows is None else tensor[slice(*part.rows)], self.dims
            )
            for part, tensor in zip(self.parts, tensors, strict=True)
        ]
        if len(arrays) == 1:
            return arrays[0][index]
        index = index + (slice(None),) * (arrays[0].ndim - len(index))
        first, last, _ = index[self.axis].indices(sum(self.sizes))
        pieces = []
        for array, start in zip(arrays, self._starts(), strict=True):
            inside = slice(max(first - start, 0), max(last - start, 0))
            pieces.append(array[index[: self.axis] + (inside,) + index[self.axis + 1 :]])
        return np.concatenate(pieces, axis=self.axis)

    def to_sources(self, array: np.ndarray) -> list[np.ndarray]:
        """The parameter (or its slice of the stack) -> the tensor (or its rows) of each part."""
        arrays = [array]
        if len(self.parts) > 1:
            arrays = [
                array[(slice(None),) * self.axis + (slice(start, start + size),)]
                for start, size in zip(self._starts(), self.sizes)
            ]
        return [
            _apply(_inverse(part.pattern), piece, self.dims)
            for part, piece in zip(self.parts, arrays)
        ]

    def _starts(self) -> list[int]:
        return [sum(self.sizes[:n]) for n in range(len(self.sizes))]


def name_table(config: ModelConfig, layout: str | None = None) -> list[Entry]:
    """All tensors of a checkpoint in one layout, in file order (checkpoints.md 6).

    layout: one of LAYOUTS; None takes the one that `config` has in the original release. Raises ConfigError where the
    model has no form in that layout.
    """
    own = "internvl-x" if config.projector.kind == "pvtc" else "internvl"
    layout = layout or own
    if layout == "hf":
        if config.projector.kind != "mlp1" or config.decoder.family == "phi3":
            raise ConfigError(
                f"a model with projector {config.projector.kind!r} and decoder {config.decoder.family!r} "
                "has no hf layout: it holds mlp1 projectors before InternLM2, Llama and Qwen2 decoders. "
                f"Use layout {own}"
            )
        return [*_hf_tower(config), *_llama(config), *_hf_projector()]
    if layout != own:
        raise ConfigError(
            f"layout {layout!r} does not hold projector {config.projector.kind!r}; use {own}"
        )
    if config.projector.kind == "mlp1":
        projector = _mlp1()
    else:
        projector = (
            []
            if released_site(config) is None
            else _pvtc(config, "projector.", "projector.", config.token_grid)
        )
    decoder = {"internlm2": _internlm2, "llama": _llama, "qwen2": _llama, "phi3": _phi3}[
        config.decoder.family
    ](config)
    return [*_tower(config), *decoder, *projector, *_lvtc(config)]


def tensor_shapes(
    table: Sequence[Entry], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint, in file order, without weights.

    shapes: of the parameters, by dotted path.
    """
    found: dict[str, tuple[int, ...]] = {}
    for layer, entry in file_order(table):
        shape = shapes[entry.target][0 if entry.layers is None else 1 :]
        pieces = entry.to_sources(np.broadcast_to(np.uint8(0), shape))
        for part, name, piece in zip(entry.parts, entry.sources(layer), pieces):
            found[name] = piece.shape
            if part.rows is not None:  # the last of them ends the tensor
                found[name] = (part.rows[1], *piece.shape[1:])
    return found


def file_order(table: Sequence[Entry]) -> Iterator[tuple[int, Entry]]:
    """(layer, entry) with all tensors of a layer together, as the release writes them."""
    waiting: list[Entry] = []
    for entry in [*table, None]:
        if waiting and (
            entry is None
            or entry.layers != waiting[0].layers
            or _stack(entry) != _stack(waiting[0])
        ):
            yield from ((layer, each) for layer in range(waiting[0].layers) for each in waiting)
            waiting = []
        if entry is not None and entry.layers is not None:
            waiting.append(entry)
        elif entry is not None:
            yield 0, entry


def _stack(entry: Entry) -> str:
    return entry.parts[0].source.partition("{l}")[0]


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
    layer.add(
        "attn.proj.weight",
        "attn.proj.kernel",
        "v (n h) -> n h v",
        n=vision.heads,
        h=vision.head_dim,
    )
    layer.add("attn.proj.bias", "attn.proj.bias", "v -> v")
    for linear in ("mlp.fc1", "mlp.fc2"):
        layer.linear(linear, linear)
        layer.add(f"{linear}.bias", f"{linear}.bias", "v -> v")
    for norm in ("norm1", "norm2"):
        layer.norm(norm, norm)
        if vision.norm == "layer_norm":
            layer.add(f"{norm}.bias", f"{norm}.bias", "v -> v")
    return table.entries + layer.entries


def _hf_tower(config: ModelConfig) -> list[Entry]:
    """The same tower in transformers' names; q, k and v are separate."""
    vision = config.vision
    heads = dict(n=vision.heads, h=vision.head_dim)
    patch = dict(c=3, y=vision.patch_size, x=vision.patch_size)
    table = _Table("vision_tower.embeddings.", "vision.", None)
    table.add("cls_token", "class_embedding", "1 1 v -> v")
    table.add("position_embeddings", "position_embedding", "1 p v -> p v")
    table.add(
        "patch_embeddings.projection.weight", "patch_embed.kernel", "v c y x -> (c y x) v", **patch
    )
    table.add("patch_embeddings.projection.bias", "patch_embed.bias", "v -> v")

    layer = _Table("vision_tower.encoder.layer.{l}.", "vision.layers.", vision.layers)
    layer.add("lambda_1", "ls1", "v -> v")
    layer.add("lambda_2", "ls2", "v -> v")
    names = [f"attention.{name}_proj" for name in "qkv"]
    layer.add_parts(
        [Part(f"{n}.weight", "(n h) v -> v 1 n h") for n in names],
        "attn.qkv.kernel",
        1,
        (1,) * 3,
        **heads,
    )
    if vision.qkv_bias:
        layer.add_parts(
            [Part(f"{n}.bias", "(n h) -> 1 n h") for n in names],
            "attn.qkv.bias",
            0,
            (1,) * 3,
            **heads,
        )
    if vision.qk_norm:
        layer.norm("attention.q_norm", "attn.q_norm")
        layer.norm("attention.k_norm", "attn.k_norm")
    layer.add("attention.projection_layer.weight", "attn.proj.kernel", "v (n h) -> n h v", **heads)
    layer.add("attention.projection_layer.bias", "attn.proj.bias", "v -> v")
    for linear in ("mlp.fc1", "mlp.fc2"):
        layer.linear(linear, linear)
        layer.add(f"{linear}.bias", f"{linear}.bias", "v -> v")
    for source, target in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
        layer.norm(source, target)
        if vision.norm == "layer_norm":
            layer.add(f"{source}.bias", f"{target}.bias", "v -> v")
    return table.entries + layer.entries


def _pvtc(config: ModelConfig, source: str, target: str, grid: int) -> list[Entry]:
    heads = dict(n=NUM_HEADS, h=config.decoder.width // NUM_HEADS)
    table = _Table(source, target, None)
    table.add("cls_scale", "cls_scale", "1 a b d -> (a b) d", a=grid, b=grid)
    for source, target in (
        ("mlp1", "local_query"),
        ("mlp2", "global_query"),
        ("mlp3", "region_kv"),
    ):
        table.norm(f"{source}.0", f"{target}.norm")
        table.linear(f"{source}.1", f"{target}.linear")
    for block in ("attn_global", "attn_local"):
        for name in ("q", "k", "v"):
            table.add(
                f"{block}.attn.{name}.weight",
                f"{block}.attn.{name}.kernel",
                "(n h) d -> d n h",
                **heads,
            )
        table.add(
            f"{block}.attn.proj.weight", f"{block}.attn.proj.kernel", "d (n h) -> n h d", **heads
        )
        table.norm(f"{block}.attn.norm1", f"{block}.attn.q_norm")
        table.norm(f"{block}.attn.norm2", f"{block}.attn.kv_norm")
        for source, target in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            table.linear(f"{block}.mlp.{source}", f"{block}.mlp.{target}")
        table.norm(f"{block}.mlp.norm", f"{block}.mlp.norm")
    return table.entries


def _mlp1() -> list[Entry]:
    return _two_layer("mlp1.", "0", "1", "3")


def _hf_projector() -> list[Entry]:
    return _two_layer("multi_modal_projector.", "layer_norm", "linear_1", "linear_2")


def _two_layer(prefix: str, norm: str, *linears: str) -> list[Entry]:
    table = _Table(prefix, "projector.", None)
    table.norm(norm, "norm")
    table.add(f"{norm}.bias", "norm.bias", "v -> v")
    for source, target in zip(linears, ("fc1", "fc2"), strict=True):
        table.linear(source, target)
        table.add(f"{source}.bias", f"{target}.bias", "v -> v")
    return table.entries


def _lvtc(config: ModelConfig) -> list[Entry]:
    """What LVTC adds has no public layout: our paths, with PVTC as in `projector.*` (checkpoints.md 3)."""
    lvtc, entries = config.lvtc, []
    if lvtc is None:
        return entries

    for site in projector_sites(config):
        prefix, target = f"lvtc.{site.name}.", f"{site.path}."
        if site.path == RELEASED:  # name_table has it, by its public names
            continue
        if site.kind == "pvtc":
            entries.extend(_pvtc(config, prefix, target, site.grid))
            continue
        table = _Table(prefix, target, None)
        table.norm("norm", "norm")
        table.linear("fc1", "fc1")
        table.linear("fc2", "fc2")
        entries.extend(table.entries)
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
    layer.add(
        "attention.wo.weight",
        "attn.out.kernel",
        "d (n h) -> n h d",
        n=decoder.heads,
        h=decoder.head_dim,
    )
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
    """Llama and Qwen2, and every decoder in the hf layout: separate q, k, v tensors make one packed kernel."""
    decoder = config.decoder
    names = [f"self_attn.{name}_proj" for name in "qkv"]
    layer = _Table("language_model.model.layers.{l}.", "decoder.layers.", decoder.layers)
    layer.packed_qkv([Part(f"{n}.weight", "") for n in names], "kernel", decoder)
    if decoder.qkv_bias:
        layer.packed_qkv([Part(f"{n}.bias", "") for n in names], "bias", decoder)
    layer.add(
        "self_attn.o_proj.weight",
        "attn.out.kernel",
        "d (n h) -> n h d",
        n=decoder.heads,
        h=decoder.head_dim,
    )
    if decoder.out_bias:
        layer.add("self_attn.o_proj.bias", "attn.out.bias", "d -> d")
    for name in ("gate", "up", "down"):
        layer.linear(f"mlp.{name}_proj", f"mlp.{name}")
    return _llama_frame(config, layer)


def _phi3(config: ModelConfig) -> list[Entry]:
    """q, k, v are rows of one tensor, and so are gate and up."""
    decoder = config.decoder
    q, kv, f = (
        decoder.heads * decoder.head_dim,
        decoder.kv_heads * decoder.head_dim,
        decoder.mlp_width,
    )
    layer = _Table("language_model.model.layers.{l}.", "decoder.layers.", decoder.layers)
    rows = ((0, q), (q, q + kv), (q + kv, q + 2 * kv))
    layer.packed_qkv([Part("self_attn.qkv_proj.weight", "", r) for r in rows], "kernel", decoder)
    layer.add(
        "self_attn.o_proj.weight",
        "attn.out.kernel",
        "d (n h) -> n h d",
        n=decoder.heads,
        h=decoder.head_dim,
    )
    for target, r in (("gate", (0, f)), ("up", (f, 2 * f))):
        layer.add_parts(
            [Part("mlp.gate_up_proj.weight", "o i -> i o", r)], f"mlp.{target}.kernel", 0, ()
        )
    layer.linear("mlp.down_proj", "mlp.down")
    return _llama_frame(config, layer)


def _llama_frame(config: ModelConfig, layer: _Table) -> list[Entry]:
    """Embedding, norms and output as Llama, Qwen2 and Phi-3 name them, around the given layers."""
    table = _Table("language_model.model.", "decoder.", None)
    table.add("embed_tokens.weight", "embedding", "w d -> w d")
    layer.norm("input_layernorm", "attn_norm")
    layer.norm("post_attention_layernorm", "mlp_norm")
    tail = _Table("language_model.", "decoder.", None)
    tail.norm("model.norm", "norm")
    if not config.decoder.tie_embeddings:
        tail.add("lm_head.weight", "head", "w d -> d w")
    return table.entries + layer.entries + tail.entries


class _Table:
    """Entries that share a source prefix, a target prefix and a stack length."""

    def __init__(self, source: str, target: str, layers: int | None):
        self.source, self.target, self.layers = source, target, layers
        self.entries: list[Entry] = []

    def add(self, source: str, target: str, pattern: str, **dims: int) -> None:
        self.add_parts([Part(source, pattern)], target, 0, (), **dims)

    def add_parts(
        self, parts: list[Part], target: str, axis: int, sizes: tuple[int, ...], **dims: int
    ) -> None:
        named = tuple(dataclasses.replace(part, source=self.source + part.source) for part in parts)
        self.entries.append(Entry(self.target + target, named, dims, axis, sizes, self.layers))

    def packed_qkv(self, parts: list[Part], kind: str, decoder: DecoderConfig) -> None:
        """Separate queries, keys and values -> the packed `attn.qkv`; kind: kernel or bias."""
        width, back = (" d", "d ") if kind == "kernel" else ("", "")
        patterns = (f"(k j h){width} -> {back}k j h", *[f"(k h){width} -> {back}k 1 h"] * 2)
        named = [
            dataclasses.replace(part, pattern=pattern)
            for part, pattern in zip(parts, patterns, strict=True)
        ]
        self.add_parts(
            named,
            f"attn.qkv.{kind}",
            2 if kind == "kernel" else 1,
            (decoder.group, 1, 1),
            k=decoder.kv_heads,
            j=decoder.group,
            h=decoder.head_dim,
        )

    def linear(self, source: str, target: str) -> None:
        self.add(f"{source}.weight", f"{target}.kernel", "o i -> i o")

    def norm(self, source: str, target: str) -> None:
        self.add(f"{source}.weight", f"{target}.weight", "v -> v")


def _inverse(pattern: str) -> str:
    source, target = pattern.split(" -> ")
    return f"{target} -> {source}"


def _apply(pattern: str, array: np.ndarray, dims: Mapping[str, int]) -> np.ndarray:
    letters = set(re.findall(r"[a-z]", pattern))
    return rearrange(
        array, pattern, **{name: size for name, size in dims.items() if name in letters}
    )
