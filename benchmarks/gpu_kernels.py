"""Ceilings and attention for benchmarks/gpu.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_shared import Report, Size, datasheet, median_seconds, packed, share

from internvlx_jax.core.presets import LvtcPreset
from internvlx_jax.models.attention import Backend, SelfAttention, attend

BACKENDS: dict[str, tuple[Backend, ...]] = {"gpu": ("cudnn", "xla"), "cpu": ("xla",)}
TOLERANCE = 0.03  # of the largest entry: bfloat16 has eight bits
CALLS = 10  # products per timed call, which hide the time of starting one
LAYOUTS: tuple[tuple[str, LvtcPreset, bool], ...] = (
    ("row without LVTC", "off", False),
    ("short layout of fast", "fast", True),
    ("long layout of paper", "paper", False),
)


def ceilings(report: Report, size: Size) -> None:
    """Measures a large copy and a large product, the most that this card gives to any program."""
    flops, bandwidth = datasheet()

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
        seconds = median_seconds(lambda: [multiply(a, b) for _ in range(CALLS)], size.steps)
        rate = 2 * size.product**3 * CALLS / seconds
        return {"tflops": rate / 1e12, "share_of_datasheet": share(rate, flops)}

    report.attempt("ceilings", "copy", size.seconds["ceilings"], copy)
    report.attempt("ceilings", "bfloat16 product", size.seconds["ceilings"], product)


@dataclasses.dataclass(frozen=True)
class Case:
    """Describes one attention problem.

    Attributes:
        name: Of its rows in the report.
        rows, slots: B and S.
        heads, kv_heads, head_dim: N, K and H.
        segments: int32[B, S], 0 = padding; None is attention in both directions without padding.
    """

    name: str
    rows: int
    slots: int
    heads: int
    kv_heads: int
    head_dim: int
    segments: jax.Array | None

    @property
    def causal(self) -> bool:
        """Whether a query sees only the slots before it and its own."""
        return self.segments is not None

    def arrays(self) -> list[jax.Array]:
        """Makes q, k, v and the gradient of the output, bfloat16[B, S, N or K, H]."""
        keys = jax.random.split(jax.random.key(0), 4)
        counts = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [
            jax.random.normal(key, (self.rows, self.slots, count, self.head_dim), jnp.bfloat16)
            for key, count in zip(keys, counts, strict=True)
        ]


def cases(size: Size) -> list[Case]:
    """Returns the decoder's problem in three layouts of a packed row, and the tower's."""
    decoder, vision = size.small("off").decoder, size.small("off").vision
    found = []
    for name, lvtc, short in LAYOUTS:
        inputs = packed(size.small(lvtc), size.segments, 1).batch.inputs
        segments = np.asarray(inputs.segment_ids)
        if short:
            assert inputs.short is not None
            segments = np.take_along_axis(segments, inputs.short.short_to_long, axis=1)
        segments = segments.copy()
        segments[:, -segments.shape[1] // 20 :] = 0  # 5 % padding
        heads = (decoder.heads, decoder.kv_heads, decoder.head_dim)
        rows, slots = segments.shape
        found.append(Case(name, rows, slots, *heads, jnp.asarray(segments)))
    tiles, slots = sum(tiles for tiles, _ in size.segments), vision.grid**2 + 1
    heads = (vision.heads, vision.heads, vision.head_dim)
    return [*found, Case("seven tiles", tiles, slots, *heads, None)]


def attention(report: Report, size: Size) -> None:
    """Compares each backend with `attend` in float32 on the same bfloat16 arrays."""
    backends = BACKENDS[jax.default_backend()]
    with ThreadPoolExecutor() as threads:
        jobs = []
        for case in cases(size):
            reference = threads.submit(_reference, case)
            jobs += [
                (case, reference, backend, threads.submit(_compiled, case, backend))
                for backend in backends
            ]
        for case, reference, backend, program in jobs:
            report.attempt(
                "attention",
                f"{case.name}, {backend}",
                size.seconds["attention"],
                functools.partial(_measure, case, reference, program, size.steps),
            )


def _with_gradients(
    compute: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns the output and the gradients of q, k and v."""
    out, back = jax.vjp(compute, q, k, v)
    return out, *back(do)


def _reference(case: Case) -> jax.stages.Compiled:
    """Compiles output and gradients of the plain formula in float32."""
    plain = functools.partial(
        attend,
        q_segments=case.segments,
        kv_segments=case.segments,
        q_start=0 if case.causal else None,
    )

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return _with_gradients(plain, *(x.astype(jnp.float32) for x in arrays))

    with jax.default_matmul_precision("highest"):
        return jax.jit(run).lower(*case.arrays()).compile()


def _compiled(case: Case, backend: Backend) -> jax.stages.Compiled:
    compute = functools.partial(SelfAttention(backend), segments=case.segments, causal=case.causal)
    return jax.jit(functools.partial(_with_gradients, compute)).lower(*case.arrays()).compile()


def _measure(
    case: Case,
    reference: Future[jax.stages.Compiled],
    compiling: Future[jax.stages.Compiled],
    steps: int,
) -> dict[str, Any]:
    arrays, program = case.arrays(), compiling.result()
    memory = program.memory_analysis()
    assert memory is not None  # both platforms tell
    errors = [
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(program(*arrays), reference.result()(*arrays), strict=True)
    ]
    return {
        "shape": f"[{case.rows}, {case.slots}, {case.heads}/{case.kv_heads}, {case.head_dim}]",
        **dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)),
        "within_tolerance": max(errors) <= TOLERANCE,
        "ms": 1e3 * median_seconds(lambda: program(*arrays), steps),
        "temporaries_mib": memory.temp_size_in_bytes / 2**20,
    }
