"""Time and memory of LVTC against many and few visual tokens in all layers, next to the FLOPs that predict them.

    python benchmarks/lvtc.py [--sizes quarter] [--out runs/lvtc_benchmark]

`2b` is InternVL-X 2B; `quarter` has its widths and a quarter of its layers (tower 6, decoder 6, expanded before layer 5),
and fits a small machine. float32 on a CPU, bfloat16 elsewhere. The variants are timed in turn, round after round, so that a
change in the machine's speed meets all of them; the best round counts. A train step is loss and gradients with full
rematerialisation, without the optimiser, whose cost does not depend on the tokens. Peak memory is what XLA reserves for
the compiled step: arguments and temporaries. In prefill the decoder's attention is also timed by itself: its products
count half in the FLOPs (they are causal), its softmax not at all. Prints a table; writes lvtc.json and lvtc.png.
"""

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
from flax import nnx

from internvlx_jax.core.files import write_json
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import DecoderConfig, ModelConfig, ProjectorConfig
from internvlx_jax.core.presets import internvlx_2b, lvtc_preset
from internvlx_jax.data.batch import Batch, Row, collate
from internvlx_jax.data.buckets import smallest_bucket
from internvlx_jax.models.attention import attend
from internvlx_jax.models.flops import Flops, forward_flops
from internvlx_jax.models.generation import prefill
from internvlx_jax.models.params import AbstractModel, abstract_model, init_params, unflatten
from internvlx_jax.training.step import loss_and_grads

VARIANTS = (
    "all-1024",
    "all-256",
    "paper",
    "fast",
)  # the first is what the others are compared with
TILES, TEXT = 1, 64
ROUNDS = {"prefill": 3, "train step": 1}


def model(size: str, variant: str) -> ModelConfig:
    base, expand_layer = internvlx_2b(), 19
    if size == "quarter":
        base, expand_layer = (
            dataclasses.replace(
                base,
                vision=dataclasses.replace(base.vision, layers=6),
                decoder=dataclasses.replace(base.decoder, layers=6, vocab_size=8192),
            ),
            5,
        )
    if variant == "all-1024":
        return dataclasses.replace(base, projector=ProjectorConfig(downsample_ratio=1.0))
    preset = "off" if variant == "all-256" else variant
    return dataclasses.replace(
        base, lvtc=lvtc_preset(preset, token_grid=16, expand_layer=expand_layer, inject_layers=())
    )


def batch_of(config: ModelConfig) -> tuple[Batch, Flops]:
    """One row of TILES tiles and TEXT tokens, filled to the slot, and its forward FLOPs."""
    visual = TILES * config.tokens_per_tile
    length, lvtc = visual + TEXT, config.lvtc
    saved = 0 if lvtc is None else lvtc.saved_per_tile
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, 8000, length).astype(np.int32)
    row = Row(
        tokens,
        tokens,
        np.arange(TILES, dtype=np.int32) * config.tokens_per_tile + 1,
        generator.integers(0, 256, (TILES, 448, 448, 3), np.uint8),
    )
    bucket = dataclasses.replace(
        smallest_bucket(TILES, length, 1), tiles=TILES, short_length=length - TILES * saved
    )
    batch = collate(
        [row], bucket, tile_size=448, tokens_per_tile=config.tokens_per_tile, pad_id=0, lvtc=lvtc
    )
    return batch, forward_flops(
        config, tiles=TILES, lengths=[length], short_lengths=[bucket.short_length]
    )


def run_prefill(graphdef, params, batch):
    return prefill(nnx.merge(graphdef, unflatten(params)), batch.inputs, 1)


def run_gradients(graphdef, params, batch):
    return loss_and_grads(graphdef, params, {}, batch, None)


def attention_seconds(config: ModelConfig, inputs: Inputs, dtype: str) -> float:
    """Of all decoder layers in the forward pass, each on the slots of its frame."""
    layers, shallow = config.decoder.layers, config.lvtc.expand_layer if config.lvtc else 0
    seconds = (layers - shallow) * _attention_layer(config.decoder, inputs.tokens.shape[1], dtype)
    if shallow:
        seconds += shallow * _attention_layer(
            config.decoder, inputs.short.short_to_long.shape[1], dtype
        )
    return seconds


@functools.cache
def _attention_layer(decoder: DecoderConfig, length: int, dtype: str) -> float:
    keys, segments = (1, length, decoder.kv_heads), np.ones((1, length), np.int32)
    k = v = jax.numpy.ones((*keys, decoder.head_dim), dtype)
    q = jax.numpy.ones((*keys, decoder.group, decoder.head_dim), dtype)
    program = (
        jax.jit(functools.partial(attend, q_segments=segments, kv_segments=segments))
        .lower(q, k, v)
        .compile()
    )
    return min(_timed(program, q, k, v) for _ in range(5))


