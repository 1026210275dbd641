"""The name table between checkpoint tensors and our parameters (design: checkpoints.md 2 to 5).

Read forwards it imports, read backwards it exports. Every transform is an einops pattern,
`source -> target`, so its inverse is the same pattern turned around and a round trip is bit-equal.
`{l}` is a layer number: the tensors of all layers are stacked on a leading axis of the target.
"""

from __future__ import annotations

import dataclasses
import re

from internvlx_jax.checkpoints.name_entries import Entry, Part
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import DecoderConfig, ModelConfig
from internvlx_jax.core.projector_sites import RELEASED, projector_sites, released_site
from internvlx_jax.models.projectors import NUM_HEADS

# Rotary tables of old files: they follow from the config and are never needed.
IGNORED_SOURCES = re.compile(r".*rotary_emb\.inv_freq$")

LAYOUTS = ("internvl-x", "internvl", "hf")
# Prefixes of recent transformers versions -> those of the hf layout's first files.
NESTED = {
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def name_table(config: ModelConfig, layout: str | None = None) -> list[Entry]:
    """Returns the table of all tensors of a checkpoint, in file order (checkpoints.md 6).

    Args:
        config: the model.
        layout: one of LAYOUTS; None takes that of the original release.

    Raises:
        ConfigError: the model has no form in that layout.
    """
    own = "internvl-x" if config.projector.kind == "pvtc" else "internvl"
    layout = layout or own
    if layout == "hf":
        if config.projector.kind != "mlp1" or config.decoder.family == "phi3":
            raise ConfigError(
                f"a model with projector {config.projector.kind!r} and decoder "
                f"{config.decoder.family!r} has no hf layout: it holds mlp1 projectors before "
                f"InternLM2, Llama, Qwen2 and Qwen3 decoders. Use layout {own}"
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
    decoder = {
        "internlm2": _internlm2,
        "llama": _llama,
        "qwen2": _llama,
        "qwen3": _llama,
        "phi3": _phi3,
    }[config.decoder.family](config)
    return [*_tower(config), *decoder, *projector, *_lvtc(config)]


class _Table:
    """Entries that share a source prefix, a target prefix and a stack length."""

    def __init__(self, source: str, target: str, layers: int | None):
        self.source, self.target, self.layers = source, target, layers
        self.entries: list[Entry] = []

    def add(self, source: str, target: str, pattern: str, **dims: int) -> None:
        """Adds a parameter that is made of one tensor."""
        self.add_parts([Part(source, pattern)], target, 0, (), **dims)

    def add_parts(
        self, parts: list[Part], target: str, axis: int, sizes: tuple[int, ...], **dims: int
    ) -> None:
        """Adds a parameter that is made of several tensors, or of rows of one."""
        named = tuple(dataclasses.replace(part, source=self.source + part.source) for part in parts)
        self.entries.append(Entry(self.target + target, named, dims, axis, sizes, self.layers))

    def packed_qkv(self, parts: list[Part], kind: str, decoder: DecoderConfig) -> None:
        """Adds separate queries, keys and values as the packed `attn.qkv`; kind: kernel or bias."""
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
        """Adds the kernel of a linear map, which PyTorch stores as [out, in]."""
        self.add(f"{source}.weight", f"{target}.kernel", "o i -> i o")

    def norm(self, source: str, target: str) -> None:
        """Adds the weight of a norm."""
        self.add(f"{source}.weight", f"{target}.weight", "v -> v")


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
    """Lists the same tower in transformers' names; queries, keys and values are separate."""
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
    """Lists what LVTC adds, which has no public layout (checkpoints.md 3).

    Names are our paths; a PVTC has its names of `projector.*`.
    """
    lvtc, entries = config.lvtc, []
    if lvtc is None:
        return entries

    for site in projector_sites(config):
        if site.path == RELEASED:  # it is among the public names already
            continue
        prefix, target = f"lvtc.{site.name}.", f"{site.path}."
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
    """Lists Llama, Qwen2 and Qwen3, and every decoder in the hf layout.

    Separate tensors of queries, keys and values make one packed kernel.
    """
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
    if decoder.qk_norm:
        layer.norm("self_attn.q_norm", "attn.q_norm")
        layer.norm("self_attn.k_norm", "attn.k_norm")
    for name in ("gate", "up", "down"):
        layer.linear(f"mlp.{name}_proj", f"mlp.{name}")
    return _llama_frame(config, layer)


def _phi3(config: ModelConfig) -> list[Entry]:
    """Lists Phi-3: queries, keys and values are rows of one tensor, and so are gate and up."""
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
    """Puts embedding, norms and output, as Llama, Qwen and Phi-3 name them, around the layers."""
    table = _Table("language_model.model.", "decoder.", None)
    table.add("embed_tokens.weight", "embedding", "w d -> w d")
    layer.norm("input_layernorm", "attn_norm")
    layer.norm("post_attention_layernorm", "mlp_norm")
    tail = _Table("language_model.", "decoder.", None)
    tail.norm("model.norm", "norm")
    if not config.decoder.tie_embeddings:
        tail.add("lm_head.weight", "head", "w d -> d w")
    return table.entries + layer.entries + tail.entries
