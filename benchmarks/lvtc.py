"""Measures time and memory of LVTC against many and few visual tokens in all layers.

    python benchmarks/lvtc.py [--sizes quarter] [--out runs/lvtc_benchmark]

Prints a table with the FLOPs that predict the times; writes lvtc.json and lvtc.png.

* `2b` is InternVL-X 2B. `quarter` has its widths and a quarter of its layers (tower 6, decoder 6,
  expanded before layer 5), and fits a small machine; `toy` is narrow, for tests. It is float32 on a
  CPU, bfloat16 elsewhere.
* The variants are timed in turn, round after round, so that a change in the machine's speed meets
  all of them; the best round counts.
* A train step is loss and gradients with full rematerialization, without the optimizer, whose cost
  does not depend on the tokens.
* On a CPU times are processor seconds of all threads.
* The tower costs the same in every variant and more than its FLOPs say; it is timed by itself, its
  share is a column, and the last comparison is without it.
* Peak memory is what XLA reserves for the compiled step: arguments and temporaries.
* In prefill the decoder's attention is also timed by itself. Its products count half in the FLOPs,
  because they are causal, and its softmax not at all.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from flax import nnx

from internvlx_jax.core.files import write_json
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import DecoderConfig, ModelConfig, ProjectorConfig
from internvlx_jax.core.presets import LvtcPreset, internvlx_2b, lvtc_preset
from internvlx_jax.data.batch import Batch, Row, collate
from internvlx_jax.data.buckets import smallest_bucket
from internvlx_jax.models.attention import attend
from internvlx_jax.models.flops import Flops, forward_flops
from internvlx_jax.models.generation import prefill
from internvlx_jax.models.params import (
    AbstractModel,
    Params,
    abstract_model,
    init_params,
    unflatten,
)
from internvlx_jax.training.step import loss_and_grads

VARIANTS = ("all-1024", "all-256", "paper", "fast")  # the others are compared with the first
PRESETS: dict[str, LvtcPreset] = {"all-256": "off", "paper": "paper", "fast": "fast"}
TILES, TEXT = 1, 64
ROUNDS = {"prefill": 5, "train step": 2}


def model(size: str, variant: str) -> ModelConfig:
    """Returns the model of a size, with the visual tokens of a variant."""
    base, expand_layer = internvlx_2b(), 19
    if size != "2b":
        base = dataclasses.replace(
            base,
            vision=dataclasses.replace(base.vision, layers=6),
            decoder=dataclasses.replace(base.decoder, layers=6, vocab_size=8192),
        )
        expand_layer = 5
    if size == "toy":
        narrow = {"width": 32, "heads": 2, "mlp_width": 32}
        base = dataclasses.replace(
            base,
            vision=dataclasses.replace(base.vision, **narrow),
            decoder=dataclasses.replace(base.decoder, **narrow, kv_heads=1, head_dim=16),
        )
    if variant == "all-1024":
        return dataclasses.replace(base, projector=ProjectorConfig(downsample_ratio=1.0))
    lvtc = lvtc_preset(PRESETS[variant], token_grid=16, expand_layer=expand_layer, inject_layers=())
    return dataclasses.replace(base, lvtc=lvtc)


def batch_of(config: ModelConfig) -> tuple[Batch, Flops]:
    """Makes one row of TILES tiles and TEXT tokens without padding, and counts its FLOPs."""
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


def run_prefill(graphdef: nnx.GraphDef, params: Params, batch: Batch) -> Any:
    """Runs the prompts of a batch."""
    return prefill(nnx.merge(graphdef, unflatten(params)), batch.inputs, 1)


def run_tower(graphdef: nnx.GraphDef, params: Params, batch: Batch) -> Any:
    """Runs the tower alone, on the tiles of a batch."""
    model = nnx.merge(graphdef, unflatten(params))
    return model.features(batch.inputs.tiles[0])


def run_tower_gradients(graphdef: nnx.GraphDef, params: Params, batch: Batch) -> Any:
    """Computes gradients of the tower's parameters, of the mean of its output."""

    def mean(vision: Params) -> Any:
        return jax.numpy.mean(run_tower(graphdef, params | vision, batch))

    return jax.value_and_grad(mean)(
        {path: leaf for path, leaf in params.items() if path.startswith("vision.")}
    )


def run_gradients(graphdef: nnx.GraphDef, params: Params, batch: Batch) -> Any:
    """Computes loss and gradients of all parameters."""
    return loss_and_grads(graphdef, params, {}, batch, None)


def attention_seconds(config: ModelConfig, inputs: Inputs, dtype: str) -> float:
    """Times attention of all decoder layers, each on the slots of its layout."""
    layers, shallow = config.decoder.layers, config.lvtc.expand_layer if config.lvtc else 0
    seconds = (layers - shallow) * _attention_layer(config.decoder, inputs.tokens.shape[1], dtype)
    if inputs.short is not None:
        short = inputs.short.short_to_long.shape[1]
        seconds += shallow * _attention_layer(config.decoder, short, dtype)
    return seconds


@functools.cache
def _attention_layer(decoder: DecoderConfig, length: int, dtype: str) -> float:
    segments = jax.numpy.ones((1, length), "int32")
    k = v = jax.numpy.ones((1, length, decoder.kv_heads, decoder.head_dim), dtype)
    q = jax.numpy.ones((1, length, decoder.heads, decoder.head_dim), dtype)
    one = {"q_segments": segments, "kv_segments": segments, "q_start": 0}
    program = jax.jit(functools.partial(attend, **one)).lower(q, k, v).compile()
    return min(_timed(program, q, k, v) for _ in range(5))


