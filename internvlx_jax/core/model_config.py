"""What a model is: its sizes and variants (design: model.md 1, checkpoints.md 7)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, get_args

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.ranges import (
    COUNT,
    LARGEST,
    LAYERS,
    NUMBER,
    POSITIVE,
    RATE,
    Range,
    check_ranges,
)
from internvlx_jax.core.tile_config import TileConfig

ANY = Range(-LARGEST)
RATIO = Range(0, 1, low_open=True)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Describes InternViT, the vision tower.

    Attributes:
        width, layers, heads, mlp_width: Sizes.
        image_size, patch_size: Sides of a tile and of a patch, in pixels.
        norm, eps: Kind of the norms, and what keeps them finite.
        qkv_bias: Whether queries, keys and values have biases.
        qk_norm: Whether queries and keys are normalized.
        layer_scale_init: Fresh value of the factor on each branch.
        drop_path: Rate of the last layer; those before grow linearly from 0.
        select_layer: Indexes [embeddings, layer 1, ..., layer L]; -1 is the last output.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    image_size: int = 448
    patch_size: int = 14
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale_init: float = 1.0
    drop_path: float = 0.0
    select_layer: int = -1

    def __post_init__(self):
        check_ranges(
            self,
            "vision.",
            width=COUNT,
            layers=LAYERS,
            heads=COUNT,
            mlp_width=COUNT,
            image_size=COUNT,
            patch_size=COUNT,
            eps=POSITIVE,
            layer_scale_init=ANY,
            drop_path=RATE,
            select_layer=ANY,
        )
        _require(
            self.width % self.heads == 0,
            f"vision.width {self.width} is not divisible by heads {self.heads}",
        )
        _require(
            0 <= self.layers_run <= self.layers,
            f"vision.select_layer {self.select_layer} is outside "
            f"-{self.layers + 1}..{self.layers} of a tower with {self.layers} layers",
        )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def layers_run(self) -> int:
        """Layers in front of the selected output.

        The others keep their parameters, so that checkpoints stay complete, and are not run.
        """
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Describes the projector that released checkpoints hold.

    Attributes:
        kind: `pvtc` (InternVL-X) or `mlp1` (the InternVL2 baseline).
        downsample_ratio: 1 / side of a region in patches.
        pixel_shuffle: `v1` transposes the token grid, as some old checkpoints need.
        drop_path: Rate in training; acts on PVTC only.
    """

    kind: Literal["pvtc", "mlp1"] = "pvtc"
    downsample_ratio: float = 0.5
    pixel_shuffle: Literal["v1", "v2"] = "v2"
    drop_path: float = 0.1

    def __post_init__(self):
        check_ranges(self, "projector.", downsample_ratio=RATIO, drop_path=RATE)
        side = self.region_side
        _require(
            side >= 1 and side & (side - 1) == 0 and 1 / side == self.downsample_ratio,
            f"projector.downsample_ratio {self.downsample_ratio} is not 1, 1/2, 1/4, ...",
        )

    @property
    def region_side(self) -> int:
        """Patches along one side of a region (m)."""
        return round(1 / self.downsample_ratio)


