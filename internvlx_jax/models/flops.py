"""Analytic FLOPs of a batch, by part of the model (design: training.md 8, lvtc.md 5).

A multiply-add counts 2. All matrix products count, causal attention at half and the tower's
attention in full. Recomputation, element-wise work, the embedding lookup and the optimizer do not
count: MFU is a share of the work that the model needs, not of what a run happens to do. This file
does not import jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.projector_sites import ProjectorSite, projector_sites


@dataclasses.dataclass(frozen=True)
class Flops:
    """Holds FLOPs by part.

    Attributes:
        tower: The vision tower.
        projector: The projector, and what LVTC adds to it.
        decoder: The decoder's layers.
        head: Logits of every slot.
    """

    tower: float = 0.0
    projector: float = 0.0
    decoder: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.tower + self.projector + self.decoder + self.head


def forward_flops(
    config: ModelConfig, *, tiles: int, lengths: Sequence[int], short_lengths: Sequence[int] = ()
) -> Flops:
    """Counts a forward pass.

    Args:
        config: Of the model.
        tiles: Tiles of the whole batch.
        lengths: Slots of each row, or of each segment of packed rows.
        short_lengths: With LVTC, the same in the short layout, which its first `expand_layer`
            layers run on.
    """
    return _by_part(_stages(config, tiles, lengths, short_lengths), _Stage.forward)


def slot_flops(config: ModelConfig) -> tuple[float, float, float]:
    """Counts a forward pass of one slot of each kind, attention between slots left out.

    Returns:
        FLOPs of a token slot (with LVTC, of the long layout), of a slot of the short layout (0
        without LVTC), and of a tile slot.
    """
    none, one = dict(tiles=0, lengths=[0], short_lengths=[0]), [1]
    token = forward_flops(config, **none | {"lengths": one})
    short = forward_flops(config, **none | {"short_lengths": one})
    tile = forward_flops(config, **none | {"tiles": 1})
    return token.total, short.total, tile.total


def train_flops(
    config: ModelConfig,
    trained: Mapping[str, Sequence[int]],
    *,
    tiles: int,
    lengths: Sequence[int],
    short_lengths: Sequence[int] = (),
) -> Flops:
    """Counts a forward and a backward pass.

    The backward pass costs twice the forward pass of a trained linear map, once that of a frozen
    one that gradients cross, and nothing below everything trained. Attention products cost twice
    wherever gradients go.

    Args:
        config: Of the model.
        trained: Path -> shape of each trained parameter; in a stack whose first layers are frozen,
            the shape of the others. Adapters count as trained, their base as crossed.
        tiles, lengths, short_lengths: As in `forward_flops`.
    """
    reached: set[str] = set()

    def cost(stage: _Stage) -> float:
        if stage.trains(trained) or reached.intersection(stage.below):
            reached.add(stage.name)
        return stage.forward() + (stage.backward(trained) if stage.name in reached else 0.0)

    frozen_layers = next(
        (
            config.vision.layers - shape[0]
            for path, shape in trained.items()
            if path.startswith("vision.layers.")
        ),
        0,
    )
    return _by_part(_stages(config, tiles, lengths, short_lengths, frozen_layers), cost)


class _Map(NamedTuple):
    """A matrix product with a kernel.

    Attributes:
        kernel: Path of the kernel.
        vectors: How many vectors go through it.
        inputs, outputs: Their lengths before and after.
    """

    kernel: str
    vectors: float
    inputs: int
    outputs: int

    def forward(self) -> float:
        return 2 * self.vectors * self.inputs * self.outputs

    def backward(self, trained: Mapping[str, Sequence[int]]) -> float:
        """Counts the backward pass where gradients go, and adapters in both directions."""
        adapters = self.kernel.removesuffix("kernel") + "lora_"
        weights = sum(
            math.prod(shape[1:]) for path, shape in trained.items() if path.startswith(adapters)
        )
        return (
            self.forward() * (2 if self.kernel in trained else 1) + 3 * 2 * self.vectors * weights
        )


class _Stage(NamedTuple):
    """A part of the model that gradients reach as a whole or not at all.

    Attributes:
        name: Of the stage.
        part: The field of Flops that it counts to.
        owns: Beginnings of the paths of its parameters; none for frozen layers below trained ones
            of the same stack.
        below: Names of the stages whose output it takes.
        maps: Matrix products with a kernel.
        attention: FLOPs of the products without one.
    """

    name: str
    part: str
    owns: tuple[str, ...]
    below: tuple[str, ...]
    maps: Sequence[_Map]
    attention: float = 0.0

    def trains(self, trained: Mapping[str, Sequence[int]]) -> bool:
        return any(path.startswith(self.owns) for path in trained)

    def forward(self) -> float:
        return sum(each.forward() for each in self.maps) + self.attention

    def backward(self, trained: Mapping[str, Sequence[int]]) -> float:
        """Counts the backward pass where gradients go."""
        return sum(each.backward(trained) for each in self.maps) + 2 * self.attention


def _by_part(stages: Sequence[_Stage], cost: Callable[[_Stage], float]) -> Flops:
    sums = {field.name: 0.0 for field in dataclasses.fields(Flops)}
    for stage in stages:
        sums[stage.part] += cost(stage)
    return Flops(**sums)


def _stages(
    config: ModelConfig,
    tiles: int,
    lengths: Sequence[int],
    short_lengths: Sequence[int],
    frozen_layers: int = 0,
) -> list[_Stage]:
    """Returns the model in the order of computation.

    The tower's first `frozen_layers` layers are a stage of their own.
    """
    decoder, lvtc, sites = config.decoder, config.lvtc, projector_sites(config)
    shallow = 0 if lvtc is None else lvtc.expand_layer
    if shallow and len(short_lengths) != len(lengths):
        raise ValueError(f"{len(lengths)} lengths, but {len(short_lengths)} short lengths")

    def projector(site: ProjectorSite) -> _Stage:
        count = _pvtc if site.kind == "pvtc" else _mlp
        owns = (f"{site.path}.", f"lvtc.{site.name}.")
        return _Stage(
            site.name, "projector", owns, ("tower",), *count(config, site.path, tiles, site.grid)
        )

    def layers(name: str, count: int, lengths: Sequence[int], *below: str) -> _Stage:
        return _Stage(
            name, "decoder", ("decoder.layers.",), below, *_decoder(config, count, lengths)
        )

    head = "decoder.embedding" if decoder.tie_embeddings else "decoder.head"
    logits = _Map(head, sum(lengths), decoder.width, decoder.vocab_size)
    added, middle = sites[1:], [projector(sites[0])]
    if lvtc is None:
        middle.append(layers("deep", decoder.layers, lengths, "embedding", "low"))
    else:
        names = [site.name for site in added]
        upsampled = tiles * (lvtc.high_grid * lvtc.low_grid**2 + lvtc.high_grid**2 * lvtc.low_grid)
        maps, below = [_Map("", upsampled, 1, decoder.width)], ("embedding", "low", "shallow")
        middle += [
            layers("shallow", shallow, short_lengths, "embedding", "low"),
            _Stage("upsampling", "projector", (), below, maps),
            *map(projector, added),
            layers("deep", decoder.layers - shallow, lengths, "upsampling", *names),
        ]
    return [
        *_tower(config, tiles, min(frozen_layers, config.vision.layers_run)),
        _Stage("embedding", "decoder", ("decoder.embedding",), (), ()),
        *middle,
        _Stage("head", "head", (head, "decoder.norm."), ("deep",), [logits]),
    ]


def _tower(config: ModelConfig, tiles: int, frozen_layers: int) -> list[_Stage]:
    """Returns the patch embedding and the layers up to the selected one."""
    vision = config.vision
    v, f, patches = vision.width, vision.mlp_width, vision.grid**2

    def layers(count: int) -> tuple[list[_Map], float]:
        vectors = tiles * count * (patches + 1)
        maps = [
            _Map(f"vision.layers.{name}.kernel", vectors, *sizes)
            for name, *sizes in (
                ("attn.qkv", v, 3 * v),
                ("attn.proj", v, v),
                ("mlp.fc1", v, f),
                ("mlp.fc2", f, v),
            )
        ]
        return maps, 4 * vectors * (patches + 1) * v

    embedding = _Map("vision.patch_embed.kernel", tiles * patches, 3 * vision.patch_size**2, v)
    if not frozen_layers:
        maps, attention = layers(vision.layers_run)
        return [_Stage("tower", "tower", ("vision.",), (), [embedding, *maps], attention)]
    frozen, frozen_attention = layers(frozen_layers)
    return [
        _Stage("frozen tower", "tower", (), (), [embedding, *frozen], frozen_attention),
        _Stage("tower", "tower", ("vision.",), (), *layers(vision.layers_run - frozen_layers)),
    ]


def _pvtc(config: ModelConfig, path: str, tiles: int, grid: int) -> tuple[list[_Map], float]:
    """Counts PVTC (model.md 4): Q queries attend to M keys each, in two branches."""
    v, d, q = config.vision.width, config.decoder.width, grid**2
    patches = config.vision.grid**2
    m = patches // q
    maps = [
        _Map(f"{path}.local_query.linear.kernel", tiles * q, m * v, d),
        _Map(f"{path}.global_query.linear.kernel", tiles, v, d),
        _Map(f"{path}.region_kv.linear.kernel", tiles * patches, v, d),
    ]
    for branch in ("attn_local", "attn_global"):
        maps += [
            _Map(f"{path}.{branch}.{name}.kernel", tiles * vectors, *sizes)
            for name, vectors, *sizes in (
                ("attn.q", q, d, d),
                ("attn.k", patches, d, d),
                ("attn.v", patches, d, d),
                ("attn.proj", q, d, d),
                ("mlp.gate", q, d, 4 * d),
                ("mlp.up", q, d, 4 * d),
                ("mlp.down", q, 4 * d, d),
            )
        ]
    return maps, 2 * tiles * 4 * q * m * d


def _mlp(config: ModelConfig, path: str, tiles: int, grid: int) -> tuple[list[_Map], float]:
    """Counts both two-layer projectors, `mlp1` and `mlp`: a region's patches -> D -> D."""
    d, region = config.decoder.width, config.vision.grid**2 // grid**2 * config.vision.width
    return [
        _Map(f"{path}.fc1.kernel", tiles * grid**2, region, d),
        _Map(f"{path}.fc2.kernel", tiles * grid**2, d, d),
    ], 0.0


def _decoder(config: ModelConfig, layers: int, lengths: Sequence[int]) -> tuple[list[_Map], float]:
    decoder = config.decoder
    d, f, vectors = decoder.width, decoder.mlp_width, layers * sum(lengths)
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    maps = [
        _Map(f"decoder.layers.{name}.kernel", vectors, *sizes)
        for name, *sizes in (
            ("attn.qkv", d, queries + 2 * keys),
            ("attn.out", queries, d),
            ("mlp.gate", d, f),
            ("mlp.up", d, f),
            ("mlp.down", f, d),
        )
    ]
    return maps, layers * 2 * sum(length**2 for length in lengths) * queries