def _timed(program, *args) -> float:
    started = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - started


class Job(NamedTuple):
    variant: str
    what: str
    program: jax.stages.Compiled
    params: dict[str, jax.Array]
    batch: Batch
    flops: float


def compiled(function, abstract: AbstractModel, batch: Batch):
    return (
        jax.jit(functools.partial(function, abstract.graphdef))
        .lower(abstract.shapes, batch)
        .compile()
    )


def measure(size: str, dtype: str) -> list[dict]:
    """One result for each of prefill, gradients and each variant."""
    rows, shared = [], {}
    jobs = []
    for variant in VARIANTS:
        config = model(size, variant)
        abstract = abstract_model(config, dtype=dtype, param_dtype=dtype, remat="full")
        params = init_params(
            config,
            0,
            param_dtype=dtype,
            paths=[
                p for p in abstract.shapes if p not in shared or p.startswith(("projector", "lvtc"))
            ],
        )
        shared |= {
            path: leaf for path, leaf in params.items() if path.startswith(("vision", "decoder"))
        }
        params = {path: params.get(path, shared.get(path)) for path in abstract.shapes}
        batch, flops = batch_of(config)
        # The head computes one slot in prefill and every slot in training; a backward pass costs two forward ones.
        for what, function, predicted in (
            ("prefill", run_prefill, flops.total - flops.head),
            ("train step", run_gradients, 3 * flops.total),
        ):
            jobs.append(
                Job(variant, what, compiled(function, abstract, batch), params, batch, predicted)
            )
    for what, rounds in ROUNDS.items():
        chosen = [job for job in jobs if job.what == what]
        seconds = {job.variant: float("inf") for job in chosen}
        for _ in range(rounds):
            for job in chosen:
                seconds[job.variant] = min(
                    seconds[job.variant], _timed(job.program, job.params, job.batch)
                )
        base = chosen[0]
        for job in chosen:
            memory = job.program.memory_analysis()
            rows.append(
                {
                    "size": size,
                    "step": what,
                    "variant": job.variant,
                    "seconds": seconds[job.variant],
                    "gflops": job.flops / 1e9,
                    "ratio": seconds[job.variant] / seconds[base.variant],
                    "predicted_ratio": job.flops / base.flops,
                    "attention_s": attention_seconds(
                        model(size, job.variant), job.batch.inputs, dtype
                    )
                    if what == "prefill"
                    else None,
                    "peak_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| size | step | variant | seconds | TFLOP | time against all-1024 | FLOPs against all-1024 | difference | "
        "attention, s | peak memory, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['size']} | {row['step']} | {row['variant']} | {row['seconds']:.3f} | "
            f"{row['gflops'] / 1e3:.3f} | {row['ratio']:.3f} | {row['predicted_ratio']:.3f} | "
            f"{row['ratio'] / row['predicted_ratio'] - 1:+.0%} | "
            f"{'' if row['attention_s'] is None else format(row['attention_s'], '.3f')} | {row['peak_gib']:.2f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row["size"], row["step"]) for row in rows))
    figure, axes = pyplot.subplots(
        1,
        len(groups),
        figsize=(3.4 * len(groups), 3.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, group in zip(axes[0], groups):
        chosen = [row for row in rows if (row["size"], row["step"]) == group]
        places = np.arange(len(chosen))
        axis.bar(
            places - 0.2,
            [row["ratio"] for row in chosen],
            0.4,
            label="measured time",
            color="#1f5fbf",
        )
        axis.bar(
            places + 0.2,
            [row["predicted_ratio"] for row in chosen],
            0.4,
            label="FLOPs",
            color="#c3ccda",
        )
        axis.set_xticks(places, [row["variant"] for row in chosen], rotation=30)
        axis.set_title(" ".join(group))
    axes[0][0].set_ylabel("against all-1024")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=["quarter", "2b"],
        default=["quarter"] if on_cpu else ["quarter", "2b"],
    )
    parser.add_argument("--out", type=Path, default=Path("runs/lvtc_benchmark"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in args.sizes:
        rows += measure(size, "float32" if on_cpu else "bfloat16")
        print(table(rows), flush=True)
    device = jax.devices()[0]
    write_json(
        args.out / "lvtc.json",
        {
            "device": device.device_kind,
            "jax": jax.__version__,
            "tiles": TILES,
            "text_tokens": TEXT,
            "rounds": ROUNDS,
            "results": rows,
        },
    )
    draw(rows, args.out / "lvtc.png")
    print(f"wrote {args.out / 'lvtc.json'} and {args.out / 'lvtc.png'}")


if __name__ == "__main__":
    main()
