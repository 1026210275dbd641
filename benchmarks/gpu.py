"""What one NVIDIA GPU gives: attention, train steps against PyTorch, generation, and memory against its prediction.

    python benchmarks/gpu.py [--parts ceilings attention train torch decode lora] [--out runs/gpu_benchmark]
    python benchmarks/gpu.py --size toy          # the same on a CPU, in seconds

* ceilings: a large copy and a large bfloat16 product, what this card reaches of its datasheet.
* attention: every backend against the plain formula in float32, forward and backward, in the frames of packed rows.
* train: 2B, projector and decoder trained, tower frozen, rows of three packed samples with seven tiles and 2,304 text
  tokens (4,096 slots without LVTC), for LVTC fast, off and paper.
* torch: the same step of transformers' InternVL of equal shape. Needs torch and transformers.
* decode: prefill of seven tiles and 256 text tokens and greedy decoding, at batch 1, 8 and 32.
* lora: 8B with adapters on the decoder.

Weights are random and made on the device. Every row is printed and written to gpu.json as soon as it is there. What does not
fit --budget_seconds is left out, and counted. MFU is of the FLOPs of the samples, attention within each of them, without
recomputation, against the datasheet's peak. PyTorch runs in a process of its own, for no process gives its memory back.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvlx_jax.core.chips import CHIPS, DEVICE_KINDS
from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.files import read_json_object, write_json
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.inputs import IGNORED
from internvlx_jax.core.model_config import (
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.presets import internvlx_2b, internvlx_8b, lvtc_preset
from internvlx_jax.core.run_config import ComputeConfig, FreezeConfig, MeshConfig, TrainConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.batch import Batch, Row, collate
from internvlx_jax.data.buckets import Bucket
from internvlx_jax.models.attention import SelfAttention, attend
from internvlx_jax.models.flops import forward_flops, train_flops
from internvlx_jax.models.generation import Vocabulary, advance, for_decoding, row_keys, start
from internvlx_jax.models.params import abstract_model, unflatten
from internvlx_jax.models.sharding import batch_sharding, make_mesh
from internvlx_jax.training.executables import compile_train_step, peak_bytes
from internvlx_jax.training.setup import Setup, prepare
from internvlx_jax.training.step import TrainState

PARTS = ("ceilings", "attention", "train", "torch", "decode", "lora")
BACKENDS = {"gpu": ("cudnn", "xla"), "cpu": ("xla",)}
TOLERANCE = 0.03  # of the largest entry: bfloat16 has eight bits
LORA = LoraConfig(part="decoder", rank=16, alpha=32.0)


@dataclasses.dataclass(frozen=True)
class Size:
    """Everything that differs between the measurement and its rehearsal on a CPU.

    Attributes:
        segments: (tiles, text tokens) of each sample in a packed row.
        rows: packed rows of a train step.
        steps: timed repetitions; the median counts.
        prompt: tiles and text tokens of a prompt.
        new_tokens: decoded a row.
        batches: rows of a generation.
        seconds: what a row of each part takes at most, compilation included; without so much left it is not begun.
    """

    small: Callable[[str], ModelConfig]
    large: Callable[[str], ModelConfig]
    segments: tuple[tuple[int, int], ...]
    rows: int
    steps: int
    prompt: tuple[int, int]
    new_tokens: int
    batches: tuple[int, ...]
    copy_bytes: int
    product: int
    seconds: dict[str, float]


def toy_model(lvtc: str = "off") -> ModelConfig:
    """Make a model of two layers a stack, with four visual tokens a tile."""
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
        steps=2,
        prompt=(1, 12),
        new_tokens=3,
        batches=(1, 2),
        copy_bytes=2**20,
        product=64,
        seconds=dict.fromkeys(PARTS, 1),
    ),
}


class Report:
    """The rows so far, on the screen and in a file."""

    def __init__(self, path: Path, deadline: float, facts: dict[str, Any]):
        known = read_json_object(path) if path.exists() else {}
        self.path, self.deadline = path, deadline
        self.facts, self.rows = {**known.get("facts", {}), **facts}, known.get("rows", [])

    def add(self, part: str, name: str, values: dict[str, Any]) -> None:
        row = {"part": part, "name": name, **values}
        self.rows.append(row)
        left = sum("skipped" in row for row in self.rows)
        write_json(self.path, {"facts": self.facts, "skipped": left, "rows": self.rows})
        print(
            f"[{self.deadline - time.time():4.0f} s left] {part} {name}: "
            + ", ".join(f"{key} {_shown(value)}" for key, value in values.items()),
            flush=True,
        )

    def attempt(
        self, part: str, name: str, seconds: float, measure: Callable[[], dict[str, Any]]
    ) -> None:
        """Add what is measured, or why it is not: one row that fails must not take the others along."""
        left = self.deadline - time.time()
        if left < seconds:
            return self.add(
                part, name, {"skipped": f"{left:.0f} s left, it may need {seconds:.0f}"}
            )
        try:
            values = measure()
        except Exception as error:
            values = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        self.add(part, name, values)
        gc.collect()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def peaks() -> tuple[float | None, float | None]:
    """Return the datasheet's bfloat16 FLOP/s and bytes a second of this device; None where it is unknown."""
    chip = CHIPS.get(DEVICE_KINDS.get(jax.devices()[0].device_kind, ""))
    return (chip.peak_flops, chip.memory_bandwidth) if chip else (None, None)


