"""Table A of docs/evidence.md: what each compressor is worth on generated forms.

`variant` names a row of the table, `preset` a size: `tiny` for tests, `cpu` for two cores, `gpu`
for one accelerator, and `stage` a run:

* `decoder` teaches the decoder to answer questions about forms that are told in words.
* `row` puts a fresh projector between that decoder and a tower that has learned to read as a
  classifier (`benchmarks/ablation_tower.py`), and trains projector and decoder.

So all rows of a seed begin with one tower and one decoder, as models do in practice, and no
projector has had a part in either; every seed trains its own two. Everything but the variant is
equal in all rows, the optimizer included.

A tile of 112 px has 8 x 8 patches, so that 64 tokens per tile are one per patch, and 16 are the
share of the released models (a quarter). The gate of LVTC starts open, because no projector is
there yet that it could leave undisturbed; rows with other starts say so.

The forms lie in `runs/ablation/data/pages-PRESET`; `data/form_dataset.py` writes them.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import (
    DecoderConfig,
    LvtcConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    RopeConfig,
    VisionConfig,
)
from internvlx_jax.core.run_config import (
    ComputeConfig,
    FreezeConfig,
    GroupConfig,
    OptimizerConfig,
    TrainConfig,
)
from internvlx_jax.core.tile_config import TileConfig

TILE, PATCH = 112, 14
SIDES = {4: 2, 16: 4, 64: 8}  # tokens per tile -> side of the token grid


class Variant(NamedTuple):
    """A row of the table.

    Attributes:
        factor: The question that the row belongs to.
        projector: Kind of the projector.
        tokens: Visual tokens per tile; with LVTC those of the released projector.
        lvtc: None, or fields of LvtcConfig that differ from `_lvtc`, `kind` among them: `fast`
            makes `tokens` out of a quarter, `paper` four times `tokens`.
        rule: Tile rule.
    """

    factor: str
    projector: Literal["mlp1", "pvtc"]
    tokens: int
    lvtc: dict[str, Any] | None = None
    rule: Literal["off", "edge", "area"] = "edge"


# In the order of the table. BASELINE is what times and FLOPs are compared with.
VARIANTS: dict[str, Variant] = {
    "internvl": Variant("whole model", "mlp1", 16, rule="off"),
    "x": Variant("whole model", "pvtc", 16, {"kind": "fast"}),
    "mlp1-4": Variant("projector", "mlp1", 4),
    "pvtc-4": Variant("projector", "pvtc", 4),
    "mlp1-16": Variant("projector", "mlp1", 16),
    "pvtc-16": Variant("projector", "pvtc", 16),
    "mlp1-64": Variant("projector", "mlp1", 64),
    "pvtc-64": Variant("projector", "pvtc", 64),
    "x-inject": Variant("LVTC 4 to 16", "pvtc", 16, {"kind": "fast", "inject": True}),
    "x-k2": Variant("LVTC 4 to 16", "pvtc", 16, {"kind": "fast", "expand_layer": 2}),
    "x-gate0": Variant("LVTC 4 to 16", "pvtc", 16, {"kind": "fast", "gate": 0.0}),
    "x-no-gate": Variant("LVTC 4 to 16", "pvtc", 16, {"kind": "fast", "gate": None}),
    "x-nearest": Variant("LVTC 4 to 16", "pvtc", 16, {"kind": "fast", "upsample": "nearest"}),
    "paper": Variant("LVTC 16 to 64", "pvtc", 16, {"kind": "paper"}),
    "paper-inject": Variant("LVTC 16 to 64", "pvtc", 16, {"kind": "paper", "inject": True}),
    "pvtc-16-off": Variant("tiles", "pvtc", 16, rule="off"),
    "pvtc-16-area": Variant("tiles", "pvtc", 16, rule="area"),
}
BASELINE = "internvl"
CORE = ("internvl", "mlp1-16", "pvtc-16", "x", "pvtc-4")  # the rows of --quick
SEEDS = (0, 1, 2)


class Preset(NamedTuple):
    """A size of all rows.

    Attributes:
        width, layers, mlp: Of the decoder, with heads of 32.
        vision_width, vision_layers, vision_mlp: Of the tower, with heads of 32.
        tower: Steps, tiles per step and different tiles of the tower's training.
        decoder_steps, decoder_samples: Updates of the stage `decoder`, and conversations in each.
        steps, samples: The same of the stage `row`.
        learning_rate: The highest of the stage `decoder`; that of `row` is twice as high.
        texts: Forms of the stage `decoder`.
        forms: Forms for training, validation, test and controls.
        dtype: Of the activations.
        buckets: Shapes of a batch, at most; each is compiled.
    """

    width: int
    layers: int
    mlp: int
    vision_width: int
    vision_layers: int
    vision_mlp: int
    tower: tuple[int, int, int]
    decoder_steps: int
    decoder_samples: int
    steps: int
    samples: int
    learning_rate: float
    texts: int
    forms: tuple[int, int, int, int]
    dtype: Literal["bfloat16", "float32"] = "float32"
    buckets: int = 2

    @property
    def expand_layer(self) -> int:
        """First deep layer, at the share of the paper (19 of 24, 27 of 32)."""
        return max(1, round(0.82 * self.layers))


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        width=32,
        layers=3,
        mlp=32,
        vision_width=32,
        vision_layers=1,
        vision_mlp=32,
        tower=(4, 4, 8),
        decoder_steps=2,
        decoder_samples=4,
        steps=3,
        samples=4,
        learning_rate=1e-3,
        texts=8,
        forms=(8, 2, 2, 1),
        buckets=1,
    ),
    "cpu": Preset(
        width=96,
        layers=6,
        mlp=256,
        vision_width=96,
        vision_layers=4,
        vision_mlp=256,
        tower=(8000, 32, 32000),
        decoder_steps=3000,
        decoder_samples=32,
        steps=2000,
        samples=8,
        learning_rate=1.5e-3,
        texts=30000,
        forms=(6400, 60, 900, 150),
    ),
    "gpu": Preset(
        width=256,
        layers=12,
        mlp=768,
        vision_width=256,
        vision_layers=6,
        vision_mlp=768,
        tower=(12000, 64, 96000),
        decoder_steps=6000,
        decoder_samples=128,
        steps=6000,
        samples=64,
        learning_rate=6e-4,
        texts=96000,
        forms=(96000, 500, 2000, 400),
        dtype="bfloat16",
    ),
}


def get_config(
    variant: str = "x", stage: str = "row", seed: int = 0, preset: str = "cpu"
) -> TrainConfig:
    for name, value, known in (
        ("variant", variant, VARIANTS),
        ("preset", preset, PRESETS),
        ("stage", stage, ("decoder", "row")),
    ):
        if value not in known:
            raise ConfigError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
    size, folder = PRESETS[preset], f"runs/ablation/pages-{preset}"
    data = f"runs/ablation/data/pages-{preset}"
    if stage == "decoder":
        return TrainConfig(
            output_dir=f"{folder}/decoder-s{seed}",
            model=_model(VARIANTS[BASELINE], size),
            data=_data(f"{data}/meta_text.json", size.decoder_samples, buckets=1),
            freeze=FreezeConfig(vit=True, projector=True),
            optimizer=_optimizer(size.decoder_steps, learning_rate=size.learning_rate),
            compute=ComputeConfig(dtype=size.dtype, remat="none"),
            steps=size.decoder_steps,
            seed=seed,
            log_every=max(1, size.decoder_steps // 20),
            save_every=size.decoder_steps,
            keep_last=1,
        )
    return TrainConfig(
        output_dir=f"{folder}/{variant}-s{seed}",
        init_from=f"{folder}/start-{variant}-s{seed}",
        model=_model(VARIANTS[variant], size),
        data=dataclasses.replace(
            _data(f"{data}/meta_train.json", size.samples, size.buckets),
            val_meta=f"{data}/meta_val.json",
        ),
        # What is fresh learns fast, the decoder slowly. The tower would forget how to read print.
        freeze=FreezeConfig(vit=True),
        optimizer=_optimizer(
            size.steps,
            learning_rate=2 * size.learning_rate,
            groups=(GroupConfig(params=r"decoder\.", multiplier=0.1),),
        ),
        compute=ComputeConfig(dtype=size.dtype, remat="none"),
        steps=size.steps,
        seed=seed,
        log_every=max(1, size.steps // 20),
        eval_every=size.steps // 5 or size.steps,
        save_every=max(1, size.steps // 3),
        keep_last=1,
    )


def _data(meta: str, samples: int, buckets: int) -> DataConfig:
    return DataConfig(
        meta=meta,
        tokenizer="internvlx_jax/data/assets/synthetic_tokenizer",
        max_length=1024,
        length_step=16,
        batch_mode="samples",
        samples_per_step=samples,
        max_executables=buckets,
    )


def _optimizer(steps: int, **settings: Any) -> OptimizerConfig:
    return OptimizerConfig(
        schedule="wsd",
        cooldown_ratio=0.3,
        b2=0.95,
        weight_decay=0.05,
        warmup_steps=min(50, steps // 4),
        **settings,
    )


def _model(variant: Variant, size: Preset) -> ModelConfig:
    side = SIDES[variant.tokens]
    return ModelConfig(
        vision=VisionConfig(
            width=size.vision_width,
            layers=size.vision_layers,
            heads=size.vision_width // 32,
            mlp_width=size.vision_mlp,
            image_size=TILE,
            patch_size=PATCH,
        ),
        projector=ProjectorConfig(
            kind=variant.projector, downsample_ratio=side * PATCH / TILE, drop_path=0.0
        ),
        decoder=DecoderConfig(
            vocab_size=656,
            width=size.width,
            layers=size.layers,
            heads=size.width // 32,
            kv_heads=size.width // 32,
            head_dim=32,
            mlp_width=size.mlp,
            initializer_range=0.06,
            rope=RopeConfig(theta=1e4, max_positions=2048),
        ),
        lvtc=None if variant.lvtc is None else _lvtc(side, size, **variant.lvtc),
        prompt=PromptConfig(
            template="internlm2-chat",
            system_message="",
            tiles=TileConfig(tile_size=TILE, rule=variant.rule, max_num=6),
        ),
    )


def _lvtc(
    side: int, size: Preset, *, kind: Literal["fast", "paper"], inject: bool = False, **fields: Any
) -> LvtcConfig:
    """Returns the preset `fast` or `paper` of LVTC for this decoder, with some fields replaced."""
    first_deep = fields.pop("expand_layer", size.expand_layer)
    # An injection needs a deep layer behind the first one.
    first_deep = min(first_deep, size.layers - 2) if inject else first_deep
    settings: dict[str, Any] = {
        "expand_layer": first_deep,
        "low_grid": side // 2 if kind == "fast" else side,
        "high_grid": side if kind == "fast" else 2 * side,
        "high_projector": "pvtc" if kind == "fast" else "mlp",
        "gate": 1.0,
        "inject_layers": (size.layers - 1,) if inject else (),
    }
    return LvtcConfig(**(settings | fields))
