"""Generation against the limits of this machine.

    python benchmarks/generate.py [--layers 6] [--prompt 384] [--new_tokens 16] [--profile DIR]

Decoder and vocabulary have the widths of the 2B model, random weights in float32, and as many
layers as fit into a few gigabytes; more layers change both sides of each ratio alike. All numbers
come from one run. Limits: decoding one token at batch 1 takes at most 1.5 times as long as one pass
over the weights that it reads; prefill takes at most 1.3 times as long as its matrix products
alone. The command prints one JSON object; its exit status is 1 if a limit is missed.
"""

import argparse
import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.models.generation import (
    Sampling,
    Vocabulary,
    advance,
    decode_step,
    for_decoding,
    prefill,
    row_keys,
    start,
)
from internvlx_jax.models.internvlx import InternVLX

DECODE_LIMIT, PREFILL_LIMIT = 1.5, 1.3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", help="folder for a trace of a few decoding steps")
    args = parser.parse_args()

    model = for_decoding(random_model(args.layers))
    inputs = prompt(args.prompt, model.config.decoder.vocab_size)
    weights = read_weights(model)
    options = dict(sampling=Sampling(), vocabulary=Vocabulary(stop_ids=(), pad_id=2, bos_id=1))
    begin = jax.jit(
        lambda model, inputs: start(
            model, inputs, row_keys(0, [0]), 0, max_new_tokens=args.new_tokens, **options
        )
    )
    go = jax.jit(lambda model, state: advance(model, state, args.new_tokens, 0, **options))
    state = begin(model, inputs)

    one_pass = jax.jit(lambda weights: [jnp.sum(leaf) for leaf in weights])
    step = jax.jit(decode_step)
    products = matrix_products(model, args.prompt)
    prefilled = jax.jit(lambda model, inputs: prefill(model, inputs, args.new_tokens)[1])
    # Interleaved, so that a change in the speed of the machine affects all of them.
    times = {"pass": [], "decode": [], "step": [], "prefill": [], "products": []}
    for _ in range(args.repeats + 1):
        times["pass"].append(seconds(one_pass, weights))
        times["decode"].append(seconds(go, model, state) / (args.new_tokens - 1))
        times["step"].append(seconds(step, model, state.cache, state.last))
        times["prefill"].append(seconds(prefilled, model, inputs))
        times["products"].append(seconds(*products))
    best = {name: min(values[1:]) for name, values in times.items()}  # the first ones compile
    if args.profile:
        with jax.profiler.trace(args.profile):
            jax.block_until_ready(go(model, state))

    gbytes = sum(leaf.nbytes for leaf in weights) / 1e9
    kernels = [leaf for leaf in jax.tree.leaves(nnx.state(model.decoder.layers)) if leaf.ndim > 1]
    flops = 2 * args.prompt * sum(kernel.size for kernel in kernels)
    result = {
        "layers": args.layers,
        "prompt": args.prompt,
        "weights_gbytes": round(gbytes, 2),
        "pass_gbytes_per_s": round(gbytes / best["pass"], 2),
        "decode_seconds_per_token": round(best["decode"], 4),
        "decode_over_pass": round(best["decode"] / best["pass"], 2),
        "decode_limit": DECODE_LIMIT,
        "one_step_over_pass": round(best["step"] / best["pass"], 2),
        "prefill_seconds": round(best["prefill"], 3),
        "prefill_gflops_per_s": round(flops / best["prefill"] / 1e9),
        "products_gflops_per_s": round(flops / best["products"] / 1e9),
        "prefill_over_products": round(best["prefill"] / best["products"], 2),
        "prefill_limit": PREFILL_LIMIT,
    }
    print(json.dumps(result, indent=2))
    fast = (
        result["decode_over_pass"] <= DECODE_LIMIT
        and result["prefill_over_products"] <= PREFILL_LIMIT
    )
    return 0 if fast else 1


def random_model(layers: int) -> InternVLX:
    """Returns a 2B model with fewer layers; its tower has one, because text prompts skip it."""
    base = internvlx_2b()
    vision = dataclasses.replace(base.vision, layers=1)
    decoder = dataclasses.replace(base.decoder, layers=layers)
    config: ModelConfig = dataclasses.replace(base, vision=vision, decoder=decoder)
    return jax.jit(lambda: InternVLX(config, rngs=nnx.Rngs(0)))()


def prompt(length: int, words: int) -> Inputs:
    """Returns a random prompt of one row."""
    tokens = np.random.default_rng(0).integers(3, words, (1, length)).astype(np.int32)
    positions = np.arange(length, dtype=np.int32)[None]
    return Inputs(
        tokens,
        positions,
        np.ones_like(tokens),
        np.zeros((1, 0, 448, 448, 3), np.uint8),
        np.zeros_like(tokens),
    )


def read_weights(model: InternVLX) -> list[jax.Array]:
    """Returns what one token reads: all layers, the norm and the head, but not the embedding."""
    return jax.tree.leaves(
        [nnx.state(model.decoder.layers), nnx.state(model.decoder.norm), model.decoder.head[...]]
    )


def matrix_products(model: InternVLX, length: int):
    """Returns a function and its arguments: the matrix products of all layers alone."""
    kernels = [
        leaf.reshape(leaf.shape[0], -1)
        if leaf.shape[0] in (model.config.decoder.width, model.config.decoder.mlp_width)
        else leaf.reshape(-1, leaf.shape[-1])
        for leaf in jax.tree.leaves(nnx.state(model.decoder.layers))
        if leaf.ndim > 1
    ]
    inputs = {rows: jnp.ones((length, rows)) for rows in {kernel.shape[0] for kernel in kernels}}
    return (
        jax.jit(lambda inputs, kernels: [inputs[kernel.shape[0]] @ kernel for kernel in kernels]),
        inputs,
        kernels,
    )


def seconds(function, *args) -> float:
    """Returns the duration of one call."""
    begun = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
