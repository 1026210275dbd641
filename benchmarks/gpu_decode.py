"""Prefill and greedy decoding for benchmarks/gpu.py."""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from gpu_shared import (
    Packed,
    Report,
    Size,
    datasheet,
    median_seconds,
    packed,
    random_params,
    share,
)

from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.models.flops import forward_flops
from internvlx_jax.models.generation import (
    Decoding,
    Vocabulary,
    advance,
    for_decoding,
    row_keys,
    start,
)
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.params import abstract_model, unflatten

VOCABULARY = Vocabulary(stop_ids=(), pad_id=2, bos_id=1)
BYTES = 2  # of a bfloat16


class Programs(NamedTuple):
    """Holds the compiled programs of one batch size.

    Attributes:
        inputs: The prompts, on the device.
        rows: The same prompts with their bucket and content.
        begin: Runs the prompts and chooses the first token of each row.
        go: Chooses all tokens after it.
    """

    inputs: Inputs
    rows: Packed
    begin: jax.stages.Compiled
    go: jax.stages.Compiled


def decode(report: Report, size: Size) -> None:
    """Measures prefill and decoding at each batch size."""
    model = random_model(size)
    with ThreadPoolExecutor(max_workers=len(size.batches)) as threads:
        jobs = [(rows, threads.submit(_compiled, size, model, rows)) for rows in size.batches]
        for rows, job in jobs:
            report.attempt(
                "decode",
                f"2B, batch {rows}",
                size.seconds["decode"],
                functools.partial(_measure, size, model, job),
            )


def random_model(size: Size) -> InternVLX:
    """Makes the 2B model with random bfloat16 weights."""
    abstract = abstract_model(size.small("off"), dtype="bfloat16", param_dtype="bfloat16")
    params = unflatten(random_params(abstract.shapes, abstract.inits))
    return for_decoding(nnx.merge(abstract.graphdef, params))


def _compiled(size: Size, model: InternVLX, rows: int) -> Programs:
    def begin(model: InternVLX, inputs: Inputs) -> Decoding:
        return start(
            model,
            inputs,
            row_keys(0, jnp.arange(rows)),
            0,
            max_new_tokens=size.new_tokens,
            sampling=Sampling(),
            vocabulary=VOCABULARY,
        )

    def go(model: InternVLX, state: Decoding) -> Decoding:
        return advance(model, state, size.new_tokens, 0, sampling=Sampling(), vocabulary=VOCABULARY)

    prompts = packed(model.config, [size.prompt], rows)
    inputs = prompts.batch.inputs
    state = jax.eval_shape(begin, model, inputs)
    return Programs(
        jax.device_put(inputs),
        prompts,
        jax.jit(begin).lower(model, inputs).compile(),
        jax.jit(go).lower(model, state).compile(),
    )


def _measure(size: Size, model: InternVLX, job: Future[Programs]) -> dict[str, Any]:
    inputs, prompts, begin, go = job.result()
    rows, length = len(inputs.tokens), prompts.bucket.length
    prefill_seconds = median_seconds(lambda: begin(model, inputs), size.steps)
    state = begin(model, inputs)
    seconds = median_seconds(lambda: go(model, state), size.steps) / (size.new_tokens - 1)
    flops = forward_flops(model.config, **prompts.content)
    read = _bytes_read(model, rows, length + size.new_tokens / 2)
    flop_peak, bandwidth = datasheet()
    return {
        "prefill_ms": 1e3 * prefill_seconds,
        "prefill_tokens_per_s": rows * length / prefill_seconds,
        # The head runs on one token per row.
        "prefill_mfu": share((flops.total - flops.head) / prefill_seconds, flop_peak),
        "decode_ms": 1e3 * seconds,
        "decode_tokens_per_s": rows / seconds,
        "gbytes_per_step": read / 1e9,
        "share_of_bandwidth": share(read / seconds, bandwidth),
    }


def _bytes_read(model: InternVLX, rows: int, slots: float) -> float:
    """Returns what a step has to read: the weights behind the embedding, all keys and values."""
    decoder = model.decoder
    head = decoder.head
    assert head is not None  # the 2B model does not share it with the embedding
    weights = [nnx.state(decoder.layers), nnx.state(decoder.norm), head[...]]
    config = model.config.decoder
    per_slot = 2 * config.layers * config.kv_heads * config.head_dim * BYTES
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) + rows * slots * per_slot