def share(value: float, of: float | None) -> float | None:
    return None if of is None else value / of


def median_seconds(run: Callable[[], Any], steps: int) -> float:
    """Time a call with everything it starts, after one call that warms up."""
    times = []
    for _ in range(steps + 1):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))


def ceilings(report: Report, size: Size) -> None:
    flops, bandwidth = peaks()

    def copy() -> dict[str, Any]:
        x = jnp.ones(size.copy_bytes // 2, jnp.bfloat16)
        seconds = median_seconds(functools.partial(jax.jit(lambda x: x + 1), x), size.steps)
        moved = 2 * x.nbytes / seconds
        return {"tb_per_s": moved / 1e12, "share_of_datasheet": share(moved, bandwidth)}

    def product() -> dict[str, Any]:
        a, b = (
            jax.random.normal(key, (size.product, size.product), jnp.bfloat16)
            for key in jax.random.split(jax.random.key(0))
        )
        multiply = jax.jit(lambda a, b: a @ b)
        seconds = median_seconds(lambda: [multiply(a, b) for _ in range(10)], size.steps) / 10
        rate = 2 * size.product**3 / seconds
        return {"tflops": rate / 1e12, "share_of_datasheet": share(rate, flops)}

    report.attempt("ceilings", "copy", size.seconds["ceilings"], copy)
    report.attempt("ceilings", "bfloat16 product", size.seconds["ceilings"], product)


def packed(
    config: ModelConfig, segments: Sequence[tuple[int, int]], rows: int
) -> tuple[Batch, Bucket, dict[str, Any]]:
    """Make equal rows without padding.

    Args:
        config: the model, whose LVTC says how many slots a tile has.
        segments: (tiles, text tokens) of each sample.
        rows: of the batch.

    Returns:
        The batch, its bucket, and the arguments of the FLOP counts that say how much is in it.
    """
    per_tile, generator = config.tokens_per_tile, np.random.default_rng(0)
    lengths = [tiles * per_tile + text for tiles, text in segments]
    starts = np.cumsum([0, *lengths[:-1]])
    tile_start = np.concatenate(
        [first + 1 + per_tile * np.arange(tiles) for first, (tiles, _) in zip(starts, segments)]
    ).astype(np.int32)
    tokens = generator.integers(3, min(config.decoder.vocab_size, 90_000), sum(lengths)).astype(
        np.int32
    )
    labels = tokens.copy()
    labels[(tile_start[:, None] + np.arange(per_tile)).ravel()] = IGNORED
    edge = config.vision.image_size
    row = Row(
        tokens,
        labels,
        tile_start,
        generator.integers(0, 256, (len(tile_start), edge, edge, 3), np.uint8),
        tuple(lengths),
        dataset=(0,) * len(lengths),
    )
    saved = 0 if config.lvtc is None else config.lvtc.saved_per_tile
    short = (
        [length - tiles * saved for length, (tiles, _) in zip(lengths, segments)] if saved else []
    )
    bucket = Bucket(len(tile_start), sum(lengths), sum(short))
    batch = collate(
        [row] * rows,
        bucket,
        tile_size=edge,
        tokens_per_tile=per_tile,
        pad_id=config.prompt.pad_id,
        lvtc=config.lvtc,
    )
    return (
        batch,
        bucket,
        dict(tiles=rows * len(tile_start), lengths=lengths * rows, short_lengths=short * rows),
    )


def attention(report: Report, size: Size) -> None:
    """Compare each backend with `attend` in float32 from the same bfloat16 arrays, on one row of each frame."""
    decoder, vision = size.small("off").decoder, size.small("off").vision
    heads = (decoder.heads, decoder.kv_heads, decoder.head_dim)
    cases = []
    for name, lvtc, short in (
        ("row without LVTC", "off", False),
        ("short frame of fast", "fast", True),
        ("long frame of paper", "paper", False),
    ):
        inputs = packed(size.small(lvtc), size.segments, 1)[0].inputs
        segments = np.asarray(inputs.segment_ids)
        if short:
            segments = np.take_along_axis(segments, inputs.short.short_to_long, axis=1)
        segments = segments.copy()
        segments[:, -segments.shape[1] // 20 :] = 0  # some padding
        cases.append((name, *segments.shape, *heads, segments))
    cases.append(
        (
            "seven tiles",
            sum(tiles for tiles, _ in size.segments),
            vision.grid**2 + 1,
            vision.heads,
            vision.heads,
            vision.head_dim,
            None,
        )
    )
    for name, rows, slots, n, k, h, segments in cases:
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [
            jax.random.normal(key, (rows, slots, count, h), jnp.bfloat16)
            for key, count in zip(keys, (n, k, k, n))
        ]
        causal = segments is not None

        def run(
            compute: Callable[..., jax.Array],
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            do: jax.Array,
        ) -> Any:
            out, back = jax.vjp(compute, q, k, v)
            return out, *back(do)

        @functools.cache
        def expected() -> Sequence[jax.Array]:
            plain = functools.partial(
                attend, q_segments=segments, kv_segments=segments, q_start=0 if causal else None
            )
            with jax.default_matmul_precision("highest"):
                return jax.jit(functools.partial(run, plain))(
                    *(x.astype(jnp.float32) for x in arrays)
                )

        def measure(backend: str) -> dict[str, Any]:
            compute = functools.partial(SelfAttention(backend), segments=segments, causal=causal)
            program = jax.jit(functools.partial(run, compute)).lower(*arrays).compile()
            errors = [
                float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
                for a, b in zip(program(*arrays), expected())
            ]
            return {
                "shape": f"[{rows}, {slots}, {n}/{k}, {h}]",
                **dict(zip(("out", "dq", "dk", "dv"), errors)),
                "within_tolerance": max(errors) <= TOLERANCE,
                "ms": 1e3 * median_seconds(lambda: program(*arrays), size.steps),
                "temporaries_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
            }

        for backend in BACKENDS[jax.default_backend()]:
            report.attempt(
                "attention",
                f"{name}, {backend}",
                size.seconds["attention"],
                functools.partial(measure, backend),
            )


def draw(
    shapes: dict[str, jax.ShapeDtypeStruct], inits: dict[str, str], shardings: Any = None
) -> dict[str, jax.Array]:
    """Make random parameters on the device, each in its own dtype: a float32 copy of the 8B model would not fit."""

    def make() -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(0), len(shapes))
        constants = {"0": 0.0, "1": 1.0}
        return {
            path: jnp.full(leaf.shape, constants[inits[path]], leaf.dtype)
            if inits.get(path) in constants
            else 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
            for key, (path, leaf) in zip(keys, shapes.items())
        }

    return jax.jit(make, out_shardings=shardings)()


def random_state(setup: Setup) -> TrainState:
    places = jax.tree.map(lambda leaf: leaf.sharding, setup.state)
    trainable, frozen = (
        draw(part, setup.abstract.inits, where)
        for part, where in (
            (setup.division.trained, places.trainable),
            (setup.division.frozen, places.frozen),
        )
    )
    opt_state = jax.jit(setup.optimizer.init, out_shardings=places.opt_state)(trainable)
    return TrainState(trainable, frozen, opt_state, jax.device_put(np.int32(0), places.step))


def train_config(model: ModelConfig, remat: str, lora: bool) -> TrainConfig:
    freeze = FreezeConfig(train_lora_only=True) if lora else FreezeConfig(vit=True)
    return TrainConfig(
        output_dir="",
        model=model,
        data=DataConfig(meta="", batch_mode="pack"),
        freeze=freeze,
        lora=(LORA,) if lora else (),
        compute=ComputeConfig(remat=remat),
        mesh=MeshConfig(data=1),
    )


def train_steps(
    report: Report, size: Size, part: str, cases: Sequence[tuple[str, ModelConfig, str, bool]]
) -> None:
    """Time train steps, in rising order of their memory: only so can the peak of each be read.

    Args:
        report: what to add to.
        size: of the measurement.
        part: name of the part.
        cases: (name, model, remat policy, whether adapters alone are trained).
    """
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1], rows=size.rows)
    with ThreadPoolExecutor(max_workers=len(cases)) as threads:
        futures = []
        for _, model, remat, lora in cases:
            setup = prepare(train_config(model, remat, lora), model, mesh, steps=1000)
            batch, bucket, filled = packed(model, size.segments, size.rows)
            futures.append(
                (setup, batch, bucket, filled, threads.submit(_compiled, setup, bucket, size.rows))
            )
        for (name, *_), job in zip(cases, futures):
            report.attempt(
                part, name, size.seconds[part], functools.partial(_train_step, size, *job)
            )


