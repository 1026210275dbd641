"""Measures generation against the limits of this machine.

    python benchmarks/generate.py [--layers 6] [--prompt 384] [--new_tokens 16] [--profile DIR]

Decoder and vocabulary have the widths of the 2B model, random weights in float32, and as many
layers as fit into a few gigabytes; more layers change both sides of each ratio alike. All numbers
come from this one run. Limits: decoding one token at batch 1 takes at most 1.5 times one pass over
the weights that it reads, and prefill at most 1.3 times its matrix products alone. Prints one JSON
object; the exit status is 1 if a limit is missed.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.presets import internvlx_2b
from internvlx_jax.models.generation import (
    Decoding,
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
VOCABULARY = Vocabulary(stop_ids=(), pad_id=2, bos_id=1)


def random_model(layers: int) -> InternVLX:
    """Makes a model of 2B widths with fewer layers; text prompts never run its one-layer tower."""
    base = internvlx_2b()
    vision = dataclasses.replace(base.vision, layers=1)
    decoder = dataclasses.replace(base.decoder, layers=layers)
    config: ModelConfig = dataclasses.replace(base, vision=vision, decoder=decoder)
    return jax.jit(lambda: InternVLX(config, rngs=nnx.Rngs(0)))()


def prompt(length: int, words: int) -> Inputs:
    """Makes one random text prompt of `length` ids below `words`."""
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
    """Returns what one decoded token reads, except for its row of the embedding."""
    head = model.decoder.head
    assert head is not None  # the 2B model does not share it with the embedding
    return jax.tree.leaves(
        [nnx.state(model.decoder.layers), nnx.state(model.decoder.norm), head[...]]
    )


def layer_kernels(model: InternVLX) -> list[jax.Array]:
    """Returns the kernels of all decoder layers."""
    return [leaf for leaf in jax.tree.leaves(nnx.state(model.decoder.layers)) if leaf.ndim > 1]


def matrix_products(model: InternVLX, length: int) -> Callable[[], list[jax.Array]]:
    """Returns a function that computes the products of all layers with nothing between them."""
    kernels = [
        leaf.reshape(leaf.shape[0], -1)
        if leaf.shape[0] in (model.config.decoder.width, model.config.decoder.mlp_width)
        else leaf.reshape(-1, leaf.shape[-1])
        for leaf in layer_kernels(model)
    ]
    inputs = {rows: jnp.ones((length, rows)) for rows in {kernel.shape[0] for kernel in kernels}}
    products = jax.jit(
        lambda inputs, kernels: [inputs[kernel.shape[0]] @ kernel for kernel in kernels]
    )
    return functools.partial(products, inputs, kernels)


def seconds(run: Callable[..., Any], *args: Any) -> float:
    """Times a call and everything that it starts."""
    begun = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - begun


def measure(
    model: InternVLX, length: int, new_tokens: int, repeats: int, profile: str | None
) -> dict[str, float]:
    """Times prefill, decoding, and what bounds them.

    Args:
        model: The model.
        length: Tokens of the prompt.
        new_tokens: Tokens decoded in one call.
        repeats: How often each is timed; the best time counts.
        profile: Folder for a trace of the decoding, if any.

    Returns:
        Seconds of one pass over the weights (`pass`), of one token within a call (`decode`) and in
        a call of its own (`step`), of the prompt (`prefill`), and of its matrix products alone.
    """

    def begin(model: InternVLX, inputs: Inputs) -> Decoding:
        return start(
            model,
            inputs,
            row_keys(0, jnp.arange(1)),
            0,
            max_new_tokens=new_tokens,
            sampling=Sampling(),
            vocabulary=VOCABULARY,
        )

    def decode(model: InternVLX, state: Decoding) -> Decoding:
        return advance(model, state, new_tokens, 0, sampling=Sampling(), vocabulary=VOCABULARY)

    inputs, weights = prompt(length, model.config.decoder.vocab_size), read_weights(model)
    state, go = jax.jit(begin)(model, inputs), jax.jit(decode)
    one_pass = jax.jit(lambda weights: [jnp.sum(leaf) for leaf in weights])
    step, products = jax.jit(decode_step), matrix_products(model, length)
    prefilled = jax.jit(lambda model, inputs: prefill(model, inputs, new_tokens)[1])
    # Interleaved, so that a change in the speed of the machine affects all of them.
    rounds = [
        {
            "pass": seconds(one_pass, weights),
            "decode": seconds(go, model, state) / (new_tokens - 1),
            "step": seconds(step, model, state.cache, state.last),
            "prefill": seconds(prefilled, model, inputs),
            "products": seconds(products),
        }
        for _ in range(repeats + 1)
    ]
    if profile:
        with jax.profiler.trace(profile):
            jax.block_until_ready(go(model, state))
    timed = rounds[1:]  # the first round compiles
    return {name: min(times[name] for times in timed) for name in timed[0]}


def main() -> int:
    """Runs the command.

    Returns:
        Exit status, 1 if a limit is missed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", help="folder for a trace of a few decoding steps")
    args = parser.parse_args()

    model = for_decoding(random_model(args.layers))
    best = measure(model, args.prompt, args.new_tokens, args.repeats, args.profile)
    gbytes = sum(leaf.nbytes for leaf in read_weights(model)) / 1e9
    flops = 2 * args.prompt * sum(kernel.size for kernel in layer_kernels(model))
    decode_over_pass = best["decode"] / best["pass"]
    prefill_over_products = best["prefill"] / best["products"]
    result = {
        "layers": args.layers,
        "prompt": args.prompt,
        "weights_gbytes": round(gbytes, 2),
        "pass_gbytes_per_s": round(gbytes / best["pass"], 2),
        "decode_seconds_per_token": round(best["decode"], 4),
        "decode_over_pass": round(decode_over_pass, 2),
        "decode_limit": DECODE_LIMIT,
        "one_step_over_pass": round(best["step"] / best["pass"], 2),
        "prefill_seconds": round(best["prefill"], 3),
        "prefill_gflops_per_s": round(flops / best["prefill"] / 1e9),
        "products_gflops_per_s": round(flops / best["products"] / 1e9),
        "prefill_over_products": round(prefill_over_products, 2),
        "prefill_limit": PREFILL_LIMIT,
    }
    print(json.dumps(result, indent=2))
    return int(decode_over_pass > DECODE_LIMIT or prefill_over_products > PREFILL_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