def _timed(program: Callable[..., Any], *args: Any) -> float:
    # Other programs of a shared machine hardly change the processor time of this one.
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    started = clock()
    jax.block_until_ready(program(*args))
    return clock() - started


class Job(NamedTuple):
    """Holds a compiled step and its arguments.

    Attributes:
        variant, step: Of its row in the table.
        attention_s: Seconds of the decoder's attention, measured for prefill only.
        flops, tower_flops: Predicted, of the step and of its tower.
    """

    variant: str
    step: str
    attention_s: float | None
    program: jax.stages.Compiled
    params: dict[str, jax.Array]
    batch: Batch
    flops: float
    tower_flops: float


def compiled(
    function: Callable[..., Any], abstract: AbstractModel, batch: Batch
) -> jax.stages.Compiled:
    """Compiles a step of a model for the shapes of a batch."""
    step = jax.jit(functools.partial(function, abstract.graphdef))
    return step.lower(abstract.shapes, batch).compile()


def jobs(size: str, dtype: str) -> list[Job]:
    """Compiles both steps of each variant; variants share tower and decoder.

    The first two jobs are the tower's, which all variants share.
    """
    made: list[Job] = []
    shared: dict[str, jax.Array] = {}
    for variant in VARIANTS:
        config = model(size, variant)
        abstract = abstract_model(config, dtype=dtype, param_dtype=dtype, remat="full")
        own = [
            path
            for path in abstract.shapes
            if path not in shared or path.startswith(("projector", "lvtc"))
        ]
        params = init_params(config, 0, param_dtype=dtype, paths=own)
        shared |= {
            path: leaf for path, leaf in params.items() if path.startswith(("vision", "decoder"))
        }
        params = {path: params.get(path, shared.get(path)) for path in abstract.shapes}
        batch, flops = batch_of(config)
        if not made:
            towers = {"prefill": (run_tower, 1), "train step": (run_tower_gradients, 3)}
            for step, (function, passes) in towers.items():
                program, work = compiled(function, abstract, batch), passes * flops.tower
                made.append(Job("tower", step, None, program, params, batch, work, work))
        attention = attention_seconds(config, batch.inputs, dtype)
        prefill_step = compiled(run_prefill, abstract, batch)
        train_step = compiled(run_gradients, abstract, batch)
        # The head computes one slot in prefill and every slot in training; a backward pass costs
        # two forward ones.
        made += [
            Job(
                variant,
                "prefill",
                attention,
                prefill_step,
                params,
                batch,
                flops.total - flops.head,
                flops.tower,
            ),
            Job(
                variant,
                "train step",
                None,
                train_step,
                params,
                batch,
                3 * flops.total,
                3 * flops.tower,
            ),
        ]
    return made


def measure(size: str, dtype: str) -> list[dict[str, Any]]:
    """Returns one row for each step and variant."""
    rows, made = [], jobs(size, dtype)
    for step, rounds in ROUNDS.items():
        chosen = [job for job in made if job.step == step]
        times = [
            [_timed(job.program, job.params, job.batch) for job in chosen] for _ in range(rounds)
        ]
        of_tower, *best = [min(taken) for taken in zip(*times, strict=True)]
        first = chosen[1]
        for job, seconds in zip(chosen[1:], best, strict=True):
            memory = job.program.memory_analysis()
            assert memory is not None  # CPU, GPU and TPU tell
            work = (job.flops - job.tower_flops) / (first.flops - first.tower_flops)
            rows.append(
                {
                    "size": size,
                    "step": step,
                    "variant": job.variant,
                    "seconds": seconds,
                    "gflops": job.flops / 1e9,
                    "ratio": seconds / best[0],
                    "predicted_ratio": job.flops / first.flops,
                    "tower_s": of_tower,
                    "rest_ratio": (seconds - of_tower) / (best[0] - of_tower),
                    "predicted_rest_ratio": work,
                    "attention_s": job.attention_s,
                    "peak_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| size | step | variant | seconds | tower | TFLOP | time against all-1024 | FLOPs | "
        "both without the tower | difference | attention, s | peak memory, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        attention = "" if row["attention_s"] is None else f"{row['attention_s']:.3f}"
        rest, work = row["rest_ratio"], row["predicted_rest_ratio"]
        cells = (
            row["size"],
            row["step"],
            row["variant"],
            f"{row['seconds']:.3f}",
            f"{row['tower_s'] / row['seconds']:.0%}",
            f"{row['gflops'] / 1e3:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['predicted_ratio']:.3f}",
            f"{rest:.3f}, {work:.3f}",
            f"{rest / work - 1:+.0%}",
            attention,
            f"{row['peak_gib']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws measured and predicted ratios side by side."""
    matplotlib.use("Agg")
    from matplotlib import pyplot  # after the choice of the backend

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
        for shift, key, label, color in (
            (-0.2, "ratio", "measured time", "#1f5fbf"),
            (0.2, "predicted_ratio", "FLOPs", "#c3ccda"),
        ):
            axis.bar(places + shift, [row[key] for row in chosen], 0.4, label=label, color=color)
        axis.set_xticks(places, [row["variant"] for row in chosen], rotation=30)
        axis.set_title(" ".join(group))
    axes[0][0].set_ylabel("against all-1024")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=["toy", "quarter", "2b"],
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