def _compiled(setup: Setup, bucket: Bucket, rows: int) -> tuple[jax.stages.Compiled, float]:
    begun = time.perf_counter()
    return compile_train_step(setup, bucket, rows), time.perf_counter() - begun


def _train_step(
    size: Size, setup: Setup, batch: Batch, bucket: Bucket, filled: dict[str, Any], compiling: Any
) -> dict:
    program, compile_seconds = compiling.result()
    device, predicted = jax.devices()[0], peak_bytes(program)
    peak_before = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    state = random_state(setup)
    batch = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(setup.mesh)), batch)
    loss = None

    def step() -> TrainState:
        nonlocal state, loss
        state, metrics = program(state, batch)
        loss = metrics.loss
        return state

    seconds = median_seconds(step, size.steps)
    measured = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    measured = measured if measured > peak_before else None  # an earlier row needed more
    flops = train_flops(
        setup.model, {path: leaf.shape for path, leaf in setup.division.trained.items()}, **filled
    ).total
    peak = peaks()[0]
    return {
        "ms": 1e3 * seconds,
        "rows": size.rows,
        "slots": bucket.length,
        "short_slots": bucket.short_length,
        "rows_per_s": size.rows / seconds,
        "tokens_per_s": size.rows * bucket.length / seconds,
        "tflop": flops / 1e12,
        "mfu": share(flops / seconds, peak),
        "loss": float(loss),
        "compile_s": compile_seconds,
        "predicted_gib": predicted / 2**30,
        "measured_gib": measured and measured / 2**30,
        "measured_over_predicted": measured and measured / predicted,
    }


