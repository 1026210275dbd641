"""Attention of tower and decoder, by the fastest way of the platform (design: model.md 3, 8).

Whole sequences that attend to themselves (training, prefill, tiles) go through `SelfAttention`,
which chooses among backends. One decoding step against a cache is `attend_cached`; `attend` is the
plain formula, that of the `xla` backend.

| backend | where | what |
|---|---|---|
| xla | everywhere | `attend`, in chunks of queries when sequences are long |
| splash | TPU | the Pallas kernel, see models/splash.py |
| splash_interpret | everywhere, slowly | the same kernel, emulated |
| cudnn | NVIDIA GPU, 16-bit activations | `jax.nn.dot_product_attention` |
| auto | | splash on TPU; cudnn on NVIDIA where it applies, see `cudnn_problem`; else xla |
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.models.layers import ATTENTION_OUTPUT
from internvlx_jax.models.packed_cudnn import packed_attention, packs_sequences
from internvlx_jax.models.splash import PADDING, splash_attention

Backend = Literal["auto", "xla", "splash", "splash_interpret", "cudnn"]
NVIDIA = ("gpu", "cuda")  # what JAX calls the platform of such devices
CHUNK = 512  # queries whose scores exist at a time in the xla backend, at most
# Parts of a causal sequence in the xla backend. Each leaves out the keys behind its own, which
# saves 3/8 of the work; each is also compiled by itself.
CAUSAL_PARTS = 4


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    q_start: jax.Array | int | None = None,
    window: int | None = None,
) -> jax.Array:
    """Attends within equal segments, and causally by slot.

    Scores and softmax are in float32: the weights of thousands of keys, each rounded to bfloat16,
    would not add up to one. Causality follows slots, not positions, since packed rows restart
    positions in each segment.

    Args:
        q: [B, S, N, H].
        k, v: [B, Z, K, H]; query head n belongs to key head n // (N / K).
        q_segments, kv_segments: int32[B, S] and int32[B, Z]. 0 marks padding, which sees padding
            only and so stays finite. None is one segment.
        q_start: Slot of the first query among the keys, a traced scalar while decoding. None is
            not causal.
        window: Slots that a causal query sees, its own included. None is all before it.

    Returns:
        [B, S, N, H].
    """
    q, k, v = _by_head(q, k.shape[2]), _by_key_head(k), _by_key_head(v)
    out = _attend(q, k, v, q_segments, kv_segments, q_start, window)
    return rearrange(out, "b k j s h -> b s (k j) h")


def _by_head(q: jax.Array, key_heads: int) -> jax.Array:
    """[B, S, N, H] -> [B, K, J, S, H]: products of whole rows, which a CPU computes faster."""
    return rearrange(q, "b s (k j) h -> b k j s h", k=key_heads)


def _by_key_head(k: jax.Array) -> jax.Array:
    """[B, Z, K, H] -> [B, K, Z, H]."""
    return rearrange(k, "b z k h -> b k z h")


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    q_start: jax.Array | int | None,
    window: int | None,
) -> jax.Array:
    """As `attend`, of [B, K, J, S, H] and [B, K, Z, H]; returns [B, K, J, S, H]."""
    scores = jnp.einsum("bkjsh,bkzh->bkjsz", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    visible: jax.Array | bool = True
    if q_start is not None:
        slots, key_slots = (q_start + jnp.arange(q.shape[3]))[:, None], jnp.arange(k.shape[2])
        visible = key_slots <= slots  # [S, Z]
        if window is not None:
            visible &= key_slots > slots - window
    if q_segments is not None and kv_segments is not None:
        visible &= (
            q_segments[:, None, None, :, None] == kv_segments[:, None, None, None, :]
        )  # [B, 1, 1, S, Z]
    if visible is not True:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    # Divided by the sum behind the product, where there are H numbers per query and not Z.
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    out = jnp.einsum(
        "bkjsz,bkzh->bkjsh", weights.astype(q.dtype), v, preferred_element_type=jnp.float32
    )
    return (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)


def attend_cached(
    q: jax.Array,
    cached: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array],
    *,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    start: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Attends to a cache and to slots that are not in it yet.

    The two have scores of their own under one softmax. Writing the new slots first would copy the
    cache of a layer in every step.

    Args:
        q: [B, S, N, H].
        cached: Keys and values [B, Z, K, H], of which those from `start` on are not read.
        new: Keys and values [B, S, K, H] of the queries' own slots.
        q_segments: int32[B, S].
        kv_segments: int32[B, Z].
        start: Slot of the first query, an int32 scalar; or int32[B], that of each row.
        window: Slots that a query sees, its own included. None is all before it.

    Returns:
        [B, S, N, H].
    """
    (old_k, old_v), (new_k, new_v) = cached, new
    slots = jnp.arange(q.shape[1])[:, None]
    key_slots = jnp.arange(old_k.shape[1])
    start = start.reshape(-1, 1, 1)
    before, own = key_slots < start, jnp.arange(q.shape[1]) <= slots
    if window is not None:
        before = before & (key_slots > start + slots - window)
        own = own & (jnp.arange(q.shape[1]) > slots - window)
    visible = jnp.concatenate(
        [
            before & (q_segments[:, :, None] == kv_segments[:, None]),
            own & (q_segments[:, :, None] == q_segments[:, None]),
        ],
        axis=-1,
    )  # [B, S, Z + S]
    q = rearrange(q, "b s (k j) h -> b s k j h", k=old_k.shape[2])
    scores = [
        jnp.einsum("bskjh,bzkh->bkjsz", q, k, preferred_element_type=jnp.float32)
        for k in (old_k, new_k)
    ]
    scores = jnp.concatenate(scores, axis=-1) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    of_old, of_new = (
        jnp.einsum("bkjsz,bzkh->bskjh", part, v, preferred_element_type=jnp.float32)
        for part, v in zip(
            jnp.split(weights, [old_k.shape[1]], axis=-1), (old_v, new_v), strict=True
        )
    )
    return rearrange((of_old + of_new).astype(q.dtype), "b s k j h -> b s (k j) h")