LvtcProjector = Literal["pvtc", "mlp"]
Upsample = Literal["bilinear", "nearest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LvtcConfig:
    """Describes LVTC: few visual tokens in the shallow layers, many in the deep ones (lvtc.md 2).

    Attributes:
        expand_layer: First decoder layer, counted from 0, that sees the high grid (k).
        low_grid, high_grid: Visual tokens along one side of a tile in the shallow and in the deep
            layers.
        low_projector, high_projector, inject_projector: Kind of the projector of layer 0, of layer
            k and of the injections. core/projector_sites.py says which one is the released one.
        upsample: How hidden states of the low grid become those of the high grid.
        gate: Start value of the learned scalar in front of each added projector; None adds it as
            it is.
        inject_layers: Decoder layers in front of which a further projection is added.
    """

    expand_layer: int
    low_grid: int = 16
    high_grid: int = 32
    low_projector: LvtcProjector = "pvtc"
    high_projector: LvtcProjector = "mlp"
    inject_projector: LvtcProjector = "mlp"
    upsample: Upsample = "bilinear"
    gate: float | None = 0.0
    inject_layers: tuple[int, ...] = ()

    def __post_init__(self):
        check_ranges(
            self,
            "lvtc.",
            expand_layer=NUMBER,
            low_grid=COUNT,
            high_grid=COUNT,
            gate=ANY,
            inject_layers=NUMBER,
        )
        for name in ("low_grid", "high_grid"):
            side = getattr(self, name)
            _require(
                side >= 1 and side & (side - 1) == 0, f"lvtc.{name} {side} is not a power of two"
            )
        _require(
            self.high_grid % self.low_grid == 0,
            f"lvtc.low_grid {self.low_grid} does not divide lvtc.high_grid {self.high_grid}",
        )
        for name in ("low_projector", "high_projector", "inject_projector", "upsample"):
            value, known = (
                getattr(self, name),
                get_args(Upsample if name == "upsample" else LvtcProjector),
            )
            _require(
                value in known,
                f"lvtc.{name} {value!r} is unknown; choose one of {', '.join(known)}",
            )
        _require(
            all(a < b for a, b in itertools.pairwise((self.expand_layer, *self.inject_layers))),
            f"lvtc.inject_layers {list(self.inject_layers)} are not increasing layers behind "
            f"lvtc.expand_layer {self.expand_layer}",
        )

    @property
    def scale(self) -> int:
        """Children of a low token along one side (s)."""
        return self.high_grid // self.low_grid

    @property
    def saved_per_tile(self) -> int:
        """Slots by which a tile is shorter in the short layout."""
        return self.high_grid**2 - self.low_grid**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Describes rotary positions.

    Attributes:
        theta: Base of the frequencies.
        max_positions: Positions that the decoder was trained for.
        scaling: `dynamic` acts only on key lengths above `max_positions` (model.md 8). `su` and
            `yarn` (Phi-3, model.md 9) stretch each frequency by its entry of `short_factor`, or of
            `long_factor` once a call holds positions beyond `original_max_positions`.
        factor: Of `linear` and `dynamic` scaling.
        short_factor, long_factor: H/2 entries each.
        original_max_positions: See `scaling`.
        allow_longer: Whether a call may have more key slots than `max_positions`.
    """

    theta: float = 1e4
    max_positions: int = 32768
    scaling: Literal["none", "linear", "dynamic", "su", "yarn"] = "none"
    factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    original_max_positions: int = 0
    allow_longer: bool = False

    def __post_init__(self):
        check_ranges(
            self,
            "decoder.rope.",
            theta=POSITIVE,
            max_positions=COUNT,
            factor=POSITIVE,
            short_factor=POSITIVE,
            long_factor=POSITIVE,
            original_max_positions=NUMBER,
        )
        if self.scaling in ("su", "yarn"):
            _require(
                0 < len(self.short_factor) == len(self.long_factor)
                and self.original_max_positions > 0,
                f"decoder.rope.scaling {self.scaling!r} needs short_factor and long_factor of one "
                "length, and original_max_positions",
            )


DecoderFamily = Literal["internlm2", "llama", "qwen2", "qwen3", "phi3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Describes the decoder, which is one for all families.

    Attributes:
        family: Selects tensor names in checkpoints, and nothing in the computation.
        vocab_size, width, layers, heads, kv_heads, head_dim, mlp_width: Sizes.
        eps: Keeps the norms finite.
        qkv_bias, out_bias: Whether these maps have biases.
        qk_norm: Whether each head of queries and keys is normalized, before rope (Qwen3).
        tie_embeddings: Whether the embedding is the output head as well.
        sliding_window: Slots that a query sees, its own included; None is all of them.
        initializer_range: Standard deviation of fresh weights; 0.02 suits a width near 2048.
        rope: Rotary positions.
    """

    family: DecoderFamily = "internlm2"
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    eps: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None
    initializer_range: float = 0.02
    rope: RopeConfig = RopeConfig()

    def __post_init__(self):
        check_ranges(
            self,
            "decoder.",
            vocab_size=COUNT,
            width=COUNT,
            layers=LAYERS,
            heads=COUNT,
            kv_heads=COUNT,
            head_dim=COUNT,
            mlp_width=COUNT,
            eps=POSITIVE,
            sliding_window=COUNT,
            initializer_range=NUMBER,
        )
        _require(
            self.heads % self.kv_heads == 0,
            f"decoder.heads {self.heads} is not a multiple of decoder.kv_heads {self.kv_heads}",
        )

    @property
    def group(self) -> int:
        """Query heads per key/value head (J)."""
        return self.heads // self.kv_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Says how text and images become tokens for this model.

    Attributes:
        template: Name in data/templates.py; it also decides the stop id wherever a tokenizer is
            available.
        system_message: Replaces the template's own.
        tiles: How images are cut; tile_size is the tower's image_size.
        eos_ids, pad_id: What ends a row and fills it afterwards where no tokenizer is available.
    """

    template: str = "internlm2-chat"
    system_message: str | None = None
    tiles: TileConfig = TileConfig()
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int = 2

    def __post_init__(self):
        check_ranges(self, "prompt.", eos_ids=NUMBER, pad_id=NUMBER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Describes a whole model; `lvtc` None is off."""

    vision: VisionConfig
    projector: ProjectorConfig = ProjectorConfig()
    decoder: DecoderConfig
    lvtc: LvtcConfig | None = None
    prompt: PromptConfig = PromptConfig()

    def __post_init__(self):
        _require(
            self.vision.grid % self.projector.region_side == 0,
            f"a patch grid of side {self.vision.grid} does not divide into regions of side "
            f"{self.projector.region_side} (vision.image_size, projector.downsample_ratio)",
        )
        _require(
            self.prompt.tiles.tile_size == self.vision.image_size,
            f"prompt.tiles.tile_size {self.prompt.tiles.tile_size} differs from vision.image_size "
            f"{self.vision.image_size}",
        )
        if self.lvtc is not None:
            self._check_lvtc(self.lvtc)

    def _check_lvtc(self, lvtc: LvtcConfig) -> None:
        layers, grid = self.decoder.layers, self.vision.grid
        _require(
            self.projector.kind == "pvtc",
            f"lvtc needs projector.kind pvtc, it is {self.projector.kind}",
        )
        _require(
            lvtc.expand_layer < layers,
            f"lvtc.expand_layer {lvtc.expand_layer} is outside 0..{layers - 1} of a "
            f"decoder with {layers} layers (decoder.layers)",
        )
        _require(
            all(layer < layers for layer in lvtc.inject_layers),
            f"lvtc.inject_layers {list(lvtc.inject_layers)} "
            f"go beyond layer {layers - 1}, the last of a decoder with {layers} layers "
            "(decoder.layers)",
        )
        _require(
            grid % lvtc.high_grid == 0,
            f"lvtc.high_grid {lvtc.high_grid} does not divide the patch grid of side "
            f"{grid} (vision.image_size / vision.patch_size)",
        )

    @property
    def token_grid(self) -> int:
        """Tokens that `projector` makes along one side of a tile."""
        return self.vision.grid // self.projector.region_side

    @property
    def tokens_per_tile(self) -> int:
        """Slots per tile in a sequence; with LVTC those of the long layout."""
        return (self.token_grid if self.lvtc is None else self.lvtc.high_grid) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Describes the adapters of one part of a model, on every linear map of its layers.

    Attributes:
        part: The part.
        rank: Of the two factors.
        alpha: The addition is scaled by alpha / rank, or by alpha / sqrt(rank) with `use_rslora`.
        dropout: Rate on the input of the first factor, in training.
        use_rslora: See `alpha`.
    """

    part: Literal["vision", "decoder"]
    rank: int
    alpha: float
    dropout: float = 0.05
    use_rslora: bool = False

    def __post_init__(self):
        check_ranges(self, "lora.", rank=COUNT, alpha=POSITIVE, dropout=RATE)

    @property
    def scale(self) -> float:
        """Factor on the low-rank product."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)
