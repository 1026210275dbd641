"""What all parts of benchmarks/gpu.py share: sizes, the report, clocks, packed rows, parameters."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internvlx_jax.core.chips import CHIPS, DEVICE_KINDS
from internvlx_jax.core.files import write_json
from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.core.json_text import read_json_object
from internvlx_jax.core.model_config import (
    DecoderConfig,
    ModelConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.presets import LvtcPreset, internvlx_2b, internvlx_8b, lvtc_preset
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.batch import Batch, Row, collate
from internvlx_jax.data.plan import Bucket

Remat = Literal["full", "dots"]
PARTS = ("ceilings", "attention", "train", "torch", "decode", "lora")


@dataclasses.dataclass(frozen=True)
class Size:
    """Holds everything that differs between the measurement and its rehearsal on a CPU.

    Attributes:
        small, large: Make the 2B and the 8B model with an LVTC preset.
        segments: (tiles, text tokens) of each sample in a packed row.
        rows: Packed rows per train step.
        train_cases: (LVTC preset, remat policy) of the 2B's train steps, in rising order of their
            memory: a device tells the peak since its process began, so only a row that needs more
            than all before it can be read.
        lora_cases: The same of the 8B's train steps with adapters, and the parts of a step
            (compute.accumulation), which divide the memory of activations.
        steps: Timed repetitions, of which the median counts.
        prompt: Tiles and text tokens of a prompt.
        new_tokens: Tokens decoded per row.
        batches: Numbers of rows that are generated together.
        copy_bytes: Size of the array that is copied.
        product: Edge of the square matrices that are multiplied.
        seconds: What one row of each part takes at most, compilation included. A row is not begun
            when less time is left.
    """

    small: Callable[[LvtcPreset], ModelConfig]
    large: Callable[[LvtcPreset], ModelConfig]
    segments: tuple[tuple[int, int], ...]
    rows: int
    train_cases: tuple[tuple[LvtcPreset, Remat], ...]
    lora_cases: tuple[tuple[LvtcPreset, Remat, int], ...]
    steps: int
    prompt: tuple[int, int]
    new_tokens: int
    batches: tuple[int, ...]
    copy_bytes: int
    product: int
    seconds: dict[str, float]


def toy_model(lvtc: LvtcPreset = "off") -> ModelConfig:
    """Makes a model with two layers per stack and four visual tokens per tile."""
    return ModelConfig(
        vision=VisionConfig(width=32, layers=2, heads=4, mlp_width=48, image_size=56),
        decoder=DecoderConfig(
            vocab_size=300, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48
        ),
        prompt=PromptConfig(tiles=TileConfig(tile_size=56)),
        lvtc=lvtc_preset(lvtc, token_grid=2, expand_layer=1, inject_layers=()),
    )


SIZES = {
    "full": Size(
        internvlx_2b,
        internvlx_8b,
        segments=((3, 1024), (1, 256), (3, 1024)),
        rows=4,
        train_cases=(("off", "full"), ("fast", "full"), ("paper", "full"), ("off", "dots")),
        lora_cases=(("off", "full", 1), ("off", "dots", 2), ("off", "dots", 1)),
        steps=6,
        prompt=(7, 256),
        new_tokens=64,
        batches=(1, 8, 32),
        copy_bytes=2**32,
        product=8192,
        seconds={
            "ceilings": 10,
            "attention": 15,
            "train": 40,
            "torch": 45,
            "decode": 30,
            "lora": 60,
        },
    ),
    "toy": Size(
        toy_model,
        toy_model,
        segments=((1, 20), (1, 12)),
        rows=2,
        train_cases=(("off", "full"), ("fast", "full")),
        lora_cases=(("off", "full", 1), ("off", "full", 2)),
        steps=1,
        prompt=(1, 12),
        new_tokens=3,
        batches=(1,),
        copy_bytes=2**20,
        product=64,
        seconds=dict.fromkeys(PARTS, 1),
    ),
}


class Report:
    """Shows rows on the screen and keeps them in a file, as soon as each is measured.

    A file that exists already is continued, because the parts run in several processes.

    Attributes:
        path: The JSON file.
        deadline: Unix time after which no row is begun.
        facts: Versions and device.
        rows: All rows so far.
    """

    def __init__(self, path: Path, deadline: float, facts: dict[str, Any]):
        known = read_json_object(path) if path.exists() else {}
        self.path, self.deadline = path, deadline
        self.facts = {**known.get("facts", {}), **facts}
        self.rows = known.get("rows", [])

    def add(self, part: str, name: str, values: dict[str, Any]) -> None:
        """Adds a row, prints it, and writes the file."""
        self.rows.append({"part": part, "name": name, **values})
        skipped = sum("skipped" in row for row in self.rows)
        write_json(self.path, {"facts": self.facts, "skipped": skipped, "rows": self.rows})
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in values.items())
        print(f"[{self.seconds_left():4.0f} s left] {part} {name}: {shown}", flush=True)

    def attempt(
        self, part: str, name: str, seconds: float, measure: Callable[[], dict[str, Any]]
    ) -> None:
        """Adds what is measured, or why it is not: a row that fails must not stop the others.

        Args:
            part, name: Of the row.
            seconds: What it may take; it is not begun when less time is left.
            measure: Returns the values of the row.
        """
        left = self.seconds_left()
        if left < seconds:
            reason = f"{left:.0f} s left, it may need {seconds:.0f}"
            self.add(part, name, {"skipped": reason})
            return
        try:
            values = measure()
        except Exception as error:
            values = failed(error)
        self.add(part, name, values)
        gc.collect()

    def seconds_left(self) -> float:
        """Returns the seconds until the deadline."""
        return self.deadline - time.time()


def failed(error: Exception) -> dict[str, Any]:
    """Returns the values of a row that raised."""
    return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def datasheet() -> tuple[float | None, float | None]:
    """Returns the bfloat16 FLOP/s and bytes/s of this device, None where they are unknown."""
    chip = CHIPS.get(DEVICE_KINDS.get(jax.devices()[0].device_kind, ""))
    return (chip.peak_flops, chip.memory_bandwidth) if chip else (None, None)


def share(value: float, of: float | None) -> float | None:
    """Returns `value / of`, None where the whole is unknown."""
    return None if of is None else value / of


def median_seconds(run: Callable[[], Any], steps: int) -> float:
    """Times a call and everything that it starts, after one call that warms up."""
    times = []
    for _ in range(steps + 1):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))


class Packed(NamedTuple):
    """Holds equal packed rows.

    Attributes:
        batch: The rows.
        bucket: Their shape.
        content: The arguments of `forward_flops` and `train_flops` that say what is in them.
    """

    batch: Batch
    bucket: Bucket
    content: dict[str, Any]


def packed(config: ModelConfig, segments: Sequence[tuple[int, int]], rows: int) -> Packed:
    """Makes equal rows without padding.

    Args:
        config: The model, whose LVTC says how many slots a tile has.
        segments: (tiles, text tokens) of each sample.
        rows: Number of rows.
    """
    per_tile = config.tokens_per_tile
    lengths = [tiles * per_tile + text for tiles, text in segments]
    saved = 0 if config.lvtc is None else config.lvtc.saved_per_tile
    short = [length - tiles * saved for length, (tiles, _) in zip(lengths, segments, strict=True)]
    short = short if saved else []
    row = _row(config, lengths, [tiles for tiles, _ in segments])
    bucket = Bucket(len(row.tile_start), sum(lengths), sum(short))
    batch = collate(
        [row] * rows,
        bucket,
        tile_size=config.vision.image_size,
        tokens_per_tile=per_tile,
        pad_id=config.prompt.pad_id,
        lvtc=config.lvtc,
    )
    content = dict(
        tiles=rows * len(row.tile_start), lengths=lengths * rows, short_lengths=short * rows
    )
    return Packed(batch, bucket, content)


def _row(config: ModelConfig, lengths: Sequence[int], tiles: Sequence[int]) -> Row:
    """Returns random samples of these lengths, each beginning with one token and its tiles."""
    per_tile, edge = config.tokens_per_tile, config.vision.image_size
    generator = np.random.default_rng(0)
    begins = np.cumsum([0, *lengths[:-1]])
    tile_start = np.concatenate(
        [
            begin + 1 + per_tile * np.arange(count)
            for begin, count in zip(begins, tiles, strict=True)
        ]
    ).astype(np.int32)
    # Ids below those of the special tokens.
    tokens = generator.integers(3, min(config.decoder.vocab_size, 90_000), sum(lengths))
    tokens = tokens.astype(np.int32)
    labels = tokens.copy()
    labels[(tile_start[:, None] + np.arange(per_tile)).ravel()] = IGNORED
    pixels = generator.integers(0, 256, (len(tile_start), edge, edge, 3), np.uint8)
    return Row(tokens, labels, tile_start, pixels, tuple(lengths), dataset=(0,) * len(lengths))


def random_params(
    shapes: dict[str, jax.ShapeDtypeStruct], inits: dict[str, str], shardings: Any = None
) -> dict[str, jax.Array]:
    """Makes random parameters on the device.

    Each has its own dtype from the start: a float32 copy of the 8B model would not fit.

    Args:
        shapes: Dotted path -> shape and dtype.
        inits: Dotted path -> distribution; only the constants "0" and "1" are told apart.
        shardings: Dotted path -> where it lives; None is the default device.
    """
    constants = {"0": 0.0, "1": 1.0}

    def make() -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return {
            path: jnp.full(leaf.shape, constants[inits[path]], leaf.dtype)
            if inits.get(path) in constants
            else 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
            for key, (path, leaf) in zip(keys, shapes.items(), strict=True)
        }

    return jax.jit(make, out_shardings=shardings)()