def train(report: Report, size: Size) -> None:
    train_steps(
        report,
        size,
        "train",
        [
            (f"2B, LVTC {lvtc}, remat {remat}", size.small(lvtc), remat, False)
            for lvtc, remat in (
                ("fast", "full"),
                ("off", "full"),
                ("paper", "full"),
                ("off", "dots"),
            )
        ],
    )


def lora(report: Report, size: Size) -> None:
    train_steps(
        report, size, "lora", [("8B LoRA, LVTC off, remat full", size.large("off"), "full", True)]
    )


def decode(report: Report, size: Size) -> None:
    """Prefill and greedy decoding; a step has to read the weights behind the embedding and all keys and values."""
    config, (flop_peak, bandwidth) = size.small("off"), peaks()
    abstract = abstract_model(config, dtype="bfloat16", param_dtype="bfloat16")
    model = for_decoding(
        nnx.merge(abstract.graphdef, unflatten(draw(abstract.shapes, abstract.inits)))
    )
    read = [nnx.state(model.decoder.layers), nnx.state(model.decoder.norm), model.decoder.head[...]]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
    options = dict(sampling=Sampling(), vocabulary=Vocabulary(stop_ids=(), pad_id=2, bos_id=1))
    room, decoder = size.new_tokens, config.decoder

    def begin(model: Any, inputs: Any) -> Any:
        return start(
            model, inputs, row_keys(0, jnp.arange(len(inputs.tokens))), 0, room=room, **options
        )

    def go(model: Any, state: Any) -> Any:
        return advance(model, state, room, 0, **options)

    def compiled(rows: int) -> tuple[Any, ...]:
        batch, bucket, filled = packed(config, [size.prompt], rows)
        state = jax.eval_shape(begin, model, batch.inputs)
        return (
            jax.device_put(batch.inputs),
            bucket,
            filled,
            jax.jit(begin).lower(model, batch.inputs).compile(),
            jax.jit(go).lower(model, state).compile(),
        )

    def measure(rows: int, job: Any) -> dict[str, Any]:
        inputs, bucket, filled, begin, go = job.result()
        prefill_seconds = median_seconds(lambda: begin(model, inputs), size.steps)
        state = begin(model, inputs)
        seconds = median_seconds(lambda: go(model, state), size.steps) / (room - 1)
        flops = forward_flops(config, **filled)
        cached = (
            rows
            * (bucket.length + room / 2)
            * 2
            * decoder.layers
            * decoder.kv_heads
            * decoder.head_dim
            * 2
        )
        return {
            "prefill_ms": 1e3 * prefill_seconds,
            "prefill_tokens_per_s": rows * bucket.length / prefill_seconds,
            "prefill_mfu": share((flops.total - flops.head) / prefill_seconds, flop_peak),
            "decode_ms": 1e3 * seconds,
            "decode_tokens_per_s": rows / seconds,
            "gbytes_per_step": (weights + cached) / 1e9,
            "share_of_bandwidth": share((weights + cached) / seconds, bandwidth),
        }

    with ThreadPoolExecutor(max_workers=len(size.batches)) as threads:
        jobs = [(rows, threads.submit(compiled, rows)) for rows in size.batches]
        for rows, job in jobs:
            report.attempt(
                "decode",
                f"2B, batch {rows}",
                size.seconds["decode"],
                functools.partial(measure, rows, job),
            )