def xla_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    *,
    causal: bool,
    window: int | None = None,
) -> jax.Array:
    """Attends a sequence to itself by `attend`; arguments are those of `SelfAttention`.

    The scores of a long sequence exist for one chunk of queries at a time, in the backward pass
    too, which computes them again. A causal sequence is divided into parts besides, whose queries
    are not compared with the keys behind them.
    """
    length = q.shape[1]
    chunks = -(-length // CHUNK)
    if chunks == 1:
        return attend(
            q,
            k,
            v,
            q_segments=segments,
            kv_segments=segments,
            q_start=0 if causal else None,
            window=window,
        )
    if causal:
        chunks *= 2  # shorter ones leave the cache of a CPU less often, and leave out more keys
    size = -(-length // chunks)
    padding = (0, chunks * size - length)  # queries behind the end are dropped later
    heads = k.shape[2]
    q = jnp.pad(q, ((0, 0), padding, (0, 0), (0, 0)))
    q = rearrange(q, "b (c s) (k j) h -> c b k j s h", c=chunks, k=heads)
    k, v = _by_key_head(k), _by_key_head(v)
    q_segments = None
    if segments is not None:
        q_segments = jnp.pad(segments, ((0, 0), padding))
        q_segments = rearrange(q_segments, "b (c s) -> c b s", c=chunks)

    def part(first: int, last: int) -> jax.Array:
        """Computes the chunks first..last-1, with the keys that they see."""
        end = min(size * last, length) if causal else length
        of_part = None if segments is None else segments[:, :end]

        @jax.checkpoint
        def body(_, chunk):
            q, q_segments, start = chunk
            return None, _attend(
                q,
                k[:, :, :end],
                v[:, :, :end],
                q_segments,
                of_part,
                start if causal else None,
                window,
            )

        numbers = jnp.arange(first, last)
        of_chunks = jax.tree.map(lambda x: x[first:last], (q, q_segments))
        return jax.lax.scan(body, None, (*of_chunks, size * numbers))[1]

    parts = min(chunks, CAUSAL_PARTS) if causal else 1
    bounds = [chunks * i // parts for i in range(parts + 1)]
    out = jnp.concatenate([part(*pair) for pair in itertools.pairwise(bounds)])
    return rearrange(out, "c b k j s h -> b (c s) (k j) h")[:, :length]


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    *,
    causal: bool,
    window: int | None = None,
) -> jax.Array:
    """Attends a sequence to itself by cuDNN; arguments are those of `SelfAttention`.

    Causal segments are packed sequences where cuDNN can do that, see models/packed_cudnn.py. Else
    segments, and a window, become a mask bool[B, 1, S, S] for all heads, whose hidden parts are
    computed all the same.
    """
    if segments is None or not causal or window is not None or not packs_sequences():
        out = _masked_cudnn(q, k, v, segments, causal=causal, window=window)
    else:
        out = packed_attention(q, k, v, segments, functools.partial(_masked_cudnn, causal=True))
    return checkpoint_name(out, ATTENTION_OUTPUT)


def _masked_cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    *,
    causal: bool,
    window: int | None = None,
) -> jax.Array:
    if segments is None and window is not None:
        segments = jnp.ones(q.shape[:2], jnp.int32)
    length = q.shape[1]
    odd = length % 2  # JAX refuses the backward pass of odd lengths
    mask = lengths = None
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, odd)), constant_values=PADDING)
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
        if window is not None:
            slots = jnp.arange(q.shape[1])
            mask &= slots > slots[:, None] - window
    elif odd:
        lengths = jnp.full(q.shape[:1], length, jnp.int32)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )[:, :length]


