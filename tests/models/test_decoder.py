"""The decoder against the original: hidden states, caches, masks, positions (model.md 8, 15)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvlx_jax.core.model_config import DecoderConfig, RopeConfig
from internvlx_jax.models import attention
from internvlx_jax.models.attention import SelfAttention, attend
from internvlx_jax.models.decoder import Decoder, KeyValues, KVCacheView, TokenLayout, rope_tables

ATOL = 1e-4


def layout(tokens, positions=None, mask=None):
    batch, length = tokens.shape
    positions = np.broadcast_to(np.arange(length), tokens.shape) if positions is None else positions
    mask = np.ones_like(tokens) if mask is None else mask
    return TokenLayout(jnp.asarray(positions, jnp.int32), jnp.asarray(mask, jnp.int32))


run_layers = jax.jit(Decoder.run_layers, static_argnames=("start", "stop", "keep_kv"))


def logits(decoder, tokens, **kwargs):
    x = decoder.embed(jnp.asarray(tokens), jnp.float32)
    return decoder.logits(run_layers(decoder, x, layout(tokens, **kwargs))[0])


def test_hidden_states_and_caches(parity):
    decoder, outputs = parity.model.decoder, parity.outputs
    tokens = parity.inputs["llm_input_ids"]
    x = decoder.embed(jnp.asarray(tokens), jnp.float32)
    for layer in range(decoder.config.layers):
        np.testing.assert_allclose(x, outputs[f"llm_hidden_{layer}"], atol=ATOL, rtol=0)
        x, kv = run_layers(decoder, x, layout(tokens), start=layer, stop=layer + 1, keep_kv=True)
        for ours, name in zip(kv, ("k", "v")):
            np.testing.assert_allclose(
                ours[0].swapaxes(1, 2), outputs[f"llm_cache_{name}_{layer}"], atol=ATOL, rtol=0
            )
    np.testing.assert_allclose(
        decoder.norm(x), outputs[f"llm_hidden_{decoder.config.layers}"], atol=ATOL, rtol=0
    )


def test_masks_and_positions(parity):
    decoder, inputs, outputs = parity.model.decoder, parity.inputs, parity.outputs
    tokens = inputs["llm_input_ids"]
    right, left = inputs["llm_mask_right"], inputs["llm_mask_left"]
    np.testing.assert_allclose(logits(decoder, tokens), outputs["llm_logits"], atol=ATOL, rtol=0)
    for name, mask, positions in (
        ("mask_right", right, None),
        ("mask_left", left, None),
        ("mask_left_pos", left, inputs["llm_position_ids_left"]),
    ):
        ours = np.asarray(logits(decoder, tokens, mask=mask, positions=positions))
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(
            ours[mask == 1], outputs[f"llm_logits_{name}"][mask == 1], atol=ATOL, rtol=0
        )
    ours = logits(decoder, tokens, positions=inputs["llm_position_ids_custom"])
    np.testing.assert_allclose(ours, outputs["llm_logits_pos_custom"], atol=ATOL, rtol=0)


def test_prefill_and_single_steps(parity):
    decoder = parity.model.decoder
    tokens = parity.inputs["llm_input_ids"]
    batch, length = tokens.shape
    prefill = 8
    x = decoder.embed(jnp.asarray(tokens[:, :prefill]), jnp.float32)
    x, kv = run_layers(decoder, x, layout(tokens[:, :prefill]), keep_kv=True)
    rows = [decoder.logits(x)]
    kv = jax.tree.map(
        lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, length - prefill), (0, 0), (0, 0))), kv
    )
    for slot in range(prefill, length):
        cached = KVCacheView(
            kv,
            jnp.broadcast_to(jnp.arange(length) <= slot, (batch, length)).astype(jnp.int32),
            jnp.int32(slot),
        )
        one = TokenLayout(jnp.full((batch, 1), slot, jnp.int32), jnp.ones((batch, 1), jnp.int32))
        x, new = run_layers(
            decoder,
            decoder.embed(jnp.asarray(tokens[:, slot : slot + 1]), jnp.float32),
            one,
            cache=cached,
            keep_kv=True,
        )
        kv = KeyValues(*(old.at[:, :, slot : slot + 1].set(fresh) for old, fresh in zip(kv, new)))
        rows.append(decoder.logits(x))
    np.testing.assert_allclose(
        jnp.concatenate(rows, axis=1), parity.outputs["llm_logits_incremental"], atol=ATOL, rtol=0
    )


TINY = DecoderConfig(
    vocab_size=40, width=16, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=32
)


@functools.cache
def tiny(**changes):
    return Decoder(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0), dtype=jnp.float32)


def test_packed_segments_equal_separate_rows():
    decoder = tiny()
    tokens = np.random.default_rng(0).integers(0, 40, (1, 11))
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0]])
    packed = logits(decoder, tokens, positions=positions, mask=segments)
    np.testing.assert_allclose(packed[:, :4], logits(decoder, tokens[:, :4]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:9], logits(decoder, tokens[:, 4:9]), atol=1e-5)
    assert np.isfinite(packed).all()


def test_layer_ranges_compose():
    decoder = tiny()
    tokens = np.arange(6)[None]
    x = decoder.embed(jnp.asarray(tokens), jnp.float32)
    whole, _ = run_layers(decoder, x, layout(tokens))
    for cut in range(4):
        shallow, _ = run_layers(decoder, x, layout(tokens), stop=cut)
        deep, _ = run_layers(decoder, shallow, layout(tokens), start=cut)
        np.testing.assert_allclose(deep, whole, atol=1e-6)


def test_tied_output():
    decoder = tiny(tie_embeddings=True)
    x = jax.random.normal(jax.random.key(0), (1, 3, 16))
    assert decoder.head is None
    np.testing.assert_allclose(
        decoder.logits(x), decoder.norm(x) @ decoder.embedding[...].T, atol=1e-6
    )


def test_rope_scaling():
    positions = jnp.arange(40)[None]
    plain = RopeConfig(theta=1e4, max_positions=32)
    dynamic = RopeConfig(
        theta=1e4, max_positions=32, scaling="dynamic", factor=2.0, allow_longer=True
    )
    linear = RopeConfig(theta=1e4, max_positions=64, scaling="linear", factor=4.0)
    np.testing.assert_array_equal(
        rope_tables(dynamic, positions, 8, 32).cos, rope_tables(plain, positions, 8, 32).cos
    )
    theta = 1e4 * (2.0 * 40 / 32 - 1.0) ** (8 / 6)
    expected = np.cos(np.arange(40)[:, None] * theta ** (-np.arange(0, 8, 2) / 8))
    np.testing.assert_allclose(rope_tables(dynamic, positions, 8, 40).cos[0], expected, atol=1e-5)
    np.testing.assert_allclose(
        rope_tables(linear, 4 * positions, 8, 40).sin,
        rope_tables(plain, positions, 8, 32).sin,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="40 key slots exceed.*allow_longer"):
        rope_tables(plain, positions, 8, 40)


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
def test_sliding_window(backend, monkeypatch):
    """A query sees itself and the `window - 1` slots before it, in its segment: the same as without
    the other keys.
    """
    monkeypatch.setattr(attention, "CHUNK", 4)
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((1, 9, 4, 8), (1, 9, 2, 8), (1, 9, 2, 8))
    )
    segments = jnp.asarray([[1, 1, 1, 1, 1, 1, 2, 2, 2]], jnp.int32)
    windowed = SelfAttention(backend)(q, k, v, segments, causal=True, window=3)
    for slot in range(9):
        first = max(0 if slot < 6 else 6, slot - 2)
        alone = attend(
            q[:, slot : slot + 1],
            k[:, first : slot + 1],
            v[:, first : slot + 1],
            q_start=slot - first,
        )
        np.testing.assert_allclose(windowed[:, slot], alone[:, 0], atol=1e-5)
        if slot >= 1:  # one step of decoding
            step = attend(
                q[:, slot : slot + 1],
                k,
                v,
                q_segments=segments[:, slot : slot + 1],
                kv_segments=segments,
                q_start=slot,
                window=3,
            )
            np.testing.assert_allclose(step[:, 0], alone[:, 0], atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_chunks_are_the_whole(causal, monkeypatch):
    """Values and gradients in chunks, and in parts where it is causal, are those of one formula."""
    monkeypatch.setattr(attention, "CHUNK", 4)
    rng = np.random.default_rng(0)
    length = 37  # no multiple of a chunk, nor of a part
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=(1, length, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4)
    )
    segments = jnp.asarray([[1] * 15 + [2] * 19 + [0] * 3], jnp.int32)

    def chunked(q, k, v):
        return jnp.sum(weight * SelfAttention("xla")(q, k, v, segments, causal=causal))

    def plain(q, k, v):
        start = 0 if causal else None
        y = attend(q, k, v, q_segments=segments, kv_segments=segments, q_start=start)
        return jnp.sum(weight * y)

    got, expected = (jax.value_and_grad(f, (0, 1, 2))(q, k, v) for f in (chunked, plain))
    for ours, theirs in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "scaling, scale", [("su", (1 + np.log(4) / np.log(16)) ** 0.5), ("yarn", 0.1 * np.log(4) + 1)]
)
def test_phi3_rope(scaling, scale):
    """Frequencies are stretched by the short factors, by the long ones once a position is beyond
    the original range.
    """
    short, long = (1.0, 1.5, 2.0, 2.5), (2.0, 3.0, 4.0, 5.0)
    config = RopeConfig(
        theta=100.0,
        max_positions=64,
        scaling=scaling,
        short_factor=short,
        long_factor=long,
        original_max_positions=16,
    )
    for length, factors in ((16, short), (17, long)):
        angles = np.arange(length)[:, None] / (
            np.asarray(factors) * 100.0 ** (np.arange(0, 8, 2) / 8)
        )
        ours = rope_tables(config, jnp.arange(length)[None], 8, length)
        np.testing.assert_allclose(ours.cos[0], scale * np.cos(angles), atol=1e-5)
        np.testing.assert_allclose(ours.sin[0], scale * np.sin(angles), atol=1e-5)