def torch_part(report: Report, size: Size) -> None:
    """Run PyTorch's step; it is imported here, so that the other parts need neither torch nor transformers."""
    try:
        import gpu_torch
    except ImportError as error:
        return report.add("torch", "2B", {"skipped": f"{error.name} is not installed"})
    gpu_torch.train_steps(report, size, packed)


def summary(report: Report) -> str:
    """Say which targets are met; of the repetitions of a kind, the best counts."""

    def best(part: str, key: str, name: str = "") -> float | None:
        values = [
            row[key]
            for row in report.rows
            if row["part"] == part and name in row["name"] and row.get(key) is not None
        ]
        return max(values, default=None)

    ours, theirs = best("train", "rows_per_s", "off"), best("torch", "rows_per_s", "packed")
    memory = [
        row["measured_over_predicted"] for row in report.rows if row.get("measured_over_predicted")
    ]
    off = max((abs(ratio - 1) for ratio in memory), default=None)
    targets = (
        ("MFU, 2B", best("train", "mfu", "off"), ">= 0.45"),
        ("MFU, 8B LoRA", best("lora", "mfu"), ">= 0.50"),
        ("over PyTorch", ours / theirs if ours and theirs else None, ">= 1.3"),
        (
            "decoding at batch 1, share of bandwidth",
            best("decode", "share_of_bandwidth", "batch 1"),
            ">= 0.60",
        ),
        ("memory off its prediction", off, "<= 0.10"),
    )
    lines = ["| target | measured | |", "|---|---|---|"]
    for name, value, bound in targets:
        met = value is not None and (
            value >= float(bound[3:]) if bound[0] == ">" else value <= float(bound[3:])
        )
        lines.append(
            f"| {name} {bound} | {'-' if value is None else f'{value:.3f}'} | {'met' if met else 'not met'} |"
        )
    count = {key: sum(key in row for row in report.rows) for key in ("skipped", "error")}
    return "\n".join(
        [*lines, f"{len(report.rows)} rows, {count['skipped']} skipped, {count['error']} failed"]
    )