def cudnn_problem(dtype: DTypeLike, head_dim: int) -> str | None:
    """Says why cuDNN cannot compute attention here, or returns None."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return (
            f"activations are {jnp.dtype(dtype).name}, it takes bfloat16 or float16; "
            "set compute.dtype=bfloat16"
        )
    if head_dim % 8 or head_dim > 128:
        return f"head_dim is {head_dim}, it takes multiples of 8 up to 128; set it to auto or xla"
    if not _cudnn_is_installed():
        return "cuDNN is not installed; install jax[cuda13], or set it to auto or xla"
    return None


@functools.cache
def _cudnn_is_installed() -> bool:
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(cudnn_attention, segments=None, causal=True), x, x, x)
    except RuntimeError:  # what JAX raises when its CUDA plugin or the library is missing
        return False
    return True


@dataclasses.dataclass(frozen=True)
class SelfAttention:
    """Attends whole sequences to themselves.

    Attributes:
        backend: See the table of this module.
        rows: Sharding of segments [B, S] on a mesh; None outside one.
        heads: Sharding of queries, keys and values [B, S, heads, head dim], given with `rows`.
            Kernels see the part of one device. Where the mesh does not divide the heads of an
            array evenly, each device computes all of them.
    """

    backend: Backend = "auto"
    rows: NamedSharding | None = None
    heads: NamedSharding | None = None

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array | None = None,
        *,
        causal: bool,
        window: int | None = None,
    ) -> jax.Array:
        """Computes attention.

        Args:
            q: [B, S, N, H].
            k, v: [B, S, K, H].
            segments: int32[B, S], 0 = padding; None is one segment.
            causal: Whether a query sees the slots before it and its own only.
            window: Slots that a causal query sees, its own included. None is all before it.

        Returns:
            [B, S, N, H].
        """
        if window is not None and window >= q.shape[1]:
            window = None
        compute = functools.partial(self._compute, causal=causal, window=window)
        if self.rows is not None:
            rows, heads = self.rows.spec, self._dividing(k).spec
            compute = jax.shard_map(
                compute,
                mesh=self.rows.mesh,
                in_specs=(heads, heads, heads, rows),
                out_specs=heads,
                check_vma=False,
            )
        return compute(q, k, v, segments)

    def check(self, dtype: DTypeLike, head_dims: Sequence[int]) -> None:
        """Checks that the backend can compute on this mesh.

        Args:
            dtype: Of the activations.
            head_dims: Of all attention layers.

        Raises:
            ConfigError: It cannot; the message names the remedy.
        """
        platform, problem = self._platform(), None
        fits = {"splash": (None, "tpu"), "cudnn": (None, *NVIDIA)}
        if self.backend not in get_args(Backend):
            problem = f"choose one of {', '.join(get_args(Backend))}"
        elif self.backend in fits and platform not in fits[self.backend]:
            problem = (
                "it does not run on the devices of this mesh, which are of the platform "
                f"{platform}; set it to auto or xla"
            )
        elif self.backend == "cudnn":
            problem = next(
                filter(None, (cudnn_problem(dtype, head_dim) for head_dim in head_dims)), None
            )
        if problem is not None:
            raise ConfigError(f"compute.attention is {self.backend!r}: {problem}")

    def _compute(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array | None,
        *,
        causal: bool,
        window: int | None,
    ) -> jax.Array:
        xla, cudnn, splash = (
            functools.partial(implementation, causal=causal, window=window)
            for implementation in (
                xla_attention,
                cudnn_attention,
                functools.partial(splash_attention, residuals=ATTENTION_OUTPUT),
            )
        )
        named = {
            "xla": xla,
            "cudnn": cudnn,
            "splash": splash,
            "splash_interpret": functools.partial(splash, interpret=True),
        }
        platform = self._platform()
        backend: str = self.backend
        if backend == "auto":
            backend = {"tpu": "splash", "cpu": "xla"}.get(platform or "", "auto")
        if backend != "auto":
            return named[backend](q, k, v, segments)
        # Without a mesh the platform is known only when the program is compiled.
        kernels = {} if platform in NVIDIA else {"tpu": splash}
        if cudnn_problem(q.dtype, q.shape[-1]) is None:
            kernels["cuda"] = cudnn
        return jax.lax.platform_dependent(q, k, v, segments, **kernels, default=xla)

    def _platform(self) -> str | None:
        """Returns the platform of the mesh, None without one.

        A program is compiled for the devices of the mesh, whether or not they are attached.
        """
        return None if self.rows is None else _mesh(self.rows).devices.flat[0].platform

    @property
    def platform(self) -> str:
        """The platform of the mesh; without one that of this process."""
        return self._platform() or jax.default_backend()

    def _dividing(self, k: jax.Array) -> NamedSharding:
        """Returns `heads` where it divides the key heads evenly, else `rows`."""
        assert self.rows is not None and self.heads is not None
        try:
            self.heads.shard_shape(k.shape)
        except ValueError:
            return self.rows
        return self.heads


def _mesh(sharding: NamedSharding) -> Mesh:
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


DEFAULT_ATTENTION = SelfAttention()