def groups(parts: Sequence[str]) -> list[list[str]]:
    """Divide parts into processes: PyTorch and JAX each keep the memory they have taken."""
    divided: list[list[str]] = []
    for part in (part for part in PARTS if part in parts):
        alone = part in ("torch", "lora")
        if not divided or alone or divided[-1][-1] in ("torch", "lora"):
            divided.append([])
        divided[-1].append(part)
    return divided


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_benchmark"))
    parser.add_argument("--budget_seconds", type=float, default=460)
    parser.add_argument(
        "--deadline", type=float, help=argparse.SUPPRESS
    )  # of the process that started this one
    parser.add_argument(
        "--in_process",
        action="store_true",
        help="all parts in this process, with what memory is left",
    )
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    path, deadline = args.out / "gpu.json", args.deadline or time.time() + args.budget_seconds
    if args.deadline is None:
        path.unlink(missing_ok=True)
    divided = groups(args.parts)
    if len(divided) > 1 and not args.in_process:
        for parts in divided:
            command = [
                sys.executable,
                __file__,
                "--parts",
                *parts,
                "--size",
                args.size,
                "--out",
                str(args.out),
                "--deadline",
                str(deadline),
            ]
            try:
                subprocess.run(command, timeout=max(deadline + 5 - time.time(), 1))
            except subprocess.TimeoutExpired:
                print(f"{' '.join(parts)}: cut off at the deadline", flush=True)
        report = Report(path, deadline, {})
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
        facts = {"jax": jax.__version__, "flax": flax.__version__}
        if args.parts != ["torch"]:  # which needs the device for itself
            facts |= {"device": jax.devices()[0].device_kind, "size": args.size}
        report = Report(path, deadline, facts)
        run = {
            "ceilings": ceilings,
            "attention": attention,
            "train": train,
            "torch": torch_part,
            "decode": decode,
            "lora": lora,
        }
        for part in (part for part in PARTS if part in args.parts):
            try:
                run[part](report, SIZES[args.size])
            except Exception as error:  # what a part prepares for all its rows
                report.add(part, "all", {"error": f"{type(error).__name__}: {str(error)[:300]}"})
    if args.deadline is None:
        print(summary(report))
    return int(any("error" in row for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
